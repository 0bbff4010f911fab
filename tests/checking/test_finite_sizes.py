"""What is no fault in small networks: drifts that add up, streams that shrink, decay that is undone, idle experts."""

from typing import Any

import pytest
import torch
from helpers.architecture_runs import SMALL, Trained, batches_like
from helpers.architectures import ARCHITECTURES

from mlu_lightning import Plan, Shape
from mlu_lightning.checking.check import _rows
from mlu_lightning.checking.measurement import Measured, Measurement, measure
from mlu_lightning.checking.quantities import Kind, Quantity
from mlu_lightning.checking.sizes import sizes

UPDATE = Quantity(Kind.UPDATE, "blocks.*.weight", "branch_in")


def verdicts(powers: dict[str, float], stream: float = 0.0, together: float = 0.0) -> dict[str, str]:
    """Verdicts where an update goes with powers of the axes, and the size of the stream with one of the depth."""
    axes = [*powers, "together"] if len(powers) > 1 else [*powers]
    grid = sizes(Shape(2, 2, 32), (1, 2, 4, 8), axes)
    measured = {}
    for size in grid:
        ratios = {
            "depth": size.shape.depth / 2,
            "hidden": size.shape.hidden / 2,
            "embedding": size.shape.embedding / 32,
        }
        value = torch.tensor([ratios[axis] ** power for axis, power in powers.items()]).prod().item()
        if size.axis == "together":
            value *= size.factor**together
        for seed in range(3):
            found = (Measurement(UPDATE, (value * (1 + 0.01 * seed),)),)
            measured[size.shape, seed] = Measured(found, {"s=1": ratios["depth"] ** stream})
    return {row.axis: row.verdict for row in _rows(grid, measured)}


def test_drifts_along_the_axes_add_up_where_all_grow() -> None:
    drifts = {"depth": -0.22, "hidden": -0.2}
    assert set(verdicts(drifts).values()) == {"pass"}
    assert verdicts(drifts, together=-0.5)["together"] == "fail"
    # what fails along an axis is no drift
    assert verdicts({"depth": -0.6, "hidden": 0.0}) == {"depth": "fail", "hidden": "pass", "together": "fail"}


@pytest.mark.parametrize(("power", "stream", "verdict"), [(0.5, -0.5, "pass"), (0.5, 0.0, "fail"), (1.0, -1.0, "fail")])
def test_gradients_grow_where_streams_shrink(power: float, stream: float, verdict: str) -> None:
    assert verdicts({"depth": power}, stream) == {"depth": verdict}


def updates(name: str, seed: int, optimizer: Any, loss: float = 1.0) -> dict[str, tuple[float, ...]]:
    """Updates by row and name, after one step at a base."""

    class Stepped(Trained):
        def training_step(self, batch: Any) -> torch.Tensor:
            return loss * super().training_step(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optimizer(self.parameters())

    torch.manual_seed(seed)
    module, batches = Stepped(ARCHITECTURES[name].build(*SMALL)), batches_like(ARCHITECTURES[name].example, 2)
    found = measure(module, Plan.from_model(module, batches[0], base=module), [], batches[:1], batches[1], 1, {})
    return {f"{one.quantity}": one.values for one in found.measurements if one.quantity.kind is Kind.UPDATE}


def test_decay_of_gains_between_additions_is_undone_by_the_next_norm() -> None:
    def decay(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 1e-2, weight_decay=10.0)

    found = updates("bert", 0, decay, loss=0.0)
    between = {what: values for what, values in found.items() if "post_norm" in what}
    assert len(between) == 4 and max(map(max, between.values())) < 1e-6
    assert found["update of module.bert.embeddings.LayerNorm.weight (stream_norm)"][0] == pytest.approx(0.1, rel=0.1)


def test_experts_without_tokens_are_left_out() -> None:
    adam = torch.optim.AdamW
    for seed in range(4):
        found = updates("average of experts", seed, adam)
        of_experts = {what: values for what, values in found.items() if "experts" in what and "router" not in what}
        assert of_experts and min(map(min, of_experts.values())) > 0
