"""Optimizers with their numbers, and what these are for one row of the table, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn, optim

from helpers.parameter_groups import ADAM_LR, EPS, MATRICES, MUON_EPS, MUON_LR, SGD_LR, SHAPES, STD, Numbers


@dataclass(frozen=True)
class Row:  # factors of one parameter: a line of theory.md, section 3, at some ratios
    adam: float  # of the learning rate, as are sgd and muon
    sgd: float
    eps: float  # of Adam
    std: float
    muon: float = math.nan
    muon_eps: float = math.nan
    shape: tuple[int, ...] = ()  # of the stored parameter, and base: at the base, for Muon
    base: tuple[int, ...] = ()

    def folded(self, a: float) -> Row:
        """For a weight that holds the multiplier a: std·a, Adam and Muon lr·a, SGD lr·a², eps/a."""
        times = {name: getattr(self, name) * a for name in ("adam", "std", "muon")}
        return replace(self, **times, sgd=self.sgd * a**2, eps=self.eps / a, muon_eps=self.muon_eps / a)


def _row(name: str) -> Row:
    muon = MUON_LR.get(name, math.nan), MUON_EPS.get(name, math.nan)
    return Row(ADAM_LR[name], SGD_LR[name], EPS[name], STD[name], *muon, SHAPES[name], (2, 2))


ROWS = {name: _row(name) for name in SHAPES}

# A group's numbers for a parameter of a row at a step, from the user's
ByHand = Callable[[Numbers, Row, int], Numbers]


def _times(factors: Callable[[Row, int], dict[str, float]]) -> ByHand:
    def by_hand(numbers: Numbers, row: Row, step: int) -> Numbers:
        return {**numbers, **{name: numbers[name] * factor for name, factor in factors(row, step).items()}}

    return by_hand


def _radam_lr(row: Row, step: int) -> float:
    """With beta2 = 0.999 the first five steps are plain gradient steps."""
    return row.sgd if step < 5 else row.adam


sgd = _times(lambda row, _: {"lr": row.sgd, "weight_decay": 1 / row.sgd})
adam = _times(lambda row, _: {"lr": row.adam, "eps": row.eps, "weight_decay": 1 / row.sgd})
adamw = _times(lambda row, _: {"lr": row.adam, "eps": row.eps, "weight_decay": 1 / row.adam})
asgd = _times(lambda row, _: {"lr": row.sgd, "weight_decay": 1 / row.sgd, "lambd": 1 / row.sgd})
radam = _times(lambda row, step: {"lr": _radam_lr(row, step), "eps": row.eps, "weight_decay": 1 / row.sgd})
radamw = _times(lambda row, s: {"lr": _radam_lr(row, s), "eps": row.eps, "weight_decay": 1 / _radam_lr(row, s)})
sparse = _times(lambda row, _: {"lr": row.adam, "eps": row.eps})
adadelta = _times(lambda row, _: {"lr": row.sgd, "eps": row.eps**2, "weight_decay": 1 / row.sgd})


def rprop(numbers: Numbers, row: Row, step: int) -> Numbers:
    sizes = tuple(size * row.adam for size in numbers["step_sizes"])
    return {**numbers, "lr": numbers["lr"] * row.adam, "step_sizes": sizes}


def adafactor(numbers: Numbers, row: Row, step: int) -> Numbers:
    factor = row.adam / row.std
    first, second = numbers["eps"]
    first = torch.finfo(torch.float32).eps if first is None else first
    lr = min(numbers["lr"], (step + 1) ** -0.5) * factor if factor != 1 else numbers["lr"]
    decay = numbers["weight_decay"] * (numbers["lr"] / lr) if lr else 0  # a schedule that has ended
    return {**numbers, "lr": lr, "eps": (first * row.eps**2, second * row.std), "weight_decay": decay}


def muon(numbers: Numbers, row: Row, step: int) -> Numbers:
    """Without the factor of the shape that torch has of its own: with fan_in and fan_out of base and module, by hand."""
    (rows, columns), (base_rows, base_columns) = row.shape, row.base
    if numbers["adjust_lr_fn"] == "match_rms_adamw":
        own = max(rows, columns) ** 0.5 / max(base_rows, base_columns) ** 0.5
    else:
        own = max(1, rows / columns) ** 0.5 / max(1, base_rows / base_columns) ** 0.5
    scaled = {"lr": numbers["lr"] * (row.muon / own), "eps": numbers["eps"] * row.muon_eps}
    return {**numbers, **scaled, "weight_decay": numbers["weight_decay"] * (own / row.muon)}


class Averaging(optim.SGD):  # keeps numbers in its groups, as schedule-free optimizers do
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group.update(k=0, lr_max=0.0, weight_sum=0.0)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            group["k"] += 1
            group["lr_max"] = max(group["lr_max"], group["lr"])
            group["weight_sum"] += group["lr_max"] ** 2
            group["lr"] = group["lr"] * 0.5
            for parameter in group["params"]:
                rate = group["lr_max"] ** 2 / group["weight_sum"] * group["lr"] + group["lr_max"] / 8
                parameter.data.sub_(parameter.grad, alpha=rate)
        return loss


class RenamedAdamW(optim.AdamW):
    """Inherits the step."""


class OwnAdam(optim.Adam):  # has a step of its own
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        return super().step(closure)


class OwnMuon(optim.Muon):  # has a step of its own, without a factor of the shape
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        return None


class Combined(optim.Optimizer):
    """Muon for its first group, by an exact polar factor, and AdamW for the other: as many training scripts have it."""

    def __init__(self, muon: list[Numbers], adamw: list[Numbers]) -> None:
        groups = [{"use_muon": True, "eps": 1e-7, **group} for group in muon]
        super().__init__([*groups, *({"use_muon": False, "eps": 1e-8, **group} for group in adamw)], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                first = state.setdefault("first", torch.zeros_like(parameter)).lerp_(parameter.grad, 0.1)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                if group["use_muon"]:
                    left, _, right = torch.linalg.svd(first, full_matrices=False)
                    parameter.sub_(left @ right, alpha=group["lr"])
                    continue
                second = state.setdefault("second", torch.zeros_like(parameter)).lerp_(parameter.grad.square(), 0.05)
                root = (second / (1 - 0.95 ** state["step"])).sqrt()
                parameter.sub_(first / (1 - 0.9 ** state["step"]) / (root + group["eps"]), alpha=group["lr"])


@dataclass(frozen=True)
class Case:
    make: Callable[..., optim.Optimizer]
    by_hand: ByHand
    numbers: Numbers = field(default_factory=dict)
    names: tuple[str, ...] = tuple(SHAPES)
    sparse: bool = False

    def optimizer(self, module: nn.Module) -> optim.Optimizer:
        return self.make(module.parameters(), **self.numbers)


CASES = {
    "sgd": Case(optim.SGD, sgd, {"lr": 0.1, "weight_decay": 0.1}),
    "sgd-nesterov": Case(optim.SGD, sgd, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "sgd-dampening": Case(optim.SGD, sgd, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True}),
    "sgd-foreach": Case(optim.SGD, sgd, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "foreach": True}),
    "sgd-fused": Case(optim.SGD, sgd, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "fused": True}),
    "sgd-tensor": Case(optim.SGD, sgd, {"lr": torch.tensor(0.1), "momentum": 0.9, "weight_decay": 0.1}),
    "asgd": Case(optim.ASGD, asgd, {"lr": 0.1, "lambd": 0.01, "t0": 3, "weight_decay": 0.1}),
    "asgd-foreach": Case(optim.ASGD, asgd, {"lr": 0.1, "lambd": 0.01, "foreach": True}),
    "adam": Case(optim.Adam, adam, {"lr": 0.1, "eps": 0.01, "weight_decay": 0.1}),
    "adam-amsgrad": Case(optim.Adam, adam, {"lr": 0.1, "eps": 0.01, "amsgrad": True, "maximize": True}),
    "adam-foreach": Case(optim.Adam, adam, {"lr": 0.1, "eps": 0.01, "weight_decay": 0.1, "foreach": True}),
    "adam-fused": Case(optim.Adam, adam, {"lr": 0.1, "eps": 0.01, "weight_decay": 0.1, "fused": True}),
    "adam-decoupled": Case(optim.Adam, adamw, {"eps": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adamw": Case(optim.AdamW, adamw, {"lr": 0.1, "eps": 0.01}),
    "adamw-foreach": Case(optim.AdamW, adamw, {"lr": 0.1, "eps": 0.01, "foreach": True}),
    "adamw-fused": Case(optim.AdamW, adamw, {"lr": 0.1, "eps": 0.01, "fused": True, "amsgrad": True}),
    "adamw-tensor": Case(optim.AdamW, adamw, {"lr": torch.tensor(0.1), "eps": 0.01, "weight_decay": 0.1}),
    "adamw-tensor-fused": Case(optim.AdamW, adamw, {"lr": torch.tensor([0.1]), "eps": 0.01, "fused": True}),
    "nadam": Case(optim.NAdam, adam, {"lr": 0.1, "eps": 0.01, "weight_decay": 0.1}),
    "nadam-decoupled": Case(optim.NAdam, adamw, {"eps": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "radam": Case(optim.RAdam, radam, {"lr": 0.1, "eps": 0.01, "weight_decay": 0.1}),
    "radam-foreach": Case(optim.RAdam, radam, {"lr": 0.1, "eps": 0.01, "foreach": True}),
    "radam-decoupled": Case(optim.RAdam, radamw, {"eps": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adamax": Case(optim.Adamax, adam, {"lr": 0.1, "eps": 0.01, "weight_decay": 0.1}),
    "rmsprop": Case(optim.RMSprop, adam, {"lr": 0.1, "eps": 0.01, "weight_decay": 0.1, "momentum": 0.9}),
    "rmsprop-centered": Case(optim.RMSprop, adam, {"lr": 0.1, "eps": 0.01, "centered": True, "foreach": True}),
    "adagrad": Case(optim.Adagrad, adam, {"lr": 0.1, "eps": 0.01, "weight_decay": 0.1, "lr_decay": 0.1}),
    "adagrad-fused": Case(optim.Adagrad, adam, {"lr": 0.1, "eps": 0.01, "fused": True}),
    "adadelta": Case(optim.Adadelta, adadelta, {"lr": 0.5, "eps": 0.01, "weight_decay": 0.1}),
    "rprop": Case(optim.Rprop, rprop, {"lr": 0.1, "step_sizes": (0.08, 0.13)}),
    "sparse-adam": Case(optim.SparseAdam, sparse, {"lr": 0.1, "eps": 0.01}, sparse=True),
    "adafactor": Case(optim.Adafactor, adafactor, {"lr": 0.1, "weight_decay": 0.1}),
    "adafactor-eps": Case(optim.Adafactor, adafactor, {"lr": 0.1, "eps": (2.0, 4.0), "foreach": True}),
    "adafactor-capped": Case(optim.Adafactor, adafactor, {"lr": 0.4, "weight_decay": 0.1}),
    "muon": Case(optim.Muon, muon, {"lr": 0.1}, names=MATRICES),
    "muon-rms": Case(optim.Muon, muon, {"lr": 0.1, "adjust_lr_fn": "match_rms_adamw"}, names=MATRICES),
    "muon-eps": Case(optim.Muon, muon, {"lr": 0.1, "eps": 100.0, "nesterov": False}, names=MATRICES),
}
