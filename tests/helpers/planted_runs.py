"""Runs in which a fault is planted, where they stop, and whether they end as the run that is meant."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn, optim

from helpers.faulty_runs import PROBE, At
from helpers.runs_by_hand import BASE, Net, fit
from mlu_lightning import MLUCallback, Plan

NUMBERS = {"lr": 0.02, "eps": 1e-3, "weight_decay": 0.1}
STEPS = 3
WARNINGS = ("Parameters of the plan", "Parameters are trained", "Weights ", "Gradients ")


class Module(Net):
    """Trains with AdamW as its optimizer, or by hand."""

    def __init__(self, step: Callable[[Any, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.step, self.direct, self.automatic_optimization = step, False, step is None

    def training_step(self, batch: list[Tensor]) -> Any:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        if self.step is not None:
            self.zero_grad()
            self.step(self, loss)
        return loss

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embed(x)
        for block in self.blocks:
            stream = stream + (block.forward(stream) if self.direct else block(stream))
        return self.readout(stream)

    def configure_optimizers(self) -> Any:
        return optim.AdamW(self.parameters(), **NUMBERS)


@dataclass
class Run:
    """What is given to ``fit``."""

    module: Module
    before: list[Callback]  # MLUCallback
    after: list[Callback]
    settings: dict[str, Any]  # of MLUCallback


def run(step: Any = None, optimizer: Any = ..., **settings: Any) -> Run:
    """A run without a fault, in which an optimizer may be configured that is not AdamW."""
    module = Module(step)
    if optimizer is not ...:
        vars(module)["configure_optimizers"] = lambda: optimizer and optimizer(module)
    return Run(module, [], [], settings)


def at(hook: str, do: Callable[[Module], Any], number: int = 0, *args: Any, **settings: Any) -> Callable[[], Run]:
    """Something is done in a hook of a callback, when so many steps were made."""

    def plant() -> Run:
        planted = run(*args, **settings)
        planted.after.append(At(hook, lambda _, module: do(module), number))
        return planted

    return plant


@dataclass(frozen=True)
class Fault:
    """What is lost, how it is planted, where it stops, None if it does no harm, and the beginning of the message."""

    loses: str
    plant: Callable[[], Run]
    stops: str | None
    words: str = ""


@cache
def plan() -> Plan:
    with isolate_rng():
        return Plan.from_model(Net(), PROBE, base=Net(BASE))


def outcome(plant: Callable[[], Run]) -> tuple[str | None, str, Module]:
    """Where a run stops, with which message, and the module as it is then."""
    planted, reached, said = plant(), ["planning"], [""]

    def reach(hook: str, place: str) -> Callback:
        return At(hook, lambda trainer, module: reached.append(place), 0)

    class Steps(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            reached.append("first step" if batch_idx == 0 else "second step")

    settings = {"plan": plan(), "residual": "hook", **planted.settings}
    callbacks = [reach("on_fit_start", "start"), *planted.before, MLUCallback(**settings), *planted.after, Steps()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit(planted.module, *callbacks, max_epochs=1, limit_train_batches=STEPS, limit_val_batches=0)
        except (AttributeError, ValueError, TypeError, RuntimeError) as error:
            return reached[-1], str(error), planted.module
    said += [str(each.message) for each in caught if str(each.message).startswith(WARNINGS)]
    return None, said[-1], planted.module


@cache
def right() -> Module:
    """The run that is meant."""
    where, message, module = outcome(run)
    assert (where, message) == (None, "")
    return module


def is_right(module: Module) -> bool:
    """Whether a run has ended where the run that is meant has."""
    return all(
        torch.allclose(one, other, rtol=1e-4, atol=1e-6)
        for one, other in zip(module.parameters(), right().parameters(), strict=True)
    )
