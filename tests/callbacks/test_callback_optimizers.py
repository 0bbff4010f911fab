"""Optimizers in the Trainer, on a Transformer: MLUCallback's run is that of a module and parameter groups by hand."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from helpers import optimizers_by_hand as optimizers
from helpers.architecture_runs import fit, identical
from helpers.optimizers_by_hand import Row
from helpers.parameter_groups import MULTIPLIERS, D, L, M, Numbers
from helpers.runs_by_hand import Start
from torch import Tensor, nn, optim
from torch.nn import functional as F

from mlu_lightning import MLUCallback
from mlu_lightning.models import CausalTransformer

# The shape is L, D and M times the base's in depth, embedding and hidden width
BASE = {"depth": 1, "embedding": 16, "heads": 1}
SHAPE = {"depth": 2, "embedding": 64, "heads": 16}
Residual = Literal["hook", "fold"]


class Lion(optim.Optimizer):
    """The optimizer of Chen et al., arXiv 2302.06675, algorithm 2: the sign of an interpolation, decoupled decay."""

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                update = torch.sign(beta1 * mean + (1 - beta1) * parameter.grad) + group["weight_decay"] * parameter
                parameter.sub_(group["lr"] * update)
                mean.mul_(beta2).add_(parameter.grad, alpha=1 - beta2)
        return loss


def lion(numbers: Numbers, row: Row, step: int) -> Numbers:
    return {**numbers, "lr": numbers["lr"] * row.adam, "weight_decay": numbers["weight_decay"] / row.adam}


# Of theory.md, section 3; the norm on the stream is a row that the table for bare weights does not have
ROWS = optimizers.ROWS | {"stream_norm": Row(adam=1, sgd=D, eps=1 / D, std=1)}
BASES = {"branch_in": (M, D), "branch_out": (D, M)}
ROLES = {"tokens": "embedding", "out": "branch_out", "write": "branch_out", "readout": "readout"}
ROLES |= dict.fromkeys(("query", "key", "value", "read"), "branch_in")


def role_of(name: str) -> str:
    layer = name.split(".")[-2]
    return ROLES[layer] if layer != "norm" else "norm" if name.startswith("branches") else "stream_norm"


@dataclass(frozen=True)
class Case:  # an optimizer of some of the parameters, the numbers of the base, and those of a row of the table
    make: Callable[..., optim.Optimizer]
    numbers: Numbers
    by_hand: optimizers.ByHand


ADAMW = Case(optim.AdamW, {"lr": 0.01, "eps": 1e-5, "weight_decay": 0.1}, optimizers.adamw)
MUON = {"lr": 0.02, "weight_decay": 0.1, "eps": 0.01}
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
RUNS = {
    "lion": (Case(Lion, {"lr": 0.003, "weight_decay": 0.1}, lion),),
    "sgd-momentum": (Case(optim.SGD, SGD, optimizers.sgd),),
    "sgd-nesterov": (Case(optim.SGD, {**SGD, "nesterov": True}, optimizers.sgd),),
    "adafactor": (Case(optim.Adafactor, {"lr": 0.01, "eps": (1e-5, 0.1), "weight_decay": 0.1}, optimizers.adafactor),),
    "muon": (Case(optim.Muon, {**MUON, "adjust_lr_fn": "original"}, optimizers.muon), ADAMW),
    "muon-rms": (Case(optim.Muon, {**MUON, "adjust_lr_fn": "match_rms_adamw"}, optimizers.muon), ADAMW),
}


class Language(CausalTransformer):
    """With one optimizer, or with Muon for the matrices of branches and AdamW for the rest; it keeps its losses."""

    def __init__(self, cases: tuple[Case, ...], **shape: int) -> None:
        super().__init__(50, 8, head_dim=8, **shape)
        self.cases = cases
        self.losses: list[float] = []
        self.automatic_optimization = len(cases) == 1

    def parameters_of(self, case: Case) -> dict[str, nn.Parameter]:
        everything = dict(self.named_parameters())
        if len(self.cases) == 1:
            return everything
        inner = {name: p for name, p in everything.items() if name.startswith("branches") and p.ndim == 2}
        return inner if case.make is optim.Muon else {n: p for n, p in everything.items() if n not in inner}

    def training_step(self, batch: Tensor) -> Tensor:
        loss = F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.losses.append(float(loss.detach()))
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def configure_optimizers(self) -> list[optim.Optimizer]:
        return [case.make(self.parameters_of(case).values(), **case.numbers) for case in self.cases]


class ByHand(Language):
    """With the numbers of every parameter written into a group of its own, and its multipliers in the source."""

    def __init__(self, cases: tuple[Case, ...], residual: Residual) -> None:
        super().__init__(cases, **SHAPE)
        self.residual = residual

    def forward(self, tokens: Tensor) -> Tensor:
        branch, readout = (1 / L, 1 / D) if self.residual == "hook" else (1, 1)
        stream = self.tokens(tokens)
        for block in self.branches:
            stream = stream + branch * block(stream)
        return readout * self.readout(self.norm(stream))

    def configure_optimizers(self) -> list[optim.Optimizer]:
        return [
            case.make([self.group(case, name, parameter) for name, parameter in self.parameters_of(case).items()])
            for case in self.cases
        ]

    def group(self, case: Case, name: str, parameter: nn.Parameter) -> Numbers:
        role, shape = role_of(name), tuple(parameter.shape)
        base = tuple(size / ratio for size, ratio in zip(shape, BASES.get(role, ()), strict=False))
        row = replace(ROWS[role], shape=shape, base=base)
        if self.residual == "fold":
            row = row.folded(MULTIPLIERS.get(role, 1.0))
        return {"params": [parameter], **case.by_hand(case.numbers, row, 0)}


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(50, (4, 9), generator=generator) for _ in range(3)]


@pytest.mark.parametrize("residual", ["hook", "fold"])
@pytest.mark.parametrize("cases", RUNS.values(), ids=RUNS)
def test_run_is_that_of_numbers_by_hand(cases: tuple[Case, ...], residual: Residual) -> None:
    """Losses and weights, bit for bit: ratios are powers of two."""
    torch.manual_seed(0)
    ours, theirs, start = Language(cases, **SHAPE), ByHand(cases, residual), Start()
    family = "adamw" if cases[0].make is Lion else None
    fit(ours, batches(), MLUCallback(Language(cases, **BASE), residual=residual, family=family), start)
    theirs.load_state_dict(start.weights)
    fit(theirs, batches())
    assert ours.losses == theirs.losses
    assert len(ours.losses) == 6
    assert identical(ours, theirs)
    assert not any(torch.equal(value, start.weights[name]) for name, value in ours.named_parameters())
