"""Steps that use what Lightning has made by then, gradients of inputs, or odd batches: planned as the plain step is."""

from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from helpers.residual_networks import Block
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from mlu_lightning import Role, discover

INPUTS, TARGETS = torch.ones(2, 3), torch.ones(2, 2)


class Step(LightningModule):
    """A network with two branches; subclasses differ in how the step uses it, not in what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.readout = nn.Linear(3, 8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.readout(x)

    def loss(self, x: Tensor) -> Tensor:
        return mse_loss(self(x), TARGETS)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)


class EnergyAndForce(Step):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch.requires_grad = True
        energy = self(batch)
        energy.sum().backward(create_graph=True)
        return energy.square().mean() + batch.grad.square().mean()


class ForwardForMetric(Step):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self(batch)
        with torch.no_grad():
            self(batch)
        return self.loss(batch)


class MadeByHooks(Step):
    def on_fit_start(self) -> None:
        self.scale = torch.tensor(2.0)

    def on_train_epoch_start(self) -> None:
        self.seen: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch_idx)
        return self.scale * self.loss(batch)


class Iterating(Step):
    def training_step(self, dataloader_iter: Iterator[Any]) -> Any:  # type: ignore[override]  # Lightning's other flavor
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


class Popping(Step):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch.pop("x"))


@dataclass(frozen=True, slots=True)
class Slotted:
    x: Tensor


class OfDataclass(Step):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch.x)


class Closures(Step):
    """Blocks are called through a lambda, a default, a partial of a closure, and a list of closures."""

    def __init__(self) -> None:
        super().__init__()
        first, second = self.blocks
        self.one = lambda x: x + first(x)
        self.rest = [partial(lambda x, block=second: x + block(x))]

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.rest[0](self.one(self.embed(x))))


class Short(Step):
    """A step that is a function of it, a batch and its number."""

    def __init__(self, run: Callable[[Any, Any, int], Any]) -> None:
        super().__init__()
        self.run = run

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.run(self, batch, batch_idx)


def inner_step(step: Step, x: Tensor, _: int) -> Any:
    weights = dict(step.named_parameters())
    first = torch.autograd.grad(step.loss(x), [*weights.values()], create_graph=True)
    second = {n: w - 0.1 * g for (n, w), g in zip(weights.items(), first, strict=True)}
    return mse_loss(torch.func.functional_call(step, second, (x,)), TARGETS)


def through_gradient(step: Step, x: Tensor, _: int) -> Any:
    x.requires_grad_()
    step(x).sum().backward()
    return step.loss(x.detach() + x.grad.sign())  # type: ignore[union-attr]  # there is one now


SHORT: dict[str, Callable[[Any, Any, int], Any]] = {
    "jvp": lambda step, x, _: sum(part.square().mean() for part in torch.func.jvp(step, (x,), (x,))),
    "jacobian": lambda step, x, _: torch.func.vmap(torch.func.jacrev(step))(x).square().mean(),
    "hessian": lambda step, x, _: torch.func.vmap(torch.func.hessian(lambda y: step(y).sum()))(x).square().mean(),
    "force": lambda step, x, _: torch.autograd.grad(step(x).sum(), x, create_graph=True)[0].square().mean(),
    "inner step": inner_step,
    "gradient of the batch": through_gradient,
    "every fifth batch": lambda step, x, number: step.loss(x) if number % 5 == 4 else None,
    "in turns": lambda step, x, number: step.loss(x) if number % 2 else step.embed(x).square().mean(),
}


@pytest.mark.parametrize("name", SHORT)
def test_roles_are_those_of_the_network(name: str) -> None:
    structure, plain = discover(Short(SHORT[name]), INPUTS), discover(Step(), INPUTS)
    assert structure.roles == plain.roles and structure.depth == 2


STEPS: dict[type[Step], Any] = dict.fromkeys(
    (EnergyAndForce, ForwardForMetric, MadeByHooks, Iterating, Closures), INPUTS
) | {Popping: UserDict(x=INPUTS), OfDataclass: Slotted(INPUTS)}


@pytest.mark.parametrize("cls", STEPS)
def test_structure_is_that_of_the_network(cls: type[Step]) -> None:
    structure, plain = discover(cls(), STEPS[cls]), discover(Step(), INPUTS)
    assert structure.roles == plain.roles
    assert (structure.depth, structure.branches) == (2, plain.branches)
    assert structure.roles["blocks.1.read.weight"] is Role.BRANCH_IN


def test_the_batch_and_the_module_stay_as_they_are() -> None:
    batch, module = UserDict(x=INPUTS), MadeByHooks()
    discover(Popping(), batch)
    discover(module, INPUTS)
    discover(EnergyAndForce(), INPUTS)
    assert batch["x"] is INPUTS and not INPUTS.requires_grad and INPUTS.grad is None
    assert not hasattr(module, "scale") and module.blocks[0].read.weight.grad is None


def test_closures_mean_the_original_afterwards() -> None:
    module = Closures()
    discover(module, INPUTS)
    with torch.no_grad():
        module.blocks[0].write.bias += 1
    assert torch.equal(module.one(INPUTS.new_zeros(1, 8)), module.blocks[0](INPUTS.new_zeros(1, 8)))


def test_a_step_that_gives_nothing_says_what_to_do() -> None:
    class Skipping(Step):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    with pytest.raises(RuntimeError, match=r"Skipping gave nothing that depends on its parameters.*example=.*plan="):
        discover(Skipping(), INPUTS)
