"""Plans at random shapes, down to a single block, unit or coordinate: the table, the identity, and hook against fold."""

import copy
import re
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import pytest
import torch
from helpers import perceptrons
from helpers.residual_networks import Block, Net
from helpers.table_by_hand import Shape, wanted
from helpers.trainers import identical
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mlu_lightning import Plan, Role, Scale, attach_multipliers, bake, fold, initialize, scale_optimizer
from mlu_lightning.models import CausalTransformer, ResNet
from mlu_lightning.table import OptimizerFamily

Dimensions = tuple[int, int, int]  # depth, hidden width and embedding dimension

VOCABULARY, HEAD_DIM = 5, 2
PERCEPTRON = {"embed": Role.EMBEDDING, "read": Role.BRANCH_IN, "write": Role.BRANCH_OUT, "readout": Role.READOUT}
TRANSFORMER = {
    "tokens": Role.EMBEDDING,
    **dict.fromkeys(("query", "key", "value", "read"), Role.BRANCH_IN),
    **dict.fromkeys(("out", "write"), Role.BRANCH_OUT),
    "branches.norm": Role.BRANCH_NORM,
    "norm": Role.STREAM_NORM,
    "readout": Role.READOUT,
}


@dataclass(frozen=True)
class Model:  # a kind of module, at any shape
    build: Callable[[Dimensions], nn.Module]
    example: Callable[[int], Any]  # with a number of samples
    role: Callable[[str], Role]  # of a parameter by its name, read off the source


def transformer(gains: bool, mlp: bool) -> Callable[[Dimensions], nn.Module]:
    def build(dimensions: Dimensions) -> nn.Module:
        depth, heads, embedding = dimensions
        units = None if mlp else 0
        return CausalTransformer(VOCABULARY, 4, depth, embedding, heads, HEAD_DIM, units, norm_gains=gains)

    return build


def numbers(samples: int) -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 1, 3 * samples).view(samples, 3), torch.zeros(samples, 2)


def ids(samples: int) -> Tensor:
    return (torch.arange(4 * samples) % VOCABULARY).view(samples, 4)


def layer_of(name: str, roles: dict[str, Role]) -> Role:
    path = re.sub(r"\.\d+\.", ".", name).removesuffix(".weight")
    return roles.get(path) or roles[path.split(".")[-1]]


MODELS = {
    "resnet": Model(lambda size: ResNet(*size, 3, 2), numbers, lambda name: layer_of(name, PERCEPTRON)),
    "with norms and biases": Model(lambda size: perceptrons.Perceptron(*size), numbers, perceptrons.role_of),
    "transformer": Model(transformer(gains=True, mlp=True), ids, lambda name: layer_of(name, TRANSFORMER)),
    "attention alone": Model(transformer(gains=False, mlp=False), ids, lambda name: layer_of(name, TRANSFORMER)),
}
DIMENSIONS = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
POWERS = st.tuples(st.sampled_from((1, 2)), st.sampled_from((1, 2, 8, 16)), st.sampled_from((1, 4, 16)))
MODEL = st.sampled_from(list(MODELS))
SOME = settings(max_examples=12, deadline=None, derandomize=True)


def planned(name: str, shape: Dimensions, base: Dimensions | None, samples: int = 2) -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    model = MODELS[name]
    module, reference = model.build(shape), None if base is None else model.build(base)
    return module, Plan.from_model(module, model.example(samples), base=reference)


def ratios(shape: Dimensions, base: Dimensions) -> Shape:
    depth, m, d = (size / other for size, other in zip(shape, base, strict=True))
    return Shape(depth, m, m, d, d)


@SOME
@given(name=MODEL, shape=DIMENSIONS, base=DIMENSIONS, samples=st.integers(1, 3))
# a vector of one entry is that of a coordinate here, and not of bounded size
@example(name="with norms and biases", shape=(1, 3, 1), base=(2, 3, 4), samples=2)
@example(name="transformer", shape=(1, 3, 8), base=(1, 3, 1), samples=2)
def test_numbers_are_those_of_the_table(name: str, shape: Dimensions, base: Dimensions, samples: int) -> None:
    _, plan = planned(name, shape, base, samples)
    for family in OptimizerFamily:
        for parameter, found in plan.scales(family).items():
            expected = wanted(MODELS[name].role(parameter), family, ratios(shape, base))
            assert astuple(found) == pytest.approx(astuple(expected), rel=1e-12), (parameter, family)
    assert plan.warnings == ()


@SOME
@given(name=MODEL, shape=DIMENSIONS)
def test_absolute_form_has_numbers_at_every_shape(name: str, shape: Dimensions) -> None:
    """Those of the table at D0 = M0 = L0 = 1."""
    _, plan = planned(name, shape, None)
    depth, heads, embedding = shape
    for parameter, found in plan.scales("adamw").items():
        hidden = 4 * heads * HEAD_DIM if ".read." in parameter or ".write." in parameter else heads
        whole = name == "transformer"
        at = Shape(2 * depth, hidden, hidden, embedding, embedding) if whole else ratios(shape, (1, 1, 1))
        expected = wanted(MODELS[name].role(parameter), OptimizerFamily.ADAMW, at)
        assert astuple(found) == pytest.approx(astuple(expected), rel=1e-12), parameter


@SOME
@given(name=MODEL, shape=DIMENSIONS)
def test_at_the_bases_shape_nothing_changes(name: str, shape: Dimensions) -> None:
    module, plan = planned(name, shape, shape)
    assert {scale for family in OptimizerFamily for scale in plan.scales(family).values()} == {Scale()}
    before = copy.deepcopy(module)
    initialize(module, plan)
    attach_multipliers(module, plan).remove()
    fold(module, plan)
    assert identical(module, before)
    optimizer = torch.optim.AdamW(module.parameters(), eps=0.1)
    seen: list[bool] = []
    optimizer.register_step_post_hook(lambda opt, *_: seen.append(opt.param_groups == [group]))
    group = optimizer.param_groups[0]
    scale_optimizer(optimizer, module, plan)
    optimizer.step()
    assert seen == [True]


def output(module: nn.Module, name: str) -> Any:
    example = MODELS[name].example(3)
    return module(example[0].to(next(module.parameters()).dtype) if isinstance(example, tuple) else example)


@SOME
@given(name=MODEL, shape=POWERS, base=POWERS)
def test_hook_and_fold_are_exact_at_powers_of_two(name: str, shape: Dimensions, base: Dimensions) -> None:
    """Outputs, and what is left after the hooks were removed, moved into the weights, or baked."""
    module, plan = planned(name, shape, base)
    folded, plain, before = copy.deepcopy(module), output(module, name), copy.deepcopy(module)
    handle = attach_multipliers(module, plan)
    hooked = output(module, name)
    assert torch.equal(output(fold(folded, plan), name), hooked)
    assert torch.equal(output(bake(copy.deepcopy(module), plan), name), hooked)
    assert torch.equal(output(fold(copy.deepcopy(module), plan), name), hooked)
    multipliers = plan.scales("adamw")
    assert all(
        torch.equal(p, before.get_parameter(key) * multipliers[key].multiplier) for key, p in folded.named_parameters()
    )
    handle.remove()
    assert torch.equal(output(module, name), plain)
    assert identical(module, before)


def gated(embedding: int) -> Net:
    """Its branch is multiplied by a scalar (ReZero), of bounded size at every D."""
    parts = {"embed": nn.Linear(3, embedding), "out": nn.Linear(embedding, 2), "blocks": Block(embedding, hidden=5)}

    def forward(net: Net, x: Tensor) -> Any:
        stream = net.embed(x)
        return net.out(stream + net.gate * net.blocks(stream))

    return Net(forward, gate=nn.Parameter(torch.ones(1)), **parts)


@pytest.mark.parametrize(("embedding", "base"), [(1, 4), (4, 1), (1, 1)])
def test_a_scalar_is_of_bounded_size_also_next_to_a_single_coordinate(embedding: int, base: int) -> None:
    plan = Plan.from_model(gated(embedding), numbers(2)[:1], base=gated(base))
    assert plan.roles["gate"] is Role.BRANCH_BOUNDED
