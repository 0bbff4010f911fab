"""Training with Fabric: plan, multipliers and factors before and after ``fabric.setup``, against groups by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.trainers import identical
from lightning.fabric import Fabric
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mlu_lightning import Plan, attach_multipliers, initialize, scale_optimizer
from mlu_lightning.models import ResidualBlock
from mlu_lightning.utilities.names import original_module

X, Y = torch.linspace(-1, 1, 24).reshape(8, 3), torch.linspace(1, 0, 16).reshape(8, 2)


class Added(ResidualBlock):
    def forward(self, x: Any) -> Any:
        return x + super().forward(x)


def network(depth: int = 4, hidden: int = 32, embedding: int = 16) -> nn.Module:
    torch.manual_seed(0)
    blocks = (Added(hidden, embedding, "tanh") for _ in range(depth))
    return nn.Sequential(nn.Linear(3, embedding), *blocks, nn.Linear(embedding, 2))


def optimizer(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.01, eps=1e-4, weight_decay=0.1)


def trained(module: nn.Module, optimizer: Any, backward: Callable[[Any], Any]) -> None:
    for _ in range(4):
        optimizer.zero_grad()
        backward(nn.functional.mse_loss(module(X), Y))
        optimizer.step()


def by_hand() -> nn.Module:
    module = network()
    plan = Plan.from_model(module, X, base=network(2, 8, 4))
    attach_multipliers(initialize(module, plan), plan)
    groups = [
        {"params": [p], "lr": 0.01 * s.lr, "eps": 1e-4 * s.eps, "weight_decay": 0.1 * s.weight_decay}
        for p, s in ((p, plan.scales("adamw")[name]) for name, p in module.named_parameters())
    ]
    trained(module, optimizer(groups), lambda loss: loss.backward())
    return module


@pytest.mark.parametrize("set_up", ["before", "between", "after"])
def test_run_is_that_with_groups_by_hand(set_up: str) -> None:
    fabric, module, base = Fabric(accelerator="cpu", devices=1), network(), network(2, 8, 4)
    whole: Any = module
    inner: Any = optimizer(module.parameters())
    if set_up == "before":
        whole, inner = fabric.setup(module, inner)
    plan = Plan.from_model(whole, X, base=base)
    attach_multipliers(initialize(whole, plan), plan)
    if set_up == "between":
        whole, inner = fabric.setup(module, inner)
    scale_optimizer(inner, whole, plan)
    if set_up == "after":
        whole, inner = fabric.setup(module, inner)
    trained(whole, inner, fabric.backward)
    assert identical(module, by_hand())


def test_the_module_inside_of_wrappers() -> None:
    module = network()
    wrapped = Fabric(accelerator="cpu", devices=1).setup(torch.compile(module))
    assert original_module(wrapped) is module
    distributed = DistributedDataParallel.__new__(DistributedDataParallel)  # without processes
    nn.Module.__init__(distributed)
    distributed.module = module
    assert original_module(distributed) is module
