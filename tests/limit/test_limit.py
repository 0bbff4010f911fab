"""How the infinite model is made of a module."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from helpers.limit_models import INPUTS, OUTPUTS, S, descend, planned, planned_transformer, tensors, tokens, transformer
from torch import nn

from mlu_lightning import Plan, attach_multipliers, fold, initialize
from mlu_lightning.limit.infinite_model import embedding_weights, infinite_model
from mlu_lightning.models import ResNet


@pytest.mark.parametrize("shapes", [[(2, 8, 5), (2, 64, 32)], [(2, 8, 5), (6, 16, 12)]])
def test_infinite_model_is_that_of_the_base_not_of_the_shape(shapes: list[tuple[int, int, int]]) -> None:
    base = ResNet(1, 8, 5, INPUTS, OUTPUTS)
    modules = [ResNet(*shape, INPUTS, OUTPUTS) for shape in shapes]
    limits = [infinite_model(module, Plan.from_model(module, base=base), depth=3, units=16) for module in modules]
    one, other = limits
    assert all(map(torch.equal, one.module.parameters(), other.module.parameters()))
    x, _ = tensors()
    for limit in limits:
        descend(limit.module.double(), limit.optimizer(0.3, 0.5, 0.1), 4)
    assert torch.equal(one.module(x), other.module(x))


def test_default_sizes() -> None:
    for activation, depth, units in (("tanh", None, 1024), ("positive", 7, 10)):
        blocks: Any = infinite_model(*planned(activation, depth=3), depth=depth).module.blocks
        assert (len(blocks), blocks[-1].read.weight.shape) == (depth or 3, (units, 5))
    # 80/(4 · 4) heads, made even
    for changes, sizes, expected in (
        ({}, {"depth": 4, "units": 80}, (2, 6, 80, 10)),
        ({"mlp_hidden": 0}, {}, (3, 64, 0, 10)),
    ):
        module = transformer(depth=3, **changes)
        own = infinite_model(module, Plan.from_model(module), **sizes).module.hparams
        assert tuple(own[name] for name in ("depth", "heads", "mlp_hidden", "embedding")) == expected


@pytest.mark.parametrize("trained", [False, True])
def test_infinite_model_is_made_as_the_module_is_and_leaves_it_alone(trained: bool) -> None:
    module, plan = planned("tanh", trained)
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    limit = infinite_model(module, plan, units=16)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())
    own = dict(limit.module.named_parameters())
    assert own["embed.weight"].requires_grad == own["readout.weight"].requires_grad == trained
    assert own["blocks.0.read.weight"].requires_grad
    assert {parameter.dtype for parameter in own.values()} == {torch.float64}
    assert {p.dtype for p in infinite_model(module.bfloat16(), plan, units=16).module.parameters()} == {torch.float32}


@pytest.mark.parametrize("mlp_hidden", [0, 8, None], ids=["attention", "attention and perceptrons", "ResNet"])
def test_branches_are_zero_at_the_start(mlp_hidden: int | None) -> None:
    """Units read independently of what they write, which is zero on average: exactly, if pairs write the opposite."""
    module, plan = planned() if mlp_hidden is None else planned_transformer(mlp_hidden=mlp_hidden)
    limit = infinite_model(module.double(), plan, depth=4, units=32, heads=8)
    inputs = tensors()[0] if mlp_hidden is None else tokens()[:, :-1]
    for branch in limit.module.get_submodule("blocks" if mlp_hidden is None else "branches").children():
        stream = limit.module.get_submodule("embed" if mlp_hidden is None else "tokens")(inputs)
        assert branch(stream).abs().max() < 1e-14
    independent = infinite_model(module, plan, depth=4, units=32, heads=8, sampling="independent").module
    assert (independent(inputs) - limit.module(inputs)).abs().max() > 0.01


def test_units_depend_on_the_seed_alone() -> None:
    (_, plan), found = planned(), []
    for seed in (4, 4, 5):
        torch.manual_seed(len(found))
        found.append(infinite_model(planned()[0], plan, units=16, seed=seed).module.state_dict())
    one, same, other = found
    assert all(map(torch.equal, one.values(), same.values()))
    differ = {name.split(".", 2)[-1] for name in one if not torch.equal(one[name], other[name])}
    assert differ == {"read.weight", "write.weight"}
    assert not torch.equal(one["blocks.0.read.weight"], one["blocks.1.read.weight"])


@pytest.mark.parametrize("base", [False, True])
def test_weights_of_embedding_and_readout_without_multipliers(base: bool) -> None:
    module = ResNet(4, 8, 6, INPUTS, OUTPUTS)
    plan = Plan.from_model(module, base=ResNet(2, 8, 3, INPUTS, OUTPUTS) if base else None)
    initialize(module, plan)
    expected = torch.cat((module.embed.weight, module.readout.weight.T), 1).detach().clone()
    assert torch.equal(embedding_weights(module, plan), expected)
    assert not embedding_weights(module, plan).requires_grad
    handle = attach_multipliers(module, plan)
    assert torch.equal(embedding_weights(module, plan), expected)
    handle.remove()
    fold(module, plan)
    copied = embedding_weights(module, plan)
    nn.init.zeros_(module.embed.weight)
    assert torch.equal(embedding_weights(module, plan)[:, :INPUTS], torch.zeros(6, INPUTS))
    # of a product with 1/d, undone: one rounding each
    torch.testing.assert_close(copied, expected, rtol=2e-7, atol=0)
    torch.testing.assert_close(module.readout.weight.T * (2 if base else 6), expected[:, INPUTS:], rtol=2e-7, atol=0)


def test_streams_in_the_coordinates_of_a_finite_network() -> None:
    rng = np.random.default_rng(0)
    w, h = rng.normal(size=(9, 5)), rng.normal(size=(2, 4, 5))
    found = infinite_model(*planned(), units=16).in_coordinates_of(torch.from_numpy(w), torch.from_numpy(h))
    np.testing.assert_allclose(found.numpy(), h / np.sqrt(5) / np.sqrt(S) @ w.T, rtol=1e-12)
