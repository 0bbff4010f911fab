"""torch.compile in several ways, before and after the Trainer gets a module: no multiplier too few or many."""

import copy
import itertools
from collections import Counter
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from helpers import architecture_runs
from helpers.architecture_runs import Trained, batches_like, built, fit, identical, loss_of
from helpers.architectures import ARCHITECTURES
from helpers.compilation import Counting
from helpers.trainers import loader
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from mlu_lightning import Plan, attach_multipliers, bake, fold, initialize
from mlu_lightning.callbacks import MLUCallback
from mlu_lightning.models import ResNet

RESNET = ARCHITECTURES["resnet"]
SHAPE, BASE = (3, 4, 32), (2, 2, 16)
BATCHES = batches_like(RESNET.example)

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def wrapper(module: Any, backend: Any) -> Any:
    return torch.compile(module, backend=backend)


def step(module: Trained, backend: Any) -> Any:
    vars(module)["training_step"] = torch.compile(module.training_step, backend=backend)
    return module


def inside(module: Any, backend: Any) -> Any:
    inner(module).compile(backend=backend)
    return module


def blocks(module: Any, backend: Any) -> Any:
    for block in inner(module).blocks:
        block.compile(backend=backend)
    return module


def inner(module: Any) -> Any:
    return module.module if isinstance(module, Trained) else module


class Compiles(Callback):  # after the Trainer and MLUCallback had the module
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


both = pytest.mark.parametrize("residual", ["hook", "fold"])
ALL = [(wrapper, "before"), *itertools.product((step, inside, blocks), ("before", "after"))]
QUICK = ((step, "after"), (blocks, "after"))
WAYS = [pytest.param(*way, marks=[] if way in QUICK else [pytest.mark.slow]) for way in ALL]


@both
@pytest.mark.parametrize(("how", "when"), WAYS)
def test_compiled_run_is_the_run(how: Any, when: str, residual: Any) -> None:
    plan = Plan.from_model(built(RESNET, SHAPE), BATCHES[0], base=built(RESNET, BASE, seed=1))
    assert {plan.forward_multiplier(multiplier) for multiplier in plan.multipliers} == {2 / 3, 1 / 2}
    plain = built(RESNET, SHAPE)
    fit(plain, BATCHES, MLUCallback(plan=plan, residual=residual))
    counting = Counting("eager")
    trained(how, when, counting)
    graphs, breaks = counting.counts()
    torch.compiler.reset()
    module = trained(how, when, counting, MLUCallback(plan=plan, residual=residual))
    assert module.losses == plain.losses and identical(module, plain)
    # torch runs the hooks of a module that is compiled by itself outside of its graph: here one graph for all of them
    assert counting.counts() == (graphs + (how is blocks and residual == "hook"), breaks)
    assert graphs > 0 and breaks == Counter()


class Regression(Trained):
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.module(batch[0]), batch[1])


@both
def test_part_that_the_module_compiles_itself_is_planned_with_a_base_that_does_too(residual: Any) -> None:
    counting = Counting("eager")
    plain, module, base = (Regression(built(RESNET, *shape).module) for shape in ((SHAPE,), (SHAPE,), (BASE, 1)))
    fit(plain, BATCHES, MLUCallback(copy.deepcopy(base), residual=residual))
    for each in (module, base):
        each._modules["module"] = torch.compile(each.module, backend=counting)  # as its constructor might
    fit(module, BATCHES, MLUCallback(base, residual=residual))
    assert counting.counts() == (1, Counter()) and module.losses == plain.losses


EXACT = {"rtol": 1e-14, "atol": 1e-16}
EXAMPLE = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double(), torch.ones(5, 2)


def resnet(depth: int = 3, seed: int = 0) -> ResNet:
    torch.manual_seed(seed)
    return ResNet(depth, hidden=8, embedding=4, inputs=3, outputs=2).double()


def by_hand(module: Any, multiplier: float) -> Tensor:
    stream = module.embed(EXAMPLE[0])
    for block in module.blocks:
        stream = stream + multiplier * block.write(block.activation(block.read(stream)))
    return torch.as_tensor(module.readout(stream))


@pytest.mark.parametrize("compiled", [wrapper, inside, blocks])
def test_no_multiplier_is_stale_after_a_compiled_call(compiled: Callable[..., Any]) -> None:
    module, x = resnet(), EXAMPLE[0]
    plan = Plan.from_model(module, EXAMPLE, base=resnet(2))
    initialize(module, plan)
    call = compiled(module, "eager")
    plain, scaled = by_hand(module, 1.0), by_hand(module, 2 / 3)
    assert not torch.allclose(plain, scaled)
    torch.testing.assert_close(call(x), plain, **EXACT)
    handle = attach_multipliers(call, plan)
    torch.testing.assert_close(call(x), scaled, **EXACT)
    handle.remove()
    torch.testing.assert_close(call(x), plain, **EXACT)
    for put in (attach_multipliers, fold, bake):  # hooks move into the weights
        put(call, plan)
        torch.testing.assert_close(call(x), scaled, **EXACT)
    torch.testing.assert_close(by_hand(module, 1.0), scaled, **EXACT)


@pytest.mark.parametrize("compiled", [wrapper, inside, blocks])
def test_modules_with_and_without_multipliers_do_not_take_each_others_code(compiled: Callable[..., Any]) -> None:
    plan = Plan.from_model(resnet(), EXAMPLE, base=resnet(2))
    hooked, again, baked, plain = (resnet(seed=seed) for seed in range(4))
    for module in (hooked, again, baked):
        attach_multipliers(module, plan)
    bake(baked, plan)  # its weights hold the multipliers, and it has no hooks
    expected = [(hooked, 2 / 3), (plain, 1.0), (baked, 1.0), (again, 2 / 3), (hooked, 2 / 3), (plain, 1.0)]
    calls = {module: compiled(module, "eager") for module, _ in expected}
    for module, multiplier in expected:
        torch.testing.assert_close(calls[module](EXAMPLE[0]), by_hand(module, multiplier), **EXACT)


class Adding(nn.Module):  # a block that adds its branch itself, so that the hook is inside of what is compiled
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, stream: Tensor) -> Tensor:
        return stream + torch.as_tensor(self.branch(stream))


class Towers(Trained):  # two depths in one module, of the same blocks
    def __init__(self, depth: int, other: int) -> None:
        torch.manual_seed(depth)
        super().__init__(nn.Linear(3, 4))
        self.blocks, self.others = (nn.Sequential(*(Adding() for _ in range(blocks))) for blocks in (depth, other))
        self.readouts = nn.ModuleList(nn.Linear(4, 2) for _ in range(2))

    def training_step(self, batch: Tensor) -> Tensor:
        streams = self.blocks(self.module(batch)), self.others(self.module(batch))
        return (self.readouts[0](streams[0]) * self.readouts[1](streams[1])).square().mean()


def test_part_without_a_multiplier_compiled_beside_one_that_has_it_in_a_run() -> None:
    """Where the factor is exactly 1 there is no hook."""
    plain, module, base = Towers(8, 2), Towers(8, 2), Towers(2, 2)
    batches = [EXAMPLE[0].float()] * architecture_runs.BATCHES
    callback = MLUCallback(copy.deepcopy(base), residual="hook")
    fit(plain, batches, callback)
    assert {callback.plan.forward_multiplier(multiplier) for multiplier in callback.plan.multipliers} == {1 / 4, 1}
    for block in (*module.blocks, *module.others):
        block.compile(backend="eager")
    fit(module, batches, MLUCallback(base, residual="hook"))
    assert module.losses == plain.losses


def test_module_is_validated_as_it_was_after_a_plain_one_of_its_class() -> None:
    module, plain = Trained(resnet().float()), Trained(resnet(seed=1).float())
    data = [tuple(part.float() for part in EXAMPLE)] * architecture_runs.BATCHES
    trainer = fit(wrapper(module, "eager"), data, MLUCallback(Trained(resnet(2).float()), residual="hook"))
    for each in (plain, module):
        trainer.validate(torch.compile(each, backend="eager"), loader(data), verbose=False)
    assert module.validated == [loss_of(module.module, data[0])] * architecture_runs.BATCHES
    assert plain.validated == [loss_of(plain.module, data[0])] * architecture_runs.BATCHES


def negated(module: Any, x: Tensor) -> Tensor:
    return -torch.as_tensor(type(module).forward(module, x))


def test_forward_that_was_put_into_modules_of_a_class_with_and_without_multipliers() -> None:
    plan = Plan.from_model(resnet(), EXAMPLE, base=resnet(2))
    assert {multiplier.site.module for multiplier in plan.multipliers if multiplier.site} >= {"blocks.0"}
    hooked, plain = resnet(), resnet()
    for module in (hooked, plain):
        for block in module.blocks:
            vars(block)["forward"] = MethodType(negated, block)
    handle = attach_multipliers(hooked, plan)
    for module, multiplier in ((plain, 1.0), (hooked, 2 / 3), (plain, 1.0)):
        call = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(call(EXAMPLE[0]), by_hand(module, -multiplier), **EXACT)
    handle.remove()
    torch.testing.assert_close(hooked(EXAMPLE[0]), by_hand(hooked, -1.0), **EXACT)
    assert all(vars(block)["forward"] == MethodType(negated, block) for block in hooked.blocks)


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
