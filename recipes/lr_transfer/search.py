"""What ``lr_transfer.py`` trains next, and what it measures: best learning rates, their drift, and the loss lost by it.

Losses are means over seeds, as a function of the power of two that the learning rate is. The best learning rate is the
vertex of the parabola through the least loss and those an octave to the left and to the right of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recipes.lr_transfer.runs import Run, Shape, Study

__all__ = ["LIMIT", "Best", "Curve", "Estimate", "Transfer", "best", "curves_of", "missing_runs", "transfers"]

LIMIT = 6.0
"""Octaves from where the search begins, beyond which there is none."""
DECADES = math.log10(2)
"""In an octave."""

Curve = Mapping[float, tuple[float, ...]]
"""Losses by exponent of the learning rate, for each seed one."""


@dataclass(frozen=True)
class Estimate:
    """A number, and its standard error over seeds.

    Args:
        value: for the mean loss over seeds.
        error: standard error; NaN with one seed.

    >>> str(Estimate(-0.123, 0.0456))
    '-0.12 ± 0.05'
    """

    value: float
    error: float

    @classmethod
    def over(cls, value: float, seeds: Sequence[float]) -> Estimate:
        """Take the error from the values of seeds.

        Args:
            value: for the mean loss.
            seeds: the same for each seed alone.

        >>> Estimate.over(2.0, (1.0, 3.0))
        Estimate(value=2.0, error=1.0)
        """
        if len(seeds) < 2:
            return cls(value, math.nan)
        center = math.fsum(seeds) / len(seeds)
        square = math.fsum((seed - center) ** 2 for seed in seeds) / (len(seeds) - 1)
        return cls(value, math.sqrt(square / len(seeds)))

    def __str__(self) -> str:
        return self.text(2)

    def text(self, digits: int) -> str:
        """Value and error.

        Args:
            digits: after the point.
        """
        error = "" if math.isnan(self.error) else f" ± {self.error:.{digits}f}"
        return f"{round(self.value, digits) + 0.0:.{digits}f}{error}"  # no minus before zero


@dataclass(frozen=True)
class Best:
    """The best learning rate of a curve.

    Args:
        tried: exponent with the least mean loss of those tried.
        exponent: of the best learning rate for the mean loss.
        seeds: the same for each seed alone, within an octave of ``tried``.
        losses: for each seed, at the best learning rate for the mean.
        bound: ``"≤"`` or ``"≥"`` if the curve has not risen at that end, so that the best may be further; else empty.
    """

    tried: float
    exponent: float
    seeds: tuple[float, ...]
    losses: tuple[float, ...]
    bound: str = ""


@dataclass(frozen=True)
class Transfer:
    """What became of the base's best learning rate at another shape.

    Args:
        axis: along which the shape has grown.
        factor: by which.
        parameterization: of the plans.
        horizon: steps.
        exponent: of the best learning rate, a power of two.
        drift: decades from the base's best learning rate to the best one.
        bound: as in :class:`Best`.
        regret: loss at the base's best learning rate, of those tried, less the least loss.
        loss: least loss.
        seeds: drift for each seed.
    """

    axis: str
    factor: float
    parameterization: str
    horizon: int
    exponent: float
    drift: Estimate
    bound: str
    regret: Estimate
    loss: Estimate
    seeds: tuple[float, ...]


def curves_of(study: Study, runs: Sequence[Run]) -> dict[tuple[Shape, str, int], dict[float, tuple[float, ...]]]:
    """Curves by shape, parameterization and horizon, with the learning rates at which all seeds were trained.

    Args:
        study: of the runs.
        runs: that were made.
    """
    losses: dict[tuple[Shape, str, float], dict[int, tuple[float, ...]]] = {}
    for run in runs:
        losses.setdefault((run.shape, run.parameterization, run.exponent), {})[run.seed] = run.losses
    found: dict[tuple[Shape, str, int], dict[float, tuple[float, ...]]] = {}
    for (shape, parameterization, exponent), seeds in sorted(losses.items()):
        if len(seeds) == study.seeds:
            for place, horizon in enumerate(study.horizons):
                values = tuple(seeds[seed][place] for seed in range(study.seeds))
                found.setdefault((shape, parameterization, horizon), {})[exponent] = values
    return found


def best(curve: Curve) -> Best:
    """Find the best learning rate of a curve.

    Args:
        curve: with losses at the least one and an octave on both sides of it, or as far as was tried.

    >>> found = best({x: ((x + 6.2) ** 2, (x + 6.4) ** 2) for x in (-8.0, -7.0, -6.0, -5.0)})
    >>> round(found.exponent, 6), [round(seed, 6) for seed in found.seeds]
    (-6.3, [-6.2, -6.4])
    """
    means = {exponent: _mean(losses) for exponent, losses in curve.items()}
    tried = min(means, key=lambda exponent: means[exponent])
    sides = (tried - 1, tried + 1)
    if not all(math.isfinite(means.get(side, math.inf)) for side in sides):
        bound = "≤" if sides[0] not in means else "≥" if sides[1] not in means else ""
        return Best(tried, tried, (tried,) * len(curve[tried]), curve[tried], bound)
    triples = list(zip(curve[sides[0]], curve[tried], curve[sides[1]], strict=True))
    offset = _vertex(means[sides[0]], means[tried], means[sides[1]])
    return Best(
        tried,
        tried + offset,
        tuple(tried + _vertex(*triple) for triple in triples),
        tuple(_parabola(*triple, offset) for triple in triples),
    )


def missing_runs(study: Study, shared: Mapping[tuple[Shape, str], str], runs: Sequence[Run]) -> list[Run]:
    """Runs that are known to be needed and were not made: none of them when the study is complete.

    The base is trained first, then every other shape at the base's best learning rate and an octave on both sides of it,
    and on towards the least loss until that has larger ones on both sides.

    Args:
        study: of the runs.
        shared: parameterizations whose runs stand for those of a shape and parameterization.
        runs: that were made.
    """
    curves = curves_of(study, runs)
    made = {(run.shape, run.parameterization, run.exponent, run.seed) for run in runs}
    step = study.spacing
    around = [-1.0, -step, 0.0, step, 1.0]

    def missing(shape: Shape, parameterization: str, exponents: set[float]) -> list[Run]:
        cases = [(exponent, seed) for exponent in sorted(exponents) for seed in range(study.seeds)]
        return [Run(shape, parameterization, *case) for case in cases if (shape, parameterization, *case) not in made]

    def search(shape: Shape, parameterization: str, start: set[float], offsets: Sequence[float]) -> list[Run]:
        found = missing(shape, parameterization, start)
        if found:
            return found
        tried = {best(curves[shape, parameterization, horizon]).tried for horizon in study.horizons}
        near = {one + offset for one in tried for offset in offsets}
        return missing(
            shape, parameterization, {one for one in near if min(start) - LIMIT <= one <= max(start) + LIMIT}
        )

    base_parameterization = shared[study.base, study.parameterizations[0]]
    found = search(study.base, base_parameterization, set(study.exponents), around)
    if found:
        return found
    bests = {best(curves[study.base, base_parameterization, horizon]).tried for horizon in study.horizons}
    start = {one + offset for one in bests for offset in (-1.0, 0.0, 1.0)}
    others = dict.fromkeys(
        (shape, shared[shape, parameterization]) for shape, parameterization in shared if shape != study.base
    )
    return [
        run for shape, parameterization in others for run in search(shape, parameterization, start, (-1.0, 0.0, 1.0))
    ]


def transfers(study: Study, shared: Mapping[tuple[Shape, str], str], runs: Sequence[Run]) -> list[Transfer]:
    """What became of the base's best learning rate, for all shapes, parameterizations and horizons whose runs were all made.

    Args:
        study: of the runs.
        shared: parameterizations whose runs stand for those of a shape and parameterization.
        runs: that were made.
    """
    open_cases = {(run.shape, run.parameterization) for run in missing_runs(study, shared, runs)}
    curves = curves_of(study, runs)
    base_parameterization = shared[study.base, study.parameterizations[0]]
    if (study.base, base_parameterization) in open_cases:
        return []
    bases = {horizon: best(curves[study.base, base_parameterization, horizon]) for horizon in study.horizons}
    return [
        _transfer(
            axis,
            factor,
            parameterization,
            horizon,
            bases[horizon],
            curves[shape, shared[shape, parameterization], horizon],
        )
        for axis in study.axes
        for factor, shape in zip(study.factors(axis), study.shapes(axis), strict=True)
        for parameterization in study.parameterizations
        if (shape, shared[shape, parameterization]) not in open_cases
        for horizon in study.horizons
    ]


def _transfer(axis: str, factor: float, parameterization: str, horizon: int, base: Best, curve: Curve) -> Transfer:
    one, kept = best(curve), curve[base.tried]
    drifts = tuple((mine - its) * DECADES for mine, its in zip(one.seeds, base.seeds, strict=True))
    regrets = [loss - least for loss, least in zip(kept, one.losses, strict=True)]
    return Transfer(
        axis,
        factor,
        parameterization,
        horizon,
        one.exponent,
        Estimate.over((one.exponent - base.exponent) * DECADES, drifts),
        one.bound,
        Estimate.over(_mean(regrets), regrets),
        Estimate.over(_mean(one.losses), one.losses),
        drifts,
    )


def _mean(losses: Sequence[float]) -> float:
    """Mean over seeds, infinite if any of them diverged."""
    return math.fsum(losses) / len(losses) if all(math.isfinite(loss) for loss in losses) else math.inf


def _vertex(left: float, middle: float, right: float) -> float:
    """Where the parabola through values at -1, 0 and 1 is least, within these; where the least is, if it has no minimum."""
    curvature = left - 2 * middle + right
    if curvature <= 0:
        return 0.0 if left == right else math.copysign(1.0, left - right)
    return min(1.0, max(-1.0, (left - right) / (2 * curvature)))


def _parabola(left: float, middle: float, right: float, offset: float) -> float:
    """Value at an offset of the parabola through values at -1, 0 and 1."""
    return middle + (right - left) / 2 * offset + (left - 2 * middle + right) / 2 * offset * offset
