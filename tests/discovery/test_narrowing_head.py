"""A head that narrows the stream to a bounded size ends it as a readout does; what a role alone cannot say is refused."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.one_part_alone import INPUTS, distance_moved
from helpers.residual_networks import Net, stream
from torch import nn, optim

from mlu_lightning import Plan
from mlu_lightning.models import ResidualBlock
from mlu_lightning.table import Ratios, Role, Scale, Variant

BASE = 32


def narrowing(embedding: int) -> Net:
    """Residual blocks with two hidden units for a coordinate, and a head of 16 features."""
    blocks = nn.ModuleList(ResidualBlock(2 * embedding, embedding) for _ in range(3))
    parts = {"embed": nn.Linear(5, embedding), "narrow": nn.Linear(embedding, 16), "out": nn.Linear(16, 1)}
    return Net(lambda net, x: net.out(torch.relu(net.narrow(stream(net, x)))), blocks=blocks, **parts)


def _plan(module: nn.Module, base: nn.Module) -> Plan:
    return Plan.from_model(module, (INPUTS,), base=base)


def test_numbers_of_a_head_that_narrows() -> None:
    """Sums over D, and gradients do not depend on it: a readout with its 1/d folded into the weight."""
    plan = _plan(narrowing(4 * BASE), narrowing(BASE))
    assert {name: one.row for name, one in plan.parameters.items() if "blocks" not in name} == {
        "embed.weight": "embedding",
        "embed.bias": "embedding",
        "narrow.weight": "stream_matrix (in_head)",
        "narrow.bias": "stream_norm",
        "out.weight": "readout",
        "out.bias": "readout_bias",
    }
    assert plan.parameters["narrow.weight"].ratios == Ratios(inputs=4.0)
    assert plan.scales("adamw")["narrow.weight"] == Scale(std=1 / 4, lr=1 / 4, weight_decay=4.0)
    assert plan.scales("sgd")["narrow.weight"] == Scale(std=1 / 4, lr=1 / 4, weight_decay=4.0)
    for name in ("narrow.bias", "out.weight", "out.bias"):
        assert plan.scales("sgd")[name] == plan.scales("adamw")[name] == Scale(), name
    assert [m.value for m in plan.multipliers if m.kind == "readout"] == [1.0]


def test_a_saved_plan_is_a_base_whether_its_own_head_narrowed_or_not() -> None:
    grown, base = narrowing(4 * BASE), narrowing(BASE)
    same = _plan(base, base)
    assert same.roles["narrow.weight"] is Role.STREAM_MATRIX
    assert all(scale == Scale() for scale in same.scales("adamw").values())
    for plan in (_plan(grown, base), same):
        assert Plan.from_model(grown, (INPUTS,), base=plan).scales("adamw") == _plan(grown, base).scales("adamw")


@pytest.mark.parametrize("part", ["embed", "blocks", "narrow"])
@pytest.mark.parametrize(("family", "lr"), [(optim.Adam, 1e-3), (optim.SGD, 1e-2)])
def test_every_part_moves_the_output_equally_far(part: str, family: type[optim.Optimizer], lr: float) -> None:
    """Five steps of one part alone; as a matrix of the stream, the head would let it go 4 times as far at 16 times D."""
    moved = {
        (width, variant): sum(_moved(width, variant, part, family, lr, seed) for seed in range(4))
        for width, variant in ((BASE, True), (16 * BASE, True), (16 * BASE, False))
    }
    base = moved.pop((BASE, True))
    ratio, plain = moved.values()
    assert 1 / 1.5 < ratio / base < 1.5
    if part != "narrow":
        assert plain / base > 2


def _moved(width: int, variant: bool, part: str, family: type[optim.Optimizer], lr: float, seed: int) -> float:
    torch.manual_seed(seed)
    base, module = narrowing(BASE), narrowing(width)
    plan = _plan(module, base)
    if not variant:
        # its row is that of a matrix of the stream, at a depth that stays
        head = replace(plan.parameters["narrow.weight"], variant=Variant.EVERY_BLOCK)
        plan = replace(plan, parameters={**plan.parameters, "narrow.weight": head})
    trained = [parameter for name, parameter in module.named_parameters() if name.startswith(part)]
    return distance_moved(module, plan, trained, partial(family, lr=lr), module, samples=32)


def test_a_role_that_was_found_may_be_said_also_of_a_tied_readout() -> None:
    architecture = ARCHITECTURES["tied llama"]
    module, said = architecture.build(1, 2, 16), {"model.embed_tokens.weight": "embedding"}
    found = Plan.from_model(module, architecture.example, overrides=said)
    assert found == Plan.from_model(module, architecture.example)


@pytest.mark.parametrize(
    ("name", "role", "message"),
    [
        ("narrow.weight", "readout", r" the readout, but it was not found to be one \(its role is stream_"),
        ("out.weight", "stream_matrix", " a stream_matrix, but it was found to be a readout"),
    ],
)
def test_readouts_cannot_be_made_by_a_role(name: str, role: str, message: str) -> None:
    with pytest.raises(ValueError, match=name.replace(".", r"\.") + message):
        Plan.from_model(narrowing(BASE), (INPUTS,), base=narrowing(BASE), overrides={name: role})
    said = {"out.weight": "readout", "narrow.weight": "stream_bounded_matrix"}
    plan = Plan.from_model(narrowing(2 * BASE), (INPUTS,), base=narrowing(BASE), overrides=said)
    assert plan == Plan.from_model(narrowing(2 * BASE), (INPUTS,), base=plan, overrides=said)
