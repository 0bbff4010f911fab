"""From measurements at several sizes to slopes with confidence intervals, and from these to verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mlu_lightning.checking.quantities import ALONE, DRIFT, FAULT, KINDS, Kind, Quantity, lowest_and_highest

__all__ = ["CONFIDENCE", "Cause", "Point", "Row", "Verdict", "find_causes", "fit_row", "overall_verdict"]

Verdict = Literal["pass", "fail", "undecided"]

CONFIDENCE = 0.95
"""Of the intervals of slopes."""


@dataclass(frozen=True)
class Point:
    """A quantity in one run.

    Args:
        factor: of the size, next to where the axis begins.
        seed: of the run.
        value: over what it is expected to grow as, the geometric mean over places along the depth.
        lowest: of these places.
        highest: of these places.
    """

    factor: int
    seed: int
    value: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Row:
    """How a quantity grows along an axis.

    Args:
        quantity: what was measured.
        axis: depth, hidden, embedding, or together.
        slope: d log quantity / d log size, less what is expected; NaN if there is none.
        error: half the width of its confidence interval.
        verdict: ``"pass"`` if the interval has a slope of finite networks in it and none of a fault, or a parameter does
            nothing at any size, ``"fail"`` if the other way round, else ``"undecided"``.
        reason: why there is no slope, or which of several places along the depth is meant; empty otherwise.
        points: that it was fitted to.

    >>> row = Row(Quantity("update", "mlp.weight", "branch_in"), "depth", 1.02, 0.04, "fail", "", ())
    >>> print(row)
    update of mlp.weight (branch_in) grows as depth^1.02±0.04 next to what is expected
    """

    quantity: Quantity
    axis: str
    slope: float
    error: float
    verdict: Verdict
    reason: str
    points: tuple[Point, ...]

    def __str__(self) -> str:
        if math.isnan(self.slope):
            return f"{self.quantity}, {self.axis}: {self.reason}"
        size = "size" if self.axis == "together" else self.axis
        reason = f", {self.reason}" if self.reason else ""
        moves = "grows" if self.slope > 0 else "falls"
        return f"{self.quantity} {moves} as {size}^{self.slope:.2f}±{self.error:.2f} next to what is expected{reason}"


@dataclass(frozen=True)
class Cause:
    """A role that something is wrong with.

    Args:
        role: of the parameters; the name of what moves if no role can be told.
        factor: which of the plan's factors may be wrong.
        rows: that fail, the worst first.
    """

    role: str
    factor: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        return f"{self.role}: look at its {self.factor}; {self.rows[0]}"


def fit_row(quantity: Quantity, axis: str, points: Sequence[Point], others: Sequence[Sequence[Point]] = ()) -> Row:
    """Fit the slope of a quantity against size, and judge it.

    Every seed has a constant of its own in the fit, because its runs have the same batches at all sizes. If the mean over
    places along the depth passes, the lowest and the highest of what parameters do themselves are fitted as well: a single
    branch that is wrong among many is seen there.

    Args:
        quantity: that was measured.
        axis: along which the shape grew.
        points: of every size and seed.
        others: those of other axes, along which the quantity is as noisy.

    >>> quantity = Quantity("update", "mlp.weight", "branch_in")
    >>> points = [Point(n, seed, 2.0 * n, 2.0 * n, 2.0 * n) for n in (1, 2, 4) for seed in (0, 1)]
    >>> row = fit_row(quantity, "embedding", points)
    >>> round(row.slope, 6), row.verdict
    (1.0, 'fail')
    """
    points = tuple(points)

    def judged(of: Callable[[Point], float], reason: str) -> Row:
        return _judged(quantity, axis, points, of, reason, others)

    mean = judged(lambda point: point.value, "")
    if mean.verdict == "fail" or math.isnan(mean.slope) or quantity.kind not in _OF_PARAMETERS:
        return mean
    extremes = [
        judged(lambda point: point.highest, "at the place where it is largest"),
        judged(lambda point: point.lowest, "at the place where it is smallest"),
    ]
    failing = [row for row in extremes if row.verdict == "fail" and abs(row.slope) - row.error > ALONE]
    return max(failing, key=lambda row: abs(row.slope), default=mean)


def overall_verdict(rows: Sequence[Row]) -> Verdict:
    """``"fail"`` if any row fails, else ``"undecided"`` if any is, else ``"pass"``.

    Effects of roles can make a check fail; that one of them is too noisy to tell does not make it undecided.

    Args:
        rows: of a check.

    >>> overall_verdict([])
    'undecided'
    """
    if any(row.verdict == "fail" for row in rows):
        return "fail"
    verdicts = {row.verdict for row in rows if not row.quantity.kind.startswith("effect")}
    return "pass" if verdicts == {"pass"} else "undecided"


def find_causes(rows: Sequence[Row]) -> tuple[Cause, ...]:
    """Say which roles are wrong, from what fails.

    What is wrong at the start makes updates wrong, and these make features and streams wrong; so only the earliest kind
    of failing rows says what the cause is. Rows about parameters' own starts, updates and decays name their roles.

    Args:
        rows: of a check.

    Returns:
        Causes, the worst first.

    >>> find_causes([])
    ()
    """
    failing = sorted((row for row in rows if row.verdict == "fail"), key=lambda row: -_deviation(row))
    kinds = [kind for kind in KINDS if any(row.quantity.kind == kind for row in failing)]
    if not kinds:
        return ()
    first = [row for row in failing if row.quantity.kind == kinds[0]]
    names = dict.fromkeys(row.quantity.role or row.quantity.name for row in first)
    causes = []
    for name in names:
        own = [row for row in failing if (row.quantity.role or row.quantity.name) == name]
        failing_kinds = {row.quantity.kind for row in own}
        causes.append(Cause(name, _factor(failing_kinds), tuple(row for row in own if row in first)))
    return tuple(causes)


def _factor(kinds: set[Kind]) -> str:
    """What may be wrong, from the kinds of rows that fail for a role."""
    if "start" in kinds:
        return "multiplier or std"
    if "update" in kinds:
        return "lr" if "decay" in kinds else "lr or eps"
    if "decay" in kinds:
        return "weight decay"
    return "numbers"


def _deviation(row: Row) -> float:
    return math.inf if math.isnan(row.slope) else abs(row.slope) - row.error


def _judged(
    quantity: Quantity,
    axis: str,
    points: tuple[Point, ...],
    of: Callable[[Point], float],
    reason: str,
    others: Sequence[Sequence[Point]],
) -> Row:
    values = [of(point) for point in points]
    row = Row(quantity, axis, math.nan, math.nan, "undecided", reason, points)
    if not all(math.isfinite(value) for value in values):
        return replace(row, verdict="fail", reason="it is not finite")
    # a stream begins with the data where there is no embedding, or one that is not trained
    if not any(values) and (quantity.kind in _OF_PARAMETERS or quantity.name.endswith("s=0")):
        return replace(row, verdict="pass", reason="it does not move at any size")
    if any(value == 0 for value in values):
        return replace(row, reason="it does not move" if not any(values) else "it does not move in some runs")
    fit = _Fit.of(points, values)
    if len({point.factor for point in points}) < 3 or fit.freedom < 2:
        return replace(row, reason="there are too few sizes or seeds")
    clean = [other for other in others if all(0 < of(point) < math.inf for point in other)]
    slope, error = fit.slope, fit.error([_Fit.of(other, [of(point) for point in other]) for other in clean])
    lowest, highest = lowest_and_highest(quantity, axis)
    beyond = FAULT - DRIFT
    may_be_right = lowest <= slope + error and slope - error <= highest
    may_be_wrong = slope - error <= lowest - beyond or highest + beyond <= slope + error
    verdict: Verdict = "undecided"
    if may_be_right != may_be_wrong:
        verdict = "pass" if may_be_right else "fail"
    return replace(row, slope=slope, error=error, verdict=verdict)


_OF_PARAMETERS = ("start", "update", "decay")


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
        freedom = len(points) - len(seeds) - 1
        return cls(float(coefficients[0]), float(residual @ residual), freedom, float(spread @ spread))

    def error(self, others: Sequence[_Fit]) -> float:
        """Half the confidence interval of the slope, with the noise of all fits together."""
        from scipy import stats  # which is optional, for those who only train

        fits = [self, *(other for other in others if other.freedom > 0)]
        freedom = sum(fit.freedom for fit in fits)
        variance = sum(fit.squares for fit in fits) / freedom / self.spread
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * math.sqrt(variance))
