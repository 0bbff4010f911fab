"""First steps of a loop without Lightning: faults stop it by the second step, and a right one goes on without a word."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.planted_optimizers import ByHand
from helpers.planted_runs import NUMBERS, plan
from helpers.runs_by_hand import Net
from torch import nn, optim

from mlu_lightning import attach_multipliers, initialize, scale_optimizer
from mlu_lightning.application import verify_steps

X, Y = torch.linspace(-1, 1, 24).reshape(8, 3), torch.linspace(1, 0, 16).reshape(8, 2)


def loop(forward: Callable[[Any], Any] | None = None, after: Any = None, own: Any = None, family: Any = None) -> None:
    module = initialize(Net(), plan())
    attach_multipliers(module, plan())
    optimizer = optim.AdamW(module.parameters(), **NUMBERS) if own is None else own(module)
    verify_steps(module, plan(), scale_optimizer(optimizer, module, plan(), family))
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.mse_loss(module(X) if forward is None else forward(module), Y).backward()
        optimizer.step()
        if after is not None:
            after(module)


def direct(module: Any) -> Any:
    stream = module.embed(X)
    for block in module.blocks:
        stream = stream + block.forward(stream)
    return module.readout(stream)


def all_but_readout(module: Any) -> Any:
    return optim.AdamW([p for name, p in module.named_parameters() if "readout" not in name], **NUMBERS)


def descend(module: Any) -> None:
    module.readout.weight.data -= 0.01 * module.readout.weight.grad


FAULTS = [
    ({"forward": direct}, "multiplier of the branch 'blocks.0' was not seen"),
    ({"own": all_but_readout, "after": descend}, "Weights have moved in the first steps.* readout.weight"),
    ({"own": lambda m: ByHand(m.parameters(), "lr", **NUMBERS), "family": "adamw"}, "a number of its own for lr"),
]


@pytest.mark.parametrize(("settings", "message"), FAULTS)
def test_faults_stop_a_loop(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loop(**settings)


def test_a_right_loop_goes_on_and_changes_afterwards_are_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop()
    with pytest.warns(UserWarning, match="Weights were changed after their first update"):
        loop(after=lambda module: module.readout.weight.data.mul_(0.9))
