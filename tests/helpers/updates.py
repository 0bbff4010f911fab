"""Updates of bare weights by optimizers, whose gradients depend on the number of the step."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from torch import nn, optim

from helpers.parameter_groups import Numbers, Weights, groups_in_update, numbers_in_update, plan_of
from mlu_lightning import scale_optimizer


def train(steps: Iterable[int], *pairs: tuple[Weights, optim.Optimizer], sparse: bool = False) -> None:
    for step in steps:
        for module, optimizer in pairs:
            module.load_gradients(step, sparse)
            optimizer.step()


def scale(optimizer: optim.Optimizer, module: nn.Module, plan: Any = None, family: Any = None) -> optim.Optimizer:
    scale_optimizer(optimizer, module, plan_of(module) if plan is None else plan, family)
    return optimizer


def refused(
    message: str, optimizer: Any, module: Any, plan: Any = None, family: Any = None, error: Any = ValueError
) -> None:
    with pytest.raises(error, match=message):
        scale(optimizer, module, plan, family)


def update(module: Weights, optimizer: optim.Optimizer, key: str = "lr") -> Numbers:
    seen = groups_in_update(optimizer)
    train([0], (module, optimizer))
    return numbers_in_update(module, seen[-1], key)


def groups_of(module: nn.Module, numbers: Callable[[str], Numbers], *names: str) -> list[dict[str, Any]]:
    parameters = dict(module.named_parameters())
    return [{"params": [parameters[name]], **numbers(name)} for name in names or parameters]
