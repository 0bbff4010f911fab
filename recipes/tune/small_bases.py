"""Why a wider model may be no better than its base: a tied GPT, of which one thing at a time is changed.

Its weights are drawn at 0.02, its readout is its token table, and it has learned positions, as nanoGPT has. For each
change the learning rate is chosen at the base, and the base and four times its widths are trained there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from mlu_lightning import Plan
from mlu_lightning.tuning.found import Estimate
from mlu_lightning.tuning.training import Training
from mlu_lightning.utilities.fitted_tables import number_table
from recipes.common.studies import ResultFile
from recipes.common.text import Text
from recipes.lr_transfer.runs import ScheduledTransformer
from recipes.tune.runs import Run, curve_of

CONTEXT, SEEDS = 32, 3
SHAPES = {"base": 1, "4 × widths": 4}
EXPONENTS = (-7, -6, -5, -4)


class TiedGPT(ScheduledTransformer):
    """A Transformer with learned positions and weights from N(0, std²), whose readout is its token table if ``tied``."""

    def __init__(self, tied: bool = True, std: float = 0.02, context: int = CONTEXT, **sizes: Any) -> None:
        super().__init__(context=context, **sizes)
        self.positions = nn.Embedding(context, sizes["embedding"])
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
        if tied:
            self.readout.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids ``[samples, length]`` to logits of the next token ``[samples, length, vocabulary]``."""
        stream: Tensor = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for branch in self.branches:
            stream = stream + branch(stream)
        logits: Tensor = self.readout(self.norm(stream))
        return logits


@dataclass(frozen=True)
class Change:
    """What is trained, from a base with D = 32, 2 heads and 128 MLP units, and with which factors."""

    steps: int = 128
    tied: bool = True
    std: float = 0.02
    tuned: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def training(self, factor: int, exponent: float, seed: int) -> Training:
        """The base, or a model so many times as wide."""

        def make(width: int) -> partial[TiedGPT]:
            sizes = {"depth": 2, "heads": 2 * width, "mlp_hidden": 128 * width, "embedding": 32 * width}
            own = {"tied": self.tied, "std": self.std, "lr": 2.0**exponent, "steps": self.steps}
            return partial(TiedGPT, **sizes, **own, warmup=self.steps // 10)

        data = Text(CONTEXT, self.steps, 16, seed, 8)
        trainer = {"accelerator": "cpu", "max_steps": self.steps, "val_check_interval": self.steps}
        return Training.of(make(factor), make(1), data=data, trainer=trainer)


FOUND = {
    "embedding": {"lr": 7.171, "std": 0.2912},
    "branch_in": {"lr": 1.037, "std": 0.2976},
    "branch_out": {"lr": 0.7542, "std": 0.6347},
}
"""Factors that the study found on another Transformer, of roles that a tied one has."""

CHANGES = {
    "as it is": Change(),
    "384 steps": Change(384),
    "std of embedding × 8": Change(tuned={"embedding": {"std": 8.0}}),
    "logits × 4": Change(tuned={"readout": {"multiplier": 4.0}}),
    "untied": Change(tied=False),
    "all weights of std 1/√D": Change(std=32**-0.5),
    "factors found elsewhere": Change(tuned=FOUND),
}


def make_runs(folder: Path, end: float, changes: Mapping[str, Change] = CHANGES) -> list[Run]:
    """Train what is missing, until the time is over; methods of runs are the changes."""
    file = ResultFile(folder / "small_bases.jsonl", Change(), Run.encode, Run.decode)
    runs, plans = file.read(), dict[tuple[str, str], Plan]()
    while time.monotonic() < end and (run := next(missing(runs, changes), None)):
        start = time.process_time()
        change = changes[run.method]
        training = change.training(SHAPES[run.shape], run.exponent, run.seed)
        plan = plans.setdefault((run.method, run.shape), plans.get((run.method, run.shape)) or training.plan())
        loss = training.run(plan, {key: dict(of) for key, of in change.tuned.items()}, run.seed).value
        runs.append(replace(run, loss=loss, seconds=round(time.process_time() - start, 2)))
        file.append(runs[-1])
    return runs


def missing(runs: Sequence[Run], changes: Mapping[str, Change] = CHANGES) -> Iterator[Run]:
    """The base at all learning rates with the first seed, and then both shapes at the best one with all seeds."""
    made = {(run.shape, run.method, run.exponent, run.seed) for run in runs}
    for name in changes:
        wanted = [Run("base", name, exponent, 0) for exponent in EXPONENTS]
        if all(("base", name, exponent, 0) in made for exponent in EXPONENTS):
            best = best_exponent(runs, name)
            wanted = [Run(shape, name, best, seed) for shape in SHAPES for seed in range(SEEDS)]
        yield from (run for run in wanted if (run.shape, run.method, run.exponent, run.seed) not in made)


def best_exponent(runs: Sequence[Run], name: str) -> float:
    """Exponent of the learning rate of least loss at the base, with the first seed."""
    curve = curve_of([*runs], "base", name)
    return min(curve, key=lambda exponent: curve[exponent])


def base_table(runs: Sequence[Run], changes: Mapping[str, Change] = CHANGES) -> Table:
    """Losses of the base and of the wider model, and by how much this one is lower in pairs of seeds."""
    table = number_table("change", "lr", *SHAPES, "gain of width")
    for name in changes:
        if any(run.method == name for run in missing(runs, changes)):
            continue
        best = best_exponent(runs, name)
        losses = [[curve_of([*runs], shape, name, seed)[best] for seed in range(SEEDS)] for shape in SHAPES]
        estimates = map(Estimate.over, (*losses, [small - large for small, large in zip(*losses, strict=True)]))
        table.add_row(name, f"2^{best:g}", *(f"{one.value:.3f} ± {one.error:.3f}" for one in estimates))
    return table
