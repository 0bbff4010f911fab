"""Slopes, verdicts and causes of checks, on measurements that are made up."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.check_reports import FACTORS, READ, noisy, points
from scipy import stats

from mlu_lightning import Shape
from mlu_lightning.checking.check import _at, _rows
from mlu_lightning.checking.measurement import Measured, Measurement
from mlu_lightning.checking.quantities import Kind, Quantity
from mlu_lightning.checking.sizes import Size, sizes
from mlu_lightning.checking.verdicts import Point, Row, find_causes, fit_row, overall_verdict


def test_slope_and_interval_are_those_of_a_regression_with_a_constant_for_each_seed() -> None:
    """By the formulas of textbooks: demean by seed, then simple regression."""
    measured = points(noisy(0.3, 0.1))
    row = fit_row(READ, "depth", measured)
    x, y = (np.log([getattr(p, what) for p in measured]).reshape(4, 3) for what in ("factor", "value"))
    x, y = x - x.mean(0), y - y.mean(0)
    slope = (x * y).sum() / (x * x).sum()
    residual = ((y - slope * x) ** 2).sum() / (12 - 3 - 1)
    assert row.slope == pytest.approx(slope, rel=1e-9)
    assert row.error == pytest.approx(stats.t.ppf(0.975, 8) * math.sqrt(residual / (x * x).sum()), rel=1e-9)


@pytest.mark.parametrize(
    ("power", "noise", "verdict"),
    [
        *[(0.0, 0.02, "pass"), (0.2, 0.02, "pass"), (0.5, 0.02, "fail"), (-0.5, 0.02, "fail"), (1.0, 0.1, "fail")],
        (0.33, 0.001, "undecided"),  # neither: more than drift, and less than a fault
        (0.1, 1.0, "undecided"),  # both
    ],
)
def test_verdict(power: float, noise: float, verdict: str) -> None:
    assert fit_row(READ, "depth", points(noisy(power, noise))).verdict == verdict


@pytest.mark.parametrize(
    ("law", "seeds", "factors", "verdict", "reason"),
    [
        *((lambda f, s: 1.0, seeds, (1, 2), "undecided", "there are too few sizes or seeds") for seeds in (1, 4)),
        (lambda f, s: 0.0, 3, FACTORS, "pass", "it does not move at any size"),
        (lambda f, s: float(f > 1), 3, FACTORS, "undecided", "it does not move in some runs"),
        (lambda f, s: math.nan if f == 8 else 1.0, 3, FACTORS, "fail", "it is not finite"),
        (lambda f, s: math.inf if f == 8 else 1.0, 3, FACTORS, "fail", "it is not finite"),
    ],
)
def test_without_a_slope(law: Any, seeds: int, factors: tuple[int, ...], verdict: str, reason: str) -> None:
    row = fit_row(READ, "depth", points(law, seeds, factors))
    assert (row.verdict, row.reason) == (verdict, reason) and math.isnan(row.slope)
    assert str(row) == f"update of blocks.*.read.weight (branch_in), depth: {reason}"


@pytest.mark.parametrize("kind", [Kind.FEATURES, Kind.STREAM, Kind.OUTPUT])
def test_a_run_in_which_nothing_moves_is_no_success(kind: Kind) -> None:
    still = Quantity(kind, "output"), "depth", points(lambda f, s: 0.0)
    row, data = fit_row(*still), fit_row(*still, may_be_still=True)
    assert (row.verdict, row.reason) == ("undecided", "it does not move")
    assert (data.verdict, data.reason) == ("pass", "it does not move at any size")


def measured_along(depth: int, value: Callable[[float], float], shift: float = 0.0) -> tuple[Measurement, ...]:
    along = tuple((i + shift) / depth for i in range(depth))
    return (Measurement(Quantity(Kind.FEATURES, "blocks.* (mlp)"), tuple(map(value, along)), along),)


@pytest.mark.parametrize("shift", [0.0, 0.5])  # of a Transformer's attentions and perceptrons
def test_features_are_compared_at_the_same_relative_depths(shift: float) -> None:
    grid = sizes(Shape(1, 2, 8), (1, 2, 4, 8), ["depth"])

    def along(size: Size, seed: int) -> tuple[Measurement, ...]:
        return measured_along(size.factor, lambda s: (seed + 1) * math.exp(3 * s), shift)

    runs = {(size.shape, seed): along(size, seed) for size in grid for seed in range(3)}
    (row,) = _rows(grid, {key: Measured(found, {}) for key, found in runs.items()})
    assert row.slope == pytest.approx(0, abs=1e-9)
    plain = {key: Measured((replace(found[0], depths=()),), {}) for key, found in runs.items()}
    (row,) = _rows(grid, plain)  # as the mean over all places
    assert shift or row.slope > 0.5


def test_features_at_two_depths_and_at_four() -> None:
    """Linear in between: at s = 1/4 and 3/4 of values at 1/8, 3/8, 5/8, 7/8, in logarithms."""
    one = measured_along(4, lambda s: 2 ** (8 * s), 0.5)[0]
    assert _at((0.25, 0.75), one) == pytest.approx((2**2, 2**6))
    assert math.isnan(_at((0.25,), replace(one, values=(math.nan, 1.0, 1.0, 1.0)))[0]), "is seen"


def test_one_branch_among_many_that_is_wrong_is_seen() -> None:
    """Of sixteen branches one grows: the mean hardly does."""
    measured = [Point(f, s, f ** (1 / 16), 1.0, float(f)) for f in FACTORS for s in range(3)]
    row = fit_row(READ, "depth", measured)
    assert row.verdict == "fail" and row.slope == pytest.approx(1)
    assert str(row).endswith("grows as depth^1.00±0.00 next to what is expected, at the place where it is largest")
    features = fit_row(Quantity(Kind.FEATURES, "blocks.* (mlp)"), "depth", measured)
    assert features.verdict == "pass", "features are not the same at all depths"


def made(kind: Kind, name: str, role: str | None, slope: float, axis: str = "depth") -> Row:
    quantity = Quantity(kind, name, role)
    return Row(quantity, axis, slope, 0.01, fit_row(quantity, axis, points(noisy(slope, 0.01))).verdict)


def test_cause_is_the_earliest_kind_that_fails() -> None:
    start, right = made(Kind.START, "a", "branch_out", 1.0), made(Kind.START, "b", "branch_in", 0.0)
    update, decay = made(Kind.UPDATE, "b", "branch_in", -1.0), made(Kind.DECAY, "b", "branch_in", 1.0)
    stream = made(Kind.STREAM, "s=1", None, 2.0)

    def causes(*rows: Row) -> list[tuple[str, str]]:
        return [(cause.role, cause.factor) for cause in find_causes(rows)]

    assert causes(start, right, update, decay, stream) == [("branch_out", "multiplier or std")]
    assert causes(right, update, decay, stream) == [("branch_in", "lr")]
    assert causes(update) == [("branch_in", "lr or eps")] and causes(decay) == [("branch_in", "weight decay")]
    assert causes(stream) == [("s=1", "numbers")] and causes(right) == []


def test_effects_that_are_noisy_do_not_make_a_check_undecided() -> None:
    passes = made(Kind.UPDATE, "a", "branch_in", 0.0)
    noise = Row(Quantity(Kind.EFFECT_ON_STREAM, "branch_in", "branch_in"), "depth", 0.1, 3.0, "undecided")
    assert overall_verdict([passes, noise]) == "pass"
    assert overall_verdict([passes, made(Kind.EFFECT_ON_STREAM, "readout", "readout", 3.0)]) == "fail"
    assert overall_verdict([passes, Row(READ, "depth", 0.1, 3.0, "undecided")]) == "undecided"
    assert overall_verdict([]) == "undecided"
