"""The result of a search: its trials, the gain over the default with other seeds, and the factors to use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.text import Text

from mlu_lightning.planning.tuned import Tuned
from mlu_lightning.tuning.search_figure import draw_search
from mlu_lightning.tuning.space import Dimension, factors_at
from mlu_lightning.utilities.fitted_tables import FittedTable, number_table
from mlu_lightning.utilities.whole_files import write_whole

CONVINCING = 2.0  # standard errors by which a gain has to be above zero to be one


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, and its standard error, which is NaN with one seed."""

    value: float
    error: float

    @classmethod
    def over(cls, values: Sequence[float], value: float | None = None) -> Estimate:
        """Take both from the values of seeds, or the value from elsewhere; infinite ones have no error."""
        finite = len(values) > 1 and all(map(math.isfinite, values))
        mean = (fmean(values) if values else math.nan) if value is None else value
        return cls(mean, stdev(values) / math.sqrt(len(values)) if finite else math.nan)

    def text(self, digits: int) -> str:
        """Value and error with so many digits after the point."""
        error = "" if math.isnan(self.error) else f" ± {self.error:.{digits}f}"
        return f"{round(self.value, digits) + 0.0:.{digits}f}{error}"  # no minus before zero

    @property
    def is_convincing(self) -> bool:
        """Whether it is above zero by two standard errors."""
        return self.value > 0 and (math.isinf(self.value) or self.value > CONVINCING * self.error)

    def __str__(self) -> str:
        return self.text(4)


@dataclass(frozen=True)
class TrialRecord:
    """A trial: its factors by name of the dimension, and its metric, or why it has none."""

    number: int
    point: Mapping[str, float]
    value: float | None
    reason: str = ""
    reported: Mapping[int, float] = field(default_factory=dict)  # metric by percentage of the steps


@dataclass(frozen=True)
class Confirmed:
    """Tuned factors at another shape: the metric of each seed with them, without them, and at other learning rates."""

    shape: str
    mode: Literal["min", "max"]
    losses: Mapping[str, Sequence[float]]  # by "tuned", "untuned", "lr / 2", "lr × 2"

    @property
    def gain(self) -> Estimate:
        """Gain of the tuned factors over none."""
        return paired(self.losses["untuned"], self.losses["tuned"], self.mode)

    @property
    def better_rates(self) -> list[str]:
        """Learning rates that are better than the tuned one, by two standard errors."""
        others = [name for name in self.losses if name not in ("tuned", "untuned")]
        tuned = self.losses["tuned"]
        return [name for name in others if paired(tuned, self.losses[name], self.mode).is_convincing]

    def verdict(self) -> str:
        """Say whether the optimum has held."""
        held = "neither half nor twice the learning rate is better"
        if better := self.better_rates:
            by = paired(self.losses["tuned"], self.losses[better[0]], self.mode)
            held = f"the optimum has moved: {better[0]} is better by {by}"
        unknown = ", whose noise one seed does not tell" if math.isnan(self.gain.error) else ", which is none"
        gain = f"gain of the factors {self.gain}{'' if self.gain.is_convincing else unknown}"
        return f"At {self.shape}: {gain}; {held}."


@dataclass(frozen=True)
class Tuning:
    """A search and what came of it.

    Args:
        metric: name of what is monitored.
        mode: whether it is to be least or largest.
        space: what was searched.
        trials: every trial that came to an end.
        again: metric of the best few, and of the default, by number of the trial and seed, trained again to choose.
        gains: the default's and the chosen one's metric with still other seeds, in pairs.
        chosen: number of the trial with the best mean over seeds; None before any was trained again.
        importance: share of each dimension in how much the metric varies, by PED-ANOVA; empty if there were too few trials.
        confirmed: the same factors at other shapes.
    """

    metric: str
    mode: Literal["min", "max"]
    space: tuple[Dimension, ...]
    trials: tuple[TrialRecord, ...]
    again: Mapping[int, Mapping[int, float]]
    gains: tuple[Sequence[float], Sequence[float]] = ((), ())
    chosen: int | None = None
    importance: Mapping[str, float] = field(default_factory=dict)
    confirmed: tuple[Confirmed, ...] = ()

    @property
    def gain(self) -> Estimate:
        """Gain of the chosen factors over none, with seeds that neither the search nor the choice has seen."""
        return paired(*self.gains, self.mode)

    @property
    def tuned(self) -> Tuned:
        """Factors for ``MLUCallback(tuned=...)``; empty if they gain nothing."""
        return self.found if self.gain.is_convincing else {}

    @property
    def found(self) -> Tuned:
        """Factors of the chosen trial, whether they gain anything or not."""
        return {} if self.chosen is None else factors_at(self.space, self.best_point())

    @property
    def best_first(self) -> list[TrialRecord]:
        """Trials that came to their end, the best first."""
        whole = [trial for trial in self.trials if trial.value is not None and not trial.reason]
        return sorted(whole, key=lambda trial: (trial.value or 0.0) * (1 if self.mode == "min" else -1))

    def verdict(self) -> str:
        """Say in a sentence what was gained."""
        if self.chosen is None:
            return f"{len(self.trials)} trials; nothing was trained again, so nothing is known of noise."
        seeds = len(self.gains[0])
        default, best = (Estimate.over(values) for values in self.gains)
        of_seeds = "1 other seed" if seeds == 1 else f"{seeds} other seeds"
        numbers = f"{self.metric} {default} with the default, {best} with the factors found, over {of_seeds}"
        if not self.gain.is_convincing:
            unknown = math.isnan(self.gain.error) and 0 < self.gain.value < math.inf
            what = "Perhaps a gain, but one seed does not tell it from noise" if unknown else "No gain"
            return f"{what}: {numbers} (difference {self.gain}). The default is written."
        return f"Gain {self.gain}: {numbers}."

    def tables(self) -> RenderableType:
        """Factors with their importance, the best few with other seeds, and what was gained."""
        factors = number_table("factor", "found", "searched", "importance")
        point = next((trial.point for trial in self.trials if trial.number == self.chosen), {})
        for d in self.space:
            share = f"{100 * self.importance[d.name]:.0f} %" if d.name in self.importance else "-"
            factors.add_row(d.name, f"{point.get(d.name, 1.0):.3g}", f"{d.low:.3g} to {d.high:.3g}", share)
        few = number_table("trial", f"{self.metric} in the search", "with other seeds")
        values = {trial.number: trial.value for trial in self.trials}
        for number, losses in self.again.items():
            value = values.get(number)
            default = not factors_at(self.space, next(t.point for t in self.trials if t.number == number))
            name = f"{number}{' (default)' if default else ''}{' *' if number == self.chosen else ''}"
            few.add_row(name, "-" if value is None else f"{value:.4f}", str(Estimate.over([*losses.values()])))
        failed = [trial for trial in self.trials if trial.reason and not trial.reason.startswith("stopped")]
        notes = [self.verdict(), *(each.verdict() for each in self.confirmed)]
        if failed:
            notes.append(f"{len(failed)} of {len(self.trials)} trials failed, the first because of: {failed[0].reason}")
        return Group(FittedTable(factors), FittedTable(few), *(Text(note) for note in notes))

    def save(self, folder: Path) -> list[Path]:
        """Write ``tuned.yaml``, for ``MLUCallback(tuned=...)``, ``tune.txt`` and ``tune.png`` into a folder."""
        text = StringIO()
        Console(file=text, width=110).print(self.tables())
        contents = {
            folder / "tuned.yaml": self.to_yaml().encode(),
            folder / "tune.txt": text.getvalue().encode(),
            folder / "tune.png": draw_search(self.space, [*self.curve()], self.metric, self.mode, self.best_point()),
        }
        write_whole(contents)
        return list(contents)

    def to_yaml(self) -> str:
        """Tuned factors as a YAML file, with what they gain."""
        lines = [f"# Factors for MLUCallback(tuned=...), found in {len(self.trials)} trials by mlu-lightning tune.", ""]
        lines[1:1] = [f"# {line}" for line in self.verdict().splitlines()]
        for key, factors in self.tuned.items():
            name = key if key.replace("_", "").isalnum() else f'"{key}"'
            lines.append(f"{name}: {{{', '.join(f'{what}: {factor!r}' for what, factor in factors.items())}}}")
        return "\n".join(lines if self.tuned else [*lines, "{}"]) + "\n"

    def curve(self) -> list[tuple[int, Mapping[str, float], float]]:
        """Trials that came to their end, in order: number, factors and metric."""
        return [(t.number, t.point, t.value) for t in self.trials if t.value is not None and not t.reason]

    def best_point(self) -> Mapping[str, float]:
        """Factors of the chosen trial, or of the best one, by name of the dimension."""
        chosen = [trial for trial in self.trials if trial.number == self.chosen] or self.best_first
        return chosen[0].point if chosen else {}


def paired(before: Sequence[float], after: Sequence[float], mode: str) -> Estimate:
    """How much better the second of two is with the same seeds; infinite where only the first failed."""
    sign = 1.0 if mode == "min" else -1.0
    differences = []
    for one, other in zip(before, after, strict=True):
        if math.isinf(one) or math.isinf(other):
            return Estimate(-math.inf if any(map(math.isinf, after)) else math.inf, math.nan)
        differences.append(sign * (one - other))
    return Estimate.over(differences)
