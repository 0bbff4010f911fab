"""Slopes, verdicts and causes of checks, on measurements that are made up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mlu_lightning import Shape
from mlu_lightning.checking.check import _at, _rows
from mlu_lightning.checking.figure import draw_check
from mlu_lightning.checking.measurement import Measurement
from mlu_lightning.checking.quantities import Kind, Quantity, expected_powers, lowest_and_highest
from mlu_lightning.checking.report import CheckReport
from mlu_lightning.checking.sizes import AXES, sizes
from mlu_lightning.checking.verdicts import Point, Row, find_causes, fit_row, overall_verdict
from mlu_lightning.table import OptimizerFamily, Ratios, Role, Variant, scale

READ = Quantity("update", "blocks.*.read.weight", "branch_in")
FACTORS = (1, 2, 4, 8)


def points(law: Callable[[int, int], float], seeds: int = 3, factors: tuple[int, ...] = FACTORS) -> list[Point]:
    return [Point(f, seed, *[law(f, seed)] * 3) for f in factors for seed in range(seeds)]


def noisy(power: float, noise: float) -> Callable[[int, int], float]:
    draws = np.random.default_rng(0).normal(size=(9, 9)) * noise
    return lambda factor, seed: float((1 + seed) * factor**power * math.exp(draws[factor.bit_length(), seed]))


def test_slope_and_interval_are_those_of_a_regression_with_a_constant_for_each_seed() -> None:
    """Against numbers that statsmodels-like textbook formulas give: demean by seed, then simple regression."""
    measured = points(noisy(0.3, 0.1))
    row = fit_row(READ, "depth", measured)
    x = np.log([p.factor for p in measured]).reshape(4, 3)
    y = np.log([p.value for p in measured]).reshape(4, 3)
    x, y = x - x.mean(0), y - y.mean(0)
    slope = (x * y).sum() / (x * x).sum()
    residual = ((y - slope * x) ** 2).sum() / (12 - 3 - 1)
    assert row.slope == pytest.approx(slope, rel=1e-9)
    assert row.error == pytest.approx(stats.t.ppf(0.975, 8) * math.sqrt(residual / (x * x).sum()), rel=1e-9)


@pytest.mark.parametrize(
    ("power", "noise", "verdict"),
    [
        (0.0, 0.02, "pass"),
        (0.2, 0.02, "pass"),
        (0.33, 0.001, "undecided"),  # neither: more than drift, and less than a fault
        (0.5, 0.02, "fail"),
        (-0.5, 0.02, "fail"),
        (1.0, 0.1, "fail"),
        (0.1, 1.0, "undecided"),  # both
    ],
)
def test_verdict(power: float, noise: float, verdict: str) -> None:
    assert fit_row(READ, "depth", points(noisy(power, noise))).verdict == verdict


@pytest.mark.parametrize(
    ("law", "seeds", "factors", "verdict", "reason"),
    [
        (lambda f, s: 1.0, 1, (1, 2), "undecided", "there are too few sizes or seeds"),
        (lambda f, s: 1.0, 4, (1, 2), "undecided", "there are too few sizes or seeds"),
        (lambda f, s: 0.0, 3, FACTORS, "pass", "it does not move at any size"),
        (lambda f, s: float(f > 1), 3, FACTORS, "undecided", "it does not move in some runs"),
        (lambda f, s: math.nan if f == 8 else 1.0, 3, FACTORS, "fail", "it is not finite"),
        (lambda f, s: math.inf if f == 8 else 1.0, 3, FACTORS, "fail", "it is not finite"),
    ],
)
def test_without_a_slope(law: Any, seeds: int, factors: tuple[int, ...], verdict: str, reason: str) -> None:
    row = fit_row(READ, "depth", points(law, seeds, factors))
    assert (row.verdict, row.reason) == (verdict, reason)
    assert math.isnan(row.slope)
    assert str(row) == f"update of blocks.*.read.weight (branch_in), depth: {reason}"


@pytest.mark.parametrize("kind", ["features", "stream", "output"])
def test_a_run_in_which_nothing_moves_is_no_success(kind: Kind) -> None:
    row = fit_row(Quantity(kind, "output"), "depth", points(lambda f, s: 0.0, 3, FACTORS))
    assert (row.verdict, row.reason) == ("undecided", "it does not move")


def measured_along(depth: int, value: Callable[[float], float], shift: float = 0.0) -> tuple[Measurement, ...]:
    """What moves as a function of the relative depth."""
    along = tuple((i + shift) / depth for i in range(depth))
    return (Measurement(Quantity("features", "blocks.* (mlp)"), tuple(map(value, along)), along),)


@pytest.mark.parametrize("shift", [0.0, 0.5])  # of a Transformer's attentions and perceptrons
def test_features_are_compared_at_the_same_relative_depths(shift: float) -> None:
    grid = sizes(Shape(1, 2, 8), (1, 2, 4, 8), ["depth"])

    def grows(seed: int, s: float) -> float:
        return (seed + 1) * math.exp(3 * s)

    runs = {
        (size.shape, seed): measured_along(size.factor, partial(grows, seed), shift)
        for size in grid
        for seed in range(3)
    }
    (row,) = _rows(grid, runs)
    assert row.slope == pytest.approx(0, abs=1e-9)
    plain = {key: (replace(found[0], depths=()),) for key, found in runs.items()}
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
    assert row.verdict == "fail"
    assert row.slope == pytest.approx(1)
    assert str(row).endswith("grows as depth^1.00±0.00 next to what is expected, at the place where it is largest")
    features = fit_row(Quantity("features", "blocks.* (mlp)"), "depth", measured)
    assert features.verdict == "pass", "features are not the same at all depths"


def made(kind: Kind, name: str, role: str | None, slope: float, axis: str = "depth") -> Row:
    verdict = fit_row(Quantity(kind, name, role), axis, points(noisy(slope, 0.01))).verdict
    return Row(Quantity(kind, name, role), axis, slope, 0.01, verdict, "", ())


def test_cause_is_the_earliest_kind_that_fails() -> None:
    rows = [
        made("start", "a", "branch_out", 1.0),
        made("start", "b", "branch_in", 0.0),
        made("update", "b", "branch_in", -1.0),
        made("decay", "b", "branch_in", 1.0),
        made("stream", "s=1", None, 2.0),
    ]
    assert [(cause.role, cause.factor) for cause in find_causes(rows)] == [("branch_out", "multiplier or std")]
    assert [(cause.role, cause.factor) for cause in find_causes(rows[1:])] == [("branch_in", "lr")]
    assert [(cause.role, cause.factor) for cause in find_causes(rows[2:3])] == [("branch_in", "lr or eps")]
    assert [(cause.role, cause.factor) for cause in find_causes(rows[3:4])] == [("branch_in", "weight decay")]
    assert [(cause.role, cause.factor) for cause in find_causes(rows[4:])] == [("s=1", "numbers")]
    assert find_causes(rows[1:2]) == ()


def test_effects_that_are_noisy_do_not_make_a_check_undecided() -> None:
    passes = made("update", "a", "branch_in", 0.0)
    noise = Row(Quantity("effect on stream", "branch_in", "branch_in"), "depth", 0.1, 3.0, "undecided", "", ())
    assert overall_verdict([passes, noise]) == "pass"
    assert overall_verdict([passes, made("effect on stream", "readout", "readout", 3.0)]) == "fail"
    assert overall_verdict([passes, Row(READ, "depth", 0.1, 3.0, "undecided", "", ())]) == "undecided"
    assert overall_verdict([]) == "undecided"


def table_says(role: Role, variant: Variant | None, ratios: Ratios, kind: Kind) -> float:
    """What start and update of a role are by the table: std times inputs added at random; Adam's lr times all inputs."""
    entry = scale(role, ratios, OptimizerFamily.ADAMW, variant=variant)
    if kind == "start":
        return entry.multiplier * entry.std * math.sqrt(ratios.inputs)
    return entry.multiplier * entry.lr * ratios.inputs


@pytest.mark.parametrize(
    ("role", "variant"),
    [
        *((role, None) for role in Role),
        (Role.BRANCH_OUT, Variant.BEFORE_NORM),
        (Role.STREAM_NORM, Variant.POST_NORM),
        (Role.STREAM_MATRIX, Variant.IN_HEAD),
    ],
)
@pytest.mark.parametrize("kind", ["start", "update"])
def test_expectations_of_the_theory_are_what_the_table_makes(role: Role, variant: Variant | None, kind: Kind) -> None:
    """Two statements of one theory: sizes that should not change, and the factors by which they do not."""
    ratios = Ratios(depth=3.0, inputs=5.0, outputs=7.0)
    if not role.is_matrix:
        ratios = Ratios(depth=3.0, outputs=7.0)
    if role is Role.EMBEDDING:
        ratios = Ratios(outputs=7.0)
    writes = role in (Role.BRANCH_OUT, Role.BRANCH_OUT_BIAS)
    expected = expected_powers(kind, role, writes, variant, ratios)(ratios)
    assert expected == pytest.approx(table_says(role, variant, ratios, kind), rel=1e-12)


def test_band_of_what_happens_at_random() -> None:
    assert lowest_and_highest(READ, "hidden") == (-0.25, 0.25)
    assert lowest_and_highest(Quantity("update", "norm", "branch_norm"), "hidden") == (-0.75, 0.25)
    assert lowest_and_highest(Quantity("update", "norm", "branch_norm"), "embedding") == (-0.25, 0.75)
    assert lowest_and_highest(Quantity("start", "norm", "branch_norm"), "hidden") == (-0.25, 0.25)


def test_sizes() -> None:
    grid = sizes(Shape(2, 3, 5), (1, 2, 4))
    assert [(s.shape.depth, s.shape.hidden, s.shape.embedding) for s in grid] == [
        *((2 * f, 3, 5) for f in (1, 2, 4)),
        *((2, 3 * f, 5) for f in (1, 2, 4)),
        *((2, 12, 5 * f) for f in (1, 2, 4)),
        *((2 * f, 3 * f, 5 * f) for f in (1, 2)),
    ]
    assert {s.axis for s in sizes(Shape(2, 3, 5), (1, 2), ["hidden"])} == {"hidden"}
    for factors in ((), (1,), (2, 4), (1, 4, 2), (1, 1)):
        with pytest.raises(ValueError, match="should be two or more that ascend from 1"):
            sizes(Shape(2, 3, 5), factors)
    for axes in ([], ["width"]):
        with pytest.raises(ValueError, match="should be some of: depth, hidden, embedding, together"):
            sizes(Shape(2, 3, 5), FACTORS, axes)


@pytest.fixture
def report() -> CheckReport:
    def rows() -> Iterator[Row]:
        for axis in AXES:
            yield fit_row(READ, axis, points(noisy(1.0 if axis == "hidden" else 0.0, 0.01)))
            yield fit_row(Quantity("features", "blocks.* (mlp)"), axis, points(lambda f, s: math.nan))
            yield fit_row(Quantity("effect on stream", "branch_in", "branch_in"), axis, points(noisy(0.1, 0.01)))

    return CheckReport(Shape(2, 3, 4), FACTORS, 3, 5, tuple(rows()), ("post-norm",))


def test_report_as_json_and_back(report: CheckReport, tmp_path: Path) -> None:
    report.save(tmp_path / "folder")
    text = (tmp_path / "folder" / "check.json").read_text()
    again = CheckReport.from_json(text)
    assert str(again) == str(report)
    assert again.to_json() == text
    content = json.loads(text)
    assert content["verdict"] == "fail"
    assert set(content["rows"][0]["points"][0]) == {"factor", "seed", "value", "lowest", "highest"}
    assert content["rows"][1]["points"][0]["value"] is None, "JSON has no NaN"
    assert (tmp_path / "folder" / "check.txt").read_text() == f"{report}\n"
    assert (tmp_path / "folder" / "check.png").read_bytes()[:4] == b"\x89PNG"
    for wrong in ("", "[]", "{}", text.replace('"rows"', '"lines"')):
        with pytest.raises(ValueError, match="This is not a report of a check"):
            CheckReport.from_json(wrong)


def test_report_says_what_fails(report: CheckReport) -> None:
    text = str(report)
    assert "FAIL: 7 pass, 5 fail, 0 undecided" in text
    assert "branch_in: look at its lr or eps; update of blocks.*.read.weight (branch_in) grows as hidden^1.0" in text
    assert "Failing too, which may follow from that: blocks.* (mlp)" in text
    assert "Warning: post-norm." in text
    assert max(map(len, text.splitlines())) <= 125


def test_figure_names_what_fails(report: CheckReport) -> None:
    figure = draw_check(report)
    panels = {(axes.get_title(loc="left"), axes.get_ylabel()): axes for axes in figure.axes}
    assert {title for title, _ in panels} >= set(AXES)
    named = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert named == {"branch_in"}
    assert figure.get_suptitle().startswith("FAIL")
