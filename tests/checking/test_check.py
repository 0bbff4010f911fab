"""Checks of real modules: what is measured, that the right plan passes, and that faults are found and named."""

import copy
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers.architecture_runs import SMALL, Trained, batches_like
from helpers.architectures import ARCHITECTURES
from helpers.check_runs import CONTEXT, VOCABULARY, few, tokens, transformer
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mlu_lightning import CheckReport, MLUCallback, Plan, Role, Shape, check
from mlu_lightning.checking.quantities import Kind
from mlu_lightning.models import CausalTransformer, ResNet
from recipes.check.plan_faults import Fault, FaultyCallback


def test_right_plan_passes_and_is_the_same_with_hooks_and_folded() -> None:
    hook = few(axes=["depth"], seeds=2, callbacks=lambda base: [MLUCallback(base, residual="hook")])
    fold = few(axes=["depth"], seeds=2, callbacks=lambda base: [MLUCallback(base, residual="fold")])
    assert hook.verdict == "pass", hook
    assert hook.notes == ("Distance ratio r = √(d/(l·m)) at the largest size along each axis: depth 0.5.",)
    assert {row.quantity.kind for row in hook.rows} == set(Kind)
    assert [row.quantity for row in hook.rows] == [row.quantity for row in fold.rows]
    for one, other in zip(hook.rows, fold.rows, strict=True):
        # weights that hold their multipliers have the same decay, but for rounding
        assert one.quantity.kind is Kind.DECAY or other.slope == pytest.approx(one.slope, abs=2e-3), one


def test_every_shape_is_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    plan = Plan.from_model
    monkeypatch.setattr(
        Plan, "from_model", lambda *args, **more: made.append(more.get("alpha", 1.0)) or plan(*args, **more)
    )
    for alpha in (1.0, 2.0):
        few(
            axes=["depth"],
            factors=(1, 2),
            steps=1,
            callbacks=lambda base, alpha=alpha: [MLUCallback(base, alpha=alpha)],
        )
    assert sorted(made) == [1.0, 1.0, 1.0, 1.0, 2.0, 2.0]  # of two shapes each


def test_shapes_far_from_the_limit_are_named() -> None:
    """The embedding grows at the largest hidden width, if the module has one."""
    axes: dict[str, Any] = {"axes": ["embedding"], "factors": (1, 4), "seeds": 1, "steps": 1}
    assert few(**axes).notes == ("Distance ratio r = √(d/(l·m)) at the largest size along each axis: embedding 1.",)
    report = few(**axes, build=lambda depth, hidden, embedding: transformer(depth, 2, embedding))
    assert report.notes == (
        "Distance ratio r = √(d/(l·m)) at the largest size along each axis: embedding 2; above 1.5 (embedding) the best "
        "learning rate may be lower than the base's.",
    )
    assert not report.warnings and CheckReport.from_json(report.to_json()).notes == report.notes


with_eps = partial(transformer, eps=1.0, lr=0.3, weight_decay=0.0)  # so large that it matters


@pytest.mark.parametrize(
    ("fault", "says", "settings"),
    [
        (Fault(Role.BRANCH_IN, "lr"), "lr", {"axes": ["embedding"], "seeds": 2}),
        (Fault(Role.BRANCH_OUT, "std"), "multiplier or std", {"axes": ["hidden"], "seeds": 2}),
        (Fault(Role.BRANCH_OUT, "multiplier"), "multiplier or std", {"axes": ["depth"], "seeds": 2}),
        (Fault(Role.READOUT, "multiplier"), "multiplier or std", {"axes": ["embedding"], "seeds": 2}),
        (Fault(Role.EMBEDDING, "weight_decay"), "weight decay", {"axes": ["embedding"], "seeds": 2}),
        (Fault(Role.BRANCH_OUT, "eps"), "lr or eps", {"axes": ["depth"], "build": with_eps}),
    ],
)
def test_faults_are_found_and_named(fault: Fault, says: str, settings: dict[str, Any]) -> None:
    report = few(**settings, callbacks=lambda base: [FaultyCallback(fault, base)])
    cause = report.causes[0]
    assert (report.verdict, cause.role, cause.factor) == ("fail", fault.role.value, says), report


class OneForgotten(MLUCallback):  # does not multiply one branch, as a hand-written block that was left out would not be
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        block = pl_module.blocks[len(pl_module.blocks) // 2]
        block._forward_hooks.clear()


def test_one_branch_without_its_multiplier_is_found() -> None:
    inputs = torch.randn(8, 16, 3, generator=torch.Generator().manual_seed(0))
    data = [(x, torch.stack((x[:, 0] * x[:, 1], x[:, 2].abs()), 1)) for x in inputs]
    settings: dict[str, Any] = {"base": Shape(2, 32, 16), "data": data, "axes": ["depth"], "factors": (1, 2, 4, 8)}
    build = partial(ResNet, inputs=3, outputs=2)
    report = few(**settings, build=build, seeds=4, callbacks=lambda base: [OneForgotten(base, residual="hook")])
    starts = [row for row in report.rows if row.quantity.kind == "start" and row.quantity.role == "branch_out"]
    assert [row.verdict for row in starts] == ["fail"] and starts[0].reason == "at the place where it is largest"
    assert report.causes[0].role == "branch_out"


class Text(LightningDataModule):  # batches that only come right through a hook of the data
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.cat(tokens()) + 1), batch_size=16)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Tensor:
        result: Tensor = batch[0] - 1
        return result


def loader() -> DataLoader[Any]:
    return DataLoader(torch.cat(tokens()), batch_size=16)  # type: ignore[arg-type]  # a tensor is a dataset of its rows


class Own(CausalTransformer):  # has its own data
    def train_dataloader(self) -> DataLoader[Any]:
        return loader()


SHORT: dict[str, Any] = {"seeds": 1, "factors": (1, 2), "steps": 1}


def test_data_can_be_batches_a_loader_a_module_or_the_modules_own() -> None:
    def build(depth: int, hidden: int, embedding: int) -> Own:
        return Own(VOCABULARY, CONTEXT, depth, embedding, hidden, head_dim=8, mlp_hidden=32 * hidden)

    check_of = partial(few, build=build, axes=["depth"], **SHORT | {"steps": 2})
    of_list, of_loader, of_own = (check_of(data=data).to_json() for data in (tokens(), loader(), None))
    assert of_list == of_loader == of_own
    with pytest.raises(ValueError, match="There are no batches in the data"):
        check_of(data=[])


def test_hooks_of_a_datamodule_transfer_batches() -> None:
    data = Text()
    report = few(data=data, axes=["depth"], **SHORT | {"steps": 2})
    assert all(np.isfinite(point.value) for row in report.rows for point in row.points)
    assert "train_dataloader" not in vars(data)


def test_nothing_is_left_behind() -> None:
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # the global states are what is meant
    states = random.getstate(), copy.deepcopy(np.random.get_state()), torch.get_rng_state()
    calls: list[tuple[int, int]] = []
    data, before = tokens(), tokens()
    few(axes=["depth"], **SHORT, data=data, progress=lambda *count: calls.append(count))
    assert random.getstate() == states[0] and all(map(np.array_equal, np.random.get_state(), states[1]))
    assert torch.equal(torch.get_rng_state(), states[2]) and all(map(torch.equal, data, before))
    assert calls == [(1, 2), (2, 2)]


def test_same_seed_same_report() -> None:
    first, again, other = (few(axes=["hidden"], seed=seed, **SHORT).to_json() for seed in (0, 0, 7))
    assert first == again != other


@pytest.mark.parametrize("wrong", [{"seeds": 0}, {"steps": 0}])
def test_what_cannot_be(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="should both be 1 or more"):
        few(**wrong)


PASSING = "gpt2,llama,tied llama,gemma2,mistral,qwen3,mixtral,gpt-neox,bert,t5,vit,pre-norm encoder,post-norm encoder,"
PASSING += "basic resnet,average of experts,sum of experts"


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSING.split(","))
def test_architectures_pass_and_without_the_plugin_they_fail(name: str) -> None:
    architecture = ARCHITECTURES[name]
    base = Shape(2, *SMALL[1:])  # gradients of a single block differ from those of many by more than a drift

    def build(depth: int, hidden: int, embedding: int) -> LightningModule:
        return Trained(architecture.build(depth, hidden, embedding))

    check_it = partial(check, build, base, batches_like(architecture.example, 24), axes=["depth"], factors=(1, 2, 4))
    report = check_it(seeds=8)
    starts = [row for row in report.rows if row.quantity.kind in ("start", "decay")]
    assert {row.verdict for row in starts} == {"pass"}, str(report)
    assert report.verdict == "pass", str(report)
    assert check_it(seeds=8, callbacks=lambda _: []).verdict == "fail"
