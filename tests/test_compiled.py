"""torch.compile in several ways, before and after the Trainer gets a module: no multiplier too few or many."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from architecture_runs import Trained, batches_like, built, fit, identical
from architectures import ARCHITECTURES
from lightning.pytorch import Callback, LightningModule, Trainer
from test_every_architecture_compiled import Counting
from torch import Tensor, nn

from mlu_lightning import Plan, attach_multipliers, bake, fold, initialize
from mlu_lightning.callbacks import MLUCallback
from mlu_lightning.models import ResNet

RESNET = ARCHITECTURES["resnet"]
SHAPE, BASE = (3, 4, 32), (2, 2, 16)
BATCHES = batches_like(RESNET.example)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# Ways to compile a LightningModule, or what is inside


def wrapper(module: Trained, backend: Any) -> Any:
    return torch.compile(module, backend=backend)


def step(module: Trained, backend: Any) -> Any:
    vars(module)["training_step"] = torch.compile(module.training_step, backend=backend)
    return module


def inside(module: Trained, backend: Any) -> Any:
    module.module.compile(backend=backend)
    return module


def blocks(module: Trained, backend: Any) -> Any:
    for block in module.module.blocks:
        block.compile(backend=backend)
    return module


class Compiles(Callback):
    """After the Trainer and MLUCallback had the module."""

    def __init__(self, compiled: Callable[[Any], Any]) -> None:
        self.compiled = compiled

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.compiled(pl_module)


def trained(how: Any, when: str, backend: Any, *callbacks: Callback) -> Trained:
    module = built(RESNET, SHAPE)
    if when == "before":
        fit(how(module, backend), BATCHES, *callbacks)
    else:
        fit(module, BATCHES, *callbacks, Compiles(lambda given: how(given, backend)))
    return module


@pytest.mark.parametrize("residual", ["hook", "fold"])
@pytest.mark.parametrize(
    ("how", "when"),
    [
        pytest.param(wrapper, "before", marks=pytest.mark.slow),
        pytest.param(step, "before", marks=pytest.mark.slow),
        (step, "after"),
        pytest.param(inside, "before", marks=pytest.mark.slow),
        pytest.param(inside, "after", marks=pytest.mark.slow),
        pytest.param(blocks, "before", marks=pytest.mark.slow),
        (blocks, "after"),
    ],
)
def test_compiled_run_is_the_run(how: Any, when: str, residual: Any) -> None:
    plan = Plan.from_model(built(RESNET, SHAPE), BATCHES[0], base=built(RESNET, BASE, seed=1))
    assert {plan.forward_multiplier(multiplier) for multiplier in plan.multipliers} == {2 / 3, 1 / 2}
    plain = built(RESNET, SHAPE)
    fit(plain, BATCHES, MLUCallback(plan=plan, residual=residual))
    counting = Counting("eager")
    trained(how, when, counting)
    graphs, breaks = counting.taken()
    torch.compiler.reset()
    module = trained(how, when, counting, MLUCallback(plan=plan, residual=residual))
    assert module.losses == plain.losses
    assert identical(module, plain)
    # torch runs the hooks of a module that is compiled by itself outside of its graph: here one graph for all of them
    assert counting.taken() == (graphs + (how is blocks and residual == "hook"), breaks)
    assert graphs > 0
    assert breaks == Counter()


class Regression(Trained):
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.module(batch[0]), batch[1])


@pytest.mark.parametrize("residual", ["hook", "fold"])
def test_part_that_the_module_compiles_itself_is_planned_with_a_base_that_does_too(residual: Any) -> None:
    counting = Counting("eager")
    plain, module, base = (Regression(built(RESNET, *shape).module) for shape in ((SHAPE,), (SHAPE,), (BASE, 1)))
    fit(plain, BATCHES, MLUCallback(copy.deepcopy(base), residual=residual))
    for each in (module, base):
        each._modules["module"] = torch.compile(each.module, backend=counting)  # as its constructor might
    fit(module, BATCHES, MLUCallback(base, residual=residual))
    assert counting.taken() == (1, Counter())
    assert module.losses == plain.losses


# Multipliers that move after the first compiled call


def compiled_wrapper(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def compiled_in_place(module: nn.Module) -> Any:
    module.compile(backend="eager")
    return module


def compiled_blocks(module: Any) -> Any:
    for block in module.blocks:
        block.compile(backend="eager")
    return module


@pytest.mark.parametrize("compiled", [compiled_wrapper, compiled_in_place, compiled_blocks])
def test_no_multiplier_is_stale_after_a_compiled_call(compiled: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(0)
    base, module = (ResNet(depth, hidden=8, embedding=4, inputs=3, outputs=2).double() for depth in (2, 3))
    x = torch.randn(5, 3).double()
    plan = Plan.from_model(module, (x, torch.ones(5, 2)), base=base)
    initialize(module, plan)

    def by_hand(multiplier: float) -> Any:
        stream = module.embed(x)
        for block in module.blocks:
            stream = stream + multiplier * block.write(block.activation(block.read(stream)))
        return module.readout(stream)

    exact = {"rtol": 1e-14, "atol": 0.0}
    call = compiled(module)
    plain, scaled = by_hand(1.0), by_hand(2 / 3)
    assert not torch.allclose(plain, scaled)
    torch.testing.assert_close(call(x), plain, **exact)
    handle = attach_multipliers(call, plan)
    torch.testing.assert_close(call(x), scaled, **exact)
    handle.remove()
    torch.testing.assert_close(call(x), plain, **exact)
    attach_multipliers(call, plan)
    torch.testing.assert_close(call(x), scaled, **exact)
    fold(call, plan)  # hooks move into the weights
    torch.testing.assert_close(call(x), scaled, **exact)
    torch.testing.assert_close(by_hand(1.0), scaled, **exact)
    bake(call, plan)
    torch.testing.assert_close(call(x), scaled, **exact)


# Parts that torch.compile has wrapped have other names


def test_wrapped_parts_are_refused_with_what_to_do() -> None:
    base, plain, wrapped = (ResNet(depth, 8, 4, 3, 2) for depth in (2, 3, 3))
    example = torch.ones(5, 3), torch.ones(5, 2)
    plan = Plan.from_model(plain, example, base=base)
    for index, block in enumerate(wrapped.blocks):
        wrapped.blocks[index] = torch.compile(block, backend="eager")
    advice = r"wrapped by torch\.compile.*_orig_mod.*compile them in place.*\.compile\(\)"
    with pytest.raises(ValueError, match=rf"has no counterpart in the base.*{advice}"):
        Plan.from_model(wrapped, example, base=base)
    with pytest.raises(ValueError, match=rf"The plan was not made for this ResNet.*{advice}"):
        attach_multipliers(wrapped, plan)
