"""What the study of tuned factors trains: its shapes, its parameterizations, and one run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import Progress

from mlu_lightning import MLUCallback, Plan, tune
from mlu_lightning.tuning import Tuning
from mlu_lightning.tuning.training import Training
from recipes.common.text import Text
from recipes.lr_transfer.runs import ScheduledTransformer

STUDIES = yaml.safe_load(Path(__file__).with_name("studies.yaml").read_text(encoding="utf-8"))
SHAPES: dict[str, dict[str, int]] = STUDIES["shapes"]
BASE = SHAPES["base"]
METHODS: dict[str, tuple[str, bool, bool, str]] = STUDIES["methods"]
"""Parameterization, whether with the factors, and whether the learning rate is tuned at each shape; color."""


@dataclass(frozen=True)
class Study:
    """What is trained."""

    steps: int = 128
    context: int = 32
    batch_size: int = 16
    validation_batches: int = 16
    seeds: int = 3
    exponents: tuple[float, ...] = (-7, -6.5, -6, -5.5, -5, -4.5, -4)  # of the base's learning rates
    shapes: dict[str, dict[str, int]] = field(default_factory=lambda: dict(SHAPES))

    def model(self, shape: str, exponent: float) -> ScheduledTransformer:
        """Build a model at a learning rate that is a power of two."""
        warmup = max(1, self.steps // 10)
        return ScheduledTransformer(
            **self.shapes[shape], lr=2.0**exponent, steps=self.steps, warmup=warmup, context=self.context
        )

    def data(self, seed: int) -> Text:
        """Make the data, in an order of their own for each seed."""
        return Text(self.context, self.steps, self.batch_size, seed, self.validation_batches)

    def training(
        self, shape: str, exponent: float, seed: int, parameterization: Any = "mlu", **trainer: Any
    ) -> Training:
        """Describe a training, which is validated four times, or as often as ``trainer`` says."""
        return Training.of(
            partial(self.model, shape, exponent),
            partial(self.model, "base", exponent),
            lambda base: [MLUCallback(base, parameterization=parameterization)],
            data=self.data(seed),
            trainer={"accelerator": "cpu", "max_steps": self.steps, **trainer},
        )


@dataclass(frozen=True)
class Run:
    """One training run."""

    shape: str
    method: str
    exponent: float  # of the learning rate, a power of two
    seed: int  # of weights and data
    loss: float = math.nan  # in validation at the end, in nats per byte; NaN if the run diverged
    seconds: float = 0.0  # of processor time


def plan_of(study: Study, shape: str, method: str) -> Plan:
    """Plan of a shape, without factors."""
    return study.training(shape, -6, 0, METHODS[method][0]).plan()


def train(study: Study, run: Run, plan: Plan, tuned: Mapping[str, Mapping[str, float]]) -> Run:
    """Train one model as any Lightning user would, and return the run with its loss."""
    start = time.process_time()
    training = study.training(run.shape, run.exponent, run.seed, METHODS[run.method][0], val_check_interval=study.steps)
    factors = {key: dict(of) for key, of in tuned.items()} if METHODS[run.method][1] else {}
    loss = training.run(plan, factors, run.seed).value
    return replace(run, loss=loss, seconds=round(time.process_time() - start, 2))


def missing_runs(study: Study, runs: list[Run], start: float) -> list[Run]:
    """Runs that are known to be needed and were not made, the cheapest shapes first.

    Where the learning rate is tuned, the first seed is trained at the base's best and on towards the least loss, an octave
    at a time, until that has larger ones on both sides, and the other seeds at the two best.
    """
    made = {(run.shape, run.method, run.exponent, run.seed) for run in runs}
    wanted: list[Run] = []
    for shape in study.shapes:
        for method, (_, _, tunes, _) in METHODS.items():
            if shape == "base" and (tunes or METHODS[method][0] != "mlu"):
                continue  # which is the same there
            exponents = exponents_of(runs, shape, method, start) if tunes else [start]
            seeds = range(study.seeds) if not tunes or is_bracketed(runs, shape, method) else range(1)
            wanted += [Run(shape, method, exponent, seed) for exponent in exponents for seed in seeds]
    return [run for run in wanted if (run.shape, run.method, run.exponent, run.seed) not in made]


def curve_of(runs: list[Run], shape: str, method: str, seed: int = 0) -> dict[float, float]:
    """Loss of a seed by exponent of the learning rate, infinite where it diverged."""
    own = [run for run in runs if (run.shape, run.method, run.seed) == (shape, method, seed)]
    return {run.exponent: run.loss if math.isfinite(run.loss) else math.inf for run in own}


def is_bracketed(runs: list[Run], shape: str, method: str) -> bool:
    """Whether the least loss of the first seed has larger ones an octave to both sides."""
    curve = curve_of(runs, shape, method)
    best = min(curve, key=lambda exponent: curve[exponent], default=0.0)
    return {best - 1, best, best + 1} <= curve.keys()


def exponents_of(runs: list[Run], shape: str, method: str, start: float) -> list[float]:
    """Exponents to be tried with the first seed; those of all seeds when the best is known."""
    curve = curve_of(runs, shape, method)
    if not curve:
        return [start]
    ranked = sorted(curve, key=lambda exponent: curve[exponent])
    return ranked[:2] if is_bracketed(runs, shape, method) else [ranked[0] - 1, ranked[0] + 1]


def tune_at(build: Any, data: Any, steps: int, folder: Path, terminal: Console, **more: Any) -> Tuning:
    """Search at a base, with a progress bar, and save what is found."""
    with Progress(console=terminal) as progress:
        bar = progress.add_task("search")

        def show(what: str, done: int, total: int, best: float | None) -> None:
            progress.update(bar, description=what, completed=done, total=total)

        trainer = {"accelerator": "cpu", "max_steps": steps}
        found = tune(build, data, trainer=trainer, out=folder, progress=show, **more)
    found.save(folder)
    return found
