"""Which run comes next, and what was measured: best learning rates, their drift, and the loss that it costs.

Losses are means over seeds, as a function of the power of two that the learning rate is. The best learning rate is the
vertex of the parabola through the least loss and those an octave to the left and to the right of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlu_lightning.tuning.found import Estimate
from recipes.lr_transfer.runs import Run, Shape, Study

LIMIT = 6.0  # octaves from where the search begins, beyond which there is none
DECADES = math.log10(2)  # in an octave

Curve = Mapping[float, tuple[float, ...]]
"""Losses by exponent of the learning rate, for each seed one."""


@dataclass(frozen=True)
class Best:
    """The best learning rate of a curve."""

    tried: float  # exponent with the least mean loss of those tried
    exponent: float  # of the best learning rate for the mean loss
    seeds: tuple[float, ...]  # the same for each seed alone, within an octave of ``tried``
    losses: tuple[float, ...]  # for each seed, at the best learning rate for the mean
    bound: str = ""  # "≤" or "≥" if the curve has not risen at that end, so that the best may be further


@dataclass(frozen=True)
class Transfer:
    """What became of the base's best learning rate at another shape."""

    axis: str  # along which the shape has grown
    factor: float  # by which
    parameterization: str
    horizon: int  # steps
    exponent: float  # of the best learning rate, a power of two
    drift: Estimate  # decades from the base's best learning rate to the best one
    bound: str  # as in Best
    regret: Estimate  # loss at the base's best learning rate, of those tried, less the least loss
    loss: Estimate  # least loss


def curves_of(study: Study, runs: Iterable[Run]) -> dict[tuple[Shape, str, int], dict[float, tuple[float, ...]]]:
    """Curves by shape, parameterization and horizon, with the learning rates at which all seeds were trained."""
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
    """Find the best learning rate of a curve, which extends an octave to both sides of the least loss if it could."""
    means = {exponent: mean(losses) for exponent, losses in curve.items()}
    tried = min(means, key=lambda exponent: means[exponent])
    sides = (tried - 1, tried + 1)
    if not all(math.isfinite(means.get(side, math.inf)) for side in sides):
        bound = "≤" if sides[0] not in means else "≥" if sides[1] not in means else ""
        return Best(tried, tried, (tried,) * len(curve[tried]), curve[tried], bound)
    triples = list(zip(curve[sides[0]], curve[tried], curve[sides[1]], strict=True))
    offset = _vertex(means[sides[0]], means[tried], means[sides[1]])
    seeds = tuple(tried + _vertex(*triple) for triple in triples)
    return Best(tried, tried + offset, seeds, tuple(_parabola(*triple, offset) for triple in triples))


def mean(losses: Sequence[float]) -> float:
    """Mean over seeds, infinite if any of them diverged."""
    return math.fsum(losses) / len(losses) if all(math.isfinite(loss) for loss in losses) else math.inf


def missing_runs(study: Study, shared: Mapping[tuple[Shape, str], str], runs: Sequence[Run]) -> list[Run]:
    """Runs that are known to be needed and were not made, none when the study is complete.

    The base is trained first, then every other shape at the base's best learning rate and an octave on both sides of it,
    and on towards the least loss until that has larger ones on both sides. ``shared`` is of :func:`shared_runs`.
    """
    curves = curves_of(study, runs)
    made = {(run.shape, run.parameterization, run.exponent, run.seed) for run in runs}

    def missing(shape: Shape, parameterization: str, exponents: set[float]) -> list[Run]:
        cases = [(exponent, seed) for exponent in sorted(exponents) for seed in range(study.seeds)]
        return [Run(shape, parameterization, *case) for case in cases if (shape, parameterization, *case) not in made]

    def search(shape: Shape, parameterization: str, start: set[float], offsets: Sequence[float]) -> list[Run]:
        found = missing(shape, parameterization, start)
        if found:
            return found
        tried = {best(curves[shape, parameterization, horizon]).tried for horizon in study.horizons}
        near = {exponent + offset for exponent in tried for offset in offsets}
        least, most = min(start) - LIMIT, max(start) + LIMIT
        return missing(shape, parameterization, {exponent for exponent in near if least <= exponent <= most})

    base = study.base, shared[study.base, study.parameterizations[0]]
    found = search(*base, set(study.exponents), (-1.0, -study.spacing, 0.0, study.spacing, 1.0))
    if found:
        return found
    bests = {best(curves[(*base, horizon)]).tried for horizon in study.horizons}
    start = {exponent + offset for exponent in bests for offset in (-1.0, 0.0, 1.0)}
    others = dict.fromkeys((shape, shared[shape, name]) for shape, name in shared if shape != study.base)
    return [run for case in others for run in search(*case, start, (-1.0, 0.0, 1.0))]


def transfers(study: Study, shared: Mapping[tuple[Shape, str], str], runs: Sequence[Run]) -> list[Transfer]:
    """What became of the base's best learning rate, for all shapes, parameterizations and horizons whose runs were made."""
    unfinished = {(run.shape, run.parameterization) for run in missing_runs(study, shared, runs)}
    curves = curves_of(study, runs)
    base = study.base, shared[study.base, study.parameterizations[0]]
    if base in unfinished:
        return []
    bases = {horizon: best(curves[(*base, horizon)]) for horizon in study.horizons}
    return [
        _transfer(axis, factor, name, horizon, bases[horizon], curves[shape, shared[shape, name], horizon])
        for axis in study.axes
        for factor, shape in study.shapes(axis).items()
        for name in study.parameterizations
        if (shape, shared[shape, name]) not in unfinished
        for horizon in study.horizons
    ]


def _transfer(axis: str, factor: float, parameterization: str, horizon: int, base: Best, curve: Curve) -> Transfer:
    own, kept = best(curve), curve[base.tried]
    drifts = [(mine - its) * DECADES for mine, its in zip(own.seeds, base.seeds, strict=True)]
    regrets = [loss - least for loss, least in zip(kept, own.losses, strict=True)]
    drift = Estimate.over(drifts, (own.exponent - base.exponent) * DECADES)
    regret, loss = Estimate.over(regrets, mean(regrets)), Estimate.over(own.losses, mean(own.losses))
    return Transfer(axis, factor, parameterization, horizon, own.exponent, drift, own.bound, regret, loss)


def _vertex(left: float, middle: float, right: float) -> float:
    """Where the parabola through values at -1, 0 and 1 is least, within these; where the least is, if it has no minimum."""
    curvature = left - 2 * middle + right
    if curvature <= 0:
        return 0.0 if left == right else math.copysign(1.0, left - right)
    return min(1.0, max(-1.0, (left - right) / (2 * curvature)))


def _parabola(left: float, middle: float, right: float, offset: float) -> float:
    """Value at an offset of the parabola through values at -1, 0 and 1."""
    return middle + (right - left) / 2 * offset + (left - 2 * middle + right) / 2 * offset * offset
