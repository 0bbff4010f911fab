"""Modules of bare weights, their plan, and the rows of the table written out: what optimizers are tried on."""

from typing import Any

import torch
from torch import nn, optim

from helpers.plans import entry
from helpers.trainers import identical as identical
from mlu_lightning import Plan, scale_optimizer
from mlu_lightning.table import Ratios, Role

Numbers = dict[str, Any]

# Ratios to the base. Powers of two, so that every factor is exact; m/d is a square, for Muon.
L, D, M = 2.0, 4.0, 16.0

ROLES = {
    "embedding": (Role.EMBEDDING, Ratios(outputs=D)),
    "branch_in": (Role.BRANCH_IN, Ratios(L, D, M)),
    "branch_out": (Role.BRANCH_OUT, Ratios(L, M, D)),
    "norm": (Role.BRANCH_NORM, Ratios(L, outputs=D)),
    "readout": (Role.READOUT, Ratios(inputs=D)),
}
SHAPES = {"embedding": (6, 8), "branch_in": (32, 8), "branch_out": (8, 32), "norm": (8,), "readout": (5, 8)}
MATRICES = ("branch_in", "branch_out")

# The rows of theory.md, section 3, written out.
ADAM_LR = {"embedding": 1, "branch_in": 1 / D, "branch_out": 1 / M, "norm": 1, "readout": 1}
EPS = {"embedding": 1 / D, "branch_in": 1 / (L * M), "branch_out": 1 / (L * D), "norm": 1 / (L * D), "readout": 1 / D}
SGD_LR = {"embedding": D, "branch_in": L * M / D, "branch_out": L * D / M, "norm": L * D, "readout": D}
STD = {"embedding": 1, "branch_in": D**-0.5, "branch_out": D**0.5 / M, "norm": 1, "readout": 1}
MUON_LR = {"branch_in": (M / D) ** 0.5, "branch_out": (D / M) ** 0.5}
MUON_EPS = {name: EPS[name] * (M * D) ** 0.5 for name in MATRICES}
MULTIPLIERS = {"branch_out": 1 / L, "readout": 1 / D}


class Weights(nn.Module):  # parameters alone: gradients are written into them
    def __init__(self, names: tuple[str, ...] = tuple(SHAPES), dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in names:
            values = torch.randn(SHAPES[name], generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(values))

    def load_gradients(self, step: int, sparse: bool = False) -> None:
        generator = torch.Generator().manual_seed(step + 1)
        for parameter in self.parameters():
            gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.grad = gradient.to_sparse(1) if sparse else gradient


def plan_of(module: nn.Module, identity: bool = False) -> Plan:
    parameters = {}
    for name, value in module.named_parameters():
        role, ratios = ROLES[name]
        base: tuple[int, ...] = tuple(value.shape)
        if identity:
            ratios = Ratios()
        elif name in MATRICES:
            base = (2, 2)
        parameters[name] = entry(role, tuple(value.shape), ratios, base_shape=base)
    return Plan(parameters, (), (), ())


def groups_in_update(optimizer: optim.Optimizer) -> list[list[Numbers]]:
    """A list that gets the groups of every update that follows: step hooks run in the update."""
    seen: list[list[Numbers]] = []
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append([{**g} for g in opt.param_groups]))
    return seen


def numbers_in_update(module: nn.Module, groups: list[Numbers], key: str) -> Numbers:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(parameter)]: group[key] for group in groups for parameter in group["params"]}


def scaled(make: Any = optim.SGD, *names: str, family: str | None = None, **numbers: Any) -> tuple[Weights, Any, Any]:
    """Weights with a scaled optimizer, at a learning rate of 0.1 unless another is given, and the groups of its updates."""
    module = Weights(names or tuple(SHAPES))
    optimizer = make(module.parameters(), **{"lr": 0.1, **numbers})
    seen = groups_in_update(optimizer)
    scale_optimizer(optimizer, module, plan_of(module), family)
    return module, optimizer, seen
