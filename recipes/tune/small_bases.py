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

from mlu_lightning import MLUCallback, Plan, tune
from mlu_lightning.planning.tuned import Tuned
from mlu_lightning.tuning.found import Estimate
from mlu_lightning.tuning.training import Training
from mlu_lightning.utilities.fitted_tables import number_table
from recipes.common.studies import ResultFile
from recipes.common.text import Text
from recipes.lr_transfer.runs import ScheduledTransformer
from recipes.tune.runs import Run, curve_of

CONTEXT = 32
TUNED_FROM = -6  # exponent of the learning rate that is best at the base


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
    parameterization: str = "mlu"
    tuned_at: str = "base"  # shape at which the learning rate is chosen

    def build(self, factor: int, exponent: float) -> TiedGPT:
        """The base, or a model so many times as wide."""
        sizes = {"depth": 2, "heads": 2 * factor, "mlp_hidden": 128 * factor, "embedding": 32 * factor}
        own = {"tied": self.tied, "std": self.std, "lr": 2.0**exponent, "steps": self.steps}
        return TiedGPT(**sizes, **own, warmup=max(1, self.steps // 10))

    def data(self, seed: int) -> Text:
        """Make the data, in an order of their own for each seed."""
        return Text(CONTEXT, self.steps, 16, seed, 8)

    def training(self, factor: int, exponent: float, seed: int) -> Training:
        """Describe a training of the base, or of a model so many times as wide."""
        make, base = (partial(self.build, width, exponent) for width in (factor, 1))
        trainer = {"accelerator": "cpu", "max_steps": self.steps, "val_check_interval": self.steps}
        callbacks = partial(_callbacks, parameterization=self.parameterization)
        return Training.of(make, base, callbacks, data=self.data(seed), trainer=trainer)


def _callbacks(base: TiedGPT, parameterization: Any) -> list[MLUCallback]:
    return [MLUCallback(base, parameterization=parameterization)]


CHANGES = {
    "as it is": Change(),
    "384 steps": Change(384),
    "std of embedding × 8": Change(tuned={"embedding": {"std": 8.0}}),
    "logits × 4": Change(tuned={"readout": {"multiplier": 4.0}}),
    "untied": Change(tied=False),
    "all weights of std 1/√D": Change(std=32**-0.5),
}


@dataclass(frozen=True)
class Comparison:
    """What is compared, each at a learning rate of its own, which the first seed chooses at one shape."""

    changes: Mapping[str, Any]  # as Change has it
    shapes: Mapping[str, int] = field(default_factory=lambda: {"base": 1, "4 × widths": 4})
    exponents: tuple[int, ...] = (-7, -6, -5, -4)
    seeds: int = 3

    def make(self, path: Path, end: float) -> list[Run]:
        """Train what is missing, until the time is over; methods of runs are the changes."""
        file = ResultFile(path, Change(), Run.encode, Run.decode)
        runs, plans = file.read(), dict[tuple[str, str], Plan]()
        while time.monotonic() < end and (run := next(self.missing(runs), None)):
            start = time.process_time()
            training = self.changes[run.method].training(self.shapes[run.shape], run.exponent, run.seed)
            plan = plans.setdefault((run.method, run.shape), plans.get((run.method, run.shape)) or training.plan())
            loss = training.run(plan, self.changes[run.method].tuned, run.seed).value
            runs.append(replace(run, loss=loss, seconds=round(time.process_time() - start, 2)))
            file.append(runs[-1])
        return runs

    def missing(self, runs: Sequence[Run]) -> Iterator[Run]:
        """All learning rates with the first seed at one shape, and then all shapes at the best one with all seeds."""
        made = {(run.shape, run.method, run.exponent, run.seed) for run in runs}
        for name, change in self.changes.items():
            wanted = [Run(change.tuned_at, name, exponent, 0) for exponent in self.exponents]
            if all((change.tuned_at, name, exponent, 0) in made for exponent in self.exponents):
                best = self.best(runs, name)
                wanted = [Run(shape, name, best, seed) for shape in self.shapes for seed in range(self.seeds)]
            yield from (run for run in wanted if (run.shape, run.method, run.exponent, run.seed) not in made)

    def best(self, runs: Sequence[Run], name: str) -> float:
        """Exponent of the learning rate of least loss."""
        curve = curve_of([*runs], self.changes[name].tuned_at, name)
        return min(curve, key=lambda exponent: curve[exponent])

    def losses(self, runs: Sequence[Run], name: str) -> list[list[float]]:
        """Losses of all seeds at the best learning rate, by shape; none before all were made."""
        if any(run.method == name for run in self.missing(runs)):
            return []
        best = self.best(runs, name)
        return [[curve_of([*runs], shape, name, seed)[best] for seed in range(self.seeds)] for shape in self.shapes]

    def table(self, runs: Sequence[Run]) -> Table:
        """Losses at all shapes, and by how much the larger one's is lower in pairs of seeds."""
        table = number_table("change", "lr", *self.shapes, "gain of width")
        for name in self.changes:
            if losses := self.losses(runs, name):
                gains = [small - large for small, large in zip(*losses, strict=True)]
                cells = (f"{one.value:.3f} ± {one.error:.3f}" for one in map(Estimate.over, (*losses, gains)))
                table.add_row(name, f"2^{self.best(runs, name):g}", *cells)
        return table


def changes_of(folder: Path, trials: int, preset: Tuned) -> dict[str, Change]:
    """All changes, and for both stds the plain model at its own rate, factors tuned at the base, and those of a preset."""
    found = dict(CHANGES)
    for std, name in ((0.02, "as it is"), (32**-0.5, "all weights of std 1/√D")):
        change = Change(std=std)
        place = folder / f"std_{std:.2g}"
        tuning = tune(
            partial(change.build, 1, TUNED_FROM),
            change.data(0),
            trials=trials,
            trainer={"accelerator": "cpu", "max_steps": change.steps},
            out=place,
        )
        tuning.save(place)
        found[f"{name}, tuned"] = replace(change, tuned=tuning.found)
        found[f"{name}, preset"] = replace(change, tuned=preset)
        found[f"{name}, plain, lr tuned at 4 ×"] = replace(change, parameterization="sp", tuned_at="4 × widths")
    return found
