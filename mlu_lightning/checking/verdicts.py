"""Fit slopes with confidence intervals to measurements at several sizes, and derive verdicts and causes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

import numpy as np

from mlu_lightning.checking.quantities import ALONE, CONFIDENCE, DRIFT, FAULT, Kind, Quantity, lowest_and_highest
from mlu_lightning.checking.sizes import AXES

Verdict = Literal["pass", "fail", "undecided"]


class Reason(str, Enum):
    """Why a row has no slope, or which place along the depth its slope is of; its value is the text in a report."""

    NONE = ""
    LARGEST = "at the place where it is largest"
    SMALLEST = "at the place where it is smallest"
    NOT_FINITE = "it is not finite"
    STILL = "it does not move at any size"
    WRONGLY_STILL = "it does not move"
    STILL_IN_SOME = "it does not move in some runs"
    TOO_FEW = "there are too few sizes or seeds"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Point:
    """A quantity in one run, measured over expected: geometric mean, least and largest along the depth."""

    factor: int
    seed: int
    value: float
    lowest: float
    highest: float

    def at(self, place: Reason) -> float:
        """Value at the largest or smallest place, or the mean over places."""
        return {Reason.LARGEST: self.highest, Reason.SMALLEST: self.lowest}.get(place, self.value)


@dataclass(frozen=True)
class Row:
    """How a quantity grows along an axis: the slope d log quantity / d log size, less the expected one, or NaN.

    It passes if its confidence interval (half width ``error``) has slopes of finite networks and none of a fault, or if
    a parameter does nothing at any size; it fails if it is the other way round.
    """

    quantity: Quantity
    axis: str
    slope: float
    error: float
    verdict: Verdict
    reason: Reason = Reason.NONE
    points: tuple[Point, ...] = ()

    @property
    def is_wide(self) -> bool:
        """Whether it is undecided because the interval has right slopes and wrong ones in it, which seeds make narrower."""
        return self.verdict == "undecided" and 2 * self.error >= FAULT - DRIFT

    def __str__(self) -> str:
        if math.isnan(self.slope):
            return f"{self.quantity}, {self.axis}: {self.reason}"
        size = "size" if self.axis == "together" else self.axis
        reason = f", {self.reason}" if self.reason else ""
        moves = "grows" if self.slope > 0 else "falls"
        return f"{self.quantity} {moves} as {size}^{self.slope:.2f}±{self.error:.2f} next to what is expected{reason}"


@dataclass(frozen=True)
class Cause:
    """A role with a fault (or what moves, if no role can be told), the factor of the plan that may be wrong, and why."""

    role: str
    factor: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        return f"{self.role}: look at its {self.factor}; {self.rows[0]}"


def fit_row(
    quantity: Quantity,
    axis: str,
    points: Sequence[Point],
    others: Sequence[Sequence[Point]] = (),
    may_be_still: bool = False,
    leeway: tuple[float, float] = (0.0, 0.0),
) -> Row:
    """Fit the slope of a quantity against size, and judge it.

    Seeds have constants of their own, because their runs have the same batches at all sizes. For parameters, the lowest
    and the highest value along the depth are fitted, too, to see a single wrong branch. ``others`` are points along
    other axes, with the same noise; ``leeway`` widens the range of slopes of finite networks.
    """
    row = Row(quantity, axis, math.nan, math.nan, "undecided", points=tuple(points))
    mean = _judged(row, others, may_be_still, leeway)
    if mean.verdict == "fail" or math.isnan(mean.slope) or not quantity.kind.is_of_parameter:
        return mean
    places = Reason.LARGEST, Reason.SMALLEST
    extremes = [_judged(replace(row, reason=place), others, leeway=leeway) for place in places]
    failing = [row for row in extremes if row.verdict == "fail" and abs(row.slope) - row.error > ALONE]
    return max(failing, key=lambda row: abs(row.slope), default=mean)


def axes_of(rows: Sequence[Row]) -> list[str]:
    """Axes along which there are rows, in their order."""
    return [axis for axis in AXES if any(row.axis == axis for row in rows)]


def overall_verdict(rows: Sequence[Row]) -> Verdict:
    """``"fail"`` if any row fails, else ``"undecided"`` if any is but effects of roles, which are noisy, else ``"pass"``."""
    if any(row.verdict == "fail" for row in rows):
        return "fail"
    verdicts = {row.verdict for row in rows if not row.quantity.kind.is_effect}
    return "pass" if verdicts == {"pass"} else "undecided"


def find_causes(rows: Sequence[Row]) -> tuple[Cause, ...]:
    """Say which roles are wrong, the worst first, from the earliest kind of failing rows, as it makes later ones fail."""
    failing = sorted(
        (row for row in rows if row.verdict == "fail"),
        key=lambda row: -math.inf if math.isnan(row.slope) else row.error - abs(row.slope),
    )
    earliest = next((kind for kind in Kind if any(row.quantity.kind is kind for row in failing)), None)
    causes = []
    for label in dict.fromkeys(row.quantity.label for row in failing if row.quantity.kind is earliest):
        own = [row for row in failing if row.quantity.label == label]
        first = tuple(row for row in own if row.quantity.kind is earliest)
        causes.append(Cause(label, _factor({row.quantity.kind for row in own}), first))
    return tuple(causes)


def _factor(kinds: set[Kind]) -> str:
    """What may be wrong, from the kinds of rows that fail for a role."""
    if Kind.START in kinds:
        return "multiplier or std"
    if Kind.UPDATE in kinds:
        return "lr" if Kind.DECAY in kinds else "lr or eps"
    if Kind.DECAY in kinds:
        return "weight decay"
    return "numbers"


def _judged(
    row: Row, others: Sequence[Sequence[Point]], may_be_still: bool = False, leeway: tuple[float, float] = (0.0, 0.0)
) -> Row:
    """A row with its slope, at the place that its reason says, and its verdict."""
    values = [point.at(row.reason) for point in row.points]
    if not all(math.isfinite(value) for value in values):
        return replace(row, verdict="fail", reason=Reason.NOT_FINITE)
    if not any(values):
        if row.quantity.kind.is_of_parameter or may_be_still:
            return replace(row, verdict="pass", reason=Reason.STILL)
        return replace(row, reason=Reason.WRONGLY_STILL)
    if not all(values):
        return replace(row, reason=Reason.STILL_IN_SOME)
    fit = _Fit.of(row.points, values)
    if len({point.factor for point in row.points}) < 3 or fit.freedom < 2:
        return replace(row, reason=Reason.TOO_FEW)
    clean = [other for other in others if all(0 < point.at(row.reason) < math.inf for point in other)]
    other_fits = [_Fit.of(other, [point.at(row.reason) for point in other]) for other in clean]
    slope, error, beyond = fit.slope, fit.error(other_fits), FAULT - DRIFT
    lowest, highest = (sum(ends) for ends in zip(lowest_and_highest(row.quantity, row.axis), leeway, strict=True))
    may_be_right = lowest <= slope + error and slope - error <= highest
    may_be_wrong = slope - error <= lowest - beyond or highest + beyond <= slope + error
    verdict: Verdict = "undecided"
    if may_be_right != may_be_wrong:
        verdict = "pass" if may_be_right else "fail"
    return replace(row, slope=slope, error=error, verdict=verdict)


@dataclass(frozen=True)
class _Fit:
    """A line through logarithms, with a constant for each seed."""

    slope: float
    squares: float
    freedom: int
    spread: float

    @classmethod
    def of(cls, points: Sequence[Point], values: Sequence[float]) -> _Fit:
        seeds = sorted({point.seed for point in points})
        sizes, logs = np.log([point.factor for point in points]), np.log(values)
        of_seed = np.array([[point.seed == seed for seed in seeds] for point in points], dtype=float)
        design = np.column_stack((sizes, of_seed))
        coefficients, *_ = np.linalg.lstsq(design, logs, rcond=None)
        residual = logs - design @ coefficients
        spread = sizes - of_seed @ np.linalg.lstsq(of_seed, sizes, rcond=None)[0]
        squares, freedom = float(residual @ residual), len(points) - len(seeds) - 1
        return cls(float(coefficients[0]), squares, freedom, float(spread @ spread))

    def error(self, others: Sequence[_Fit]) -> float:
        """Half the confidence interval of the slope, with the noise of all fits together."""
        from scipy import stats  # which is optional, for those who only train

        fits = [self, *(other for other in others if other.freedom > 0)]
        freedom = sum(fit.freedom for fit in fits)
        variance = sum(fit.squares for fit in fits) / freedom / self.spread
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(variance))
