"""The search for the best learning rate, what is fitted to its losses, and how tables and figures show it."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from mlu_lightning.tuning.found import Estimate
from recipes.lr_transfer import figures, report, search
from recipes.lr_transfer.run import STUDIES
from recipes.lr_transfer.runs import Run, Study

Loss = Callable[[dict[str, int], str, float, int], float]


def made_up(study: Study, shared: dict[Any, str], loss: Loss) -> list[Run]:
    """Runs of a complete search, with losses by a formula."""
    runs: list[Run] = []
    while missing := search.missing_runs(study, shared, runs):
        losses = [loss(dict(run.shape), run.parameterization, run.exponent, run.seed) for run in missing]
        runs += [replace(run, losses=(value,)) for run, value in zip(missing, losses, strict=True)]
    return runs


@pytest.fixture
def study() -> Study:
    """One axis of three sizes, two parameterizations."""
    changes = {"axes": {"depth": {"depth": [2, 4, 8]}}, "parameterizations": ["mlu", "sp"]}
    return Study(**STUDIES["cpu"] | changes | {"exponents": [-7.0, -6.5, -6.0, -5.5, -5.0]})


@pytest.fixture
def shared(study: Study) -> dict[Any, str]:
    """At the base, runs of both parameterizations are the same."""
    pairs = itertools.product(study.shapes("depth").values(), study.parameterizations)
    return {(shape, name): "mlu" if shape == study.base else name for shape, name in pairs}


def valley(shape: dict[str, int], parameterization: str, exponent: float, seed: int) -> float:
    """Least at 2^-6.1, with SP by 0.7 octaves less for each doubling; seeds are 0.1 octaves apart, and 0.2 more for each."""
    doublings = math.log2(shape["depth"] / 2)
    bottom = -6.1 - 0.7 * doublings * (parameterization == "sp") + (0.1 + 0.2 * doublings) * (seed - 1)
    return 2 - 0.1 * doublings + 0.05 * (exponent - bottom) ** 2 + 0.01 * seed


def test_best_learning_rate_is_the_vertex_that_numpy_finds() -> None:
    draws, exponents = np.random.default_rng(0), np.array([-8.0, -7.0, -6.0, -5.0])
    losses = 2 + 0.1 * (exponents[:, None] + 6.2) ** 2 + 0.01 * draws.standard_normal((4, 3))
    found = search.best({x: tuple(values) for x, values in zip(exponents, losses, strict=True)})
    curvature, slope, constant = np.polyfit(exponents[1:], losses[1:].mean(1), 2)
    vertex = -slope / (2 * curvature)
    each = [np.polyfit(exponents[1:], losses[1:, seed], 2) for seed in range(3)]
    assert (found.tried, found.bound) == (-6.0, "") and found.exponent == pytest.approx(vertex)
    assert found.seeds == pytest.approx([-b / (2 * a) for a, b, _ in each])
    assert found.losses == pytest.approx([np.polyval(parabola, vertex) for parabola in each])
    assert np.mean(found.losses) == pytest.approx(constant - slope**2 / (4 * curvature))


def test_nothing_is_extrapolated() -> None:
    falling = search.best({-7.0: (3.0,), -6.0: (2.0,), -5.0: (1.0,)})
    assert (falling.exponent, falling.bound, falling.losses) == (-5.0, "≥", (1.0,))
    rising = search.best({-7.0: (1.0,), -6.0: (2.0,), -5.0: (3.0,)})
    assert (rising.exponent, rising.bound) == (-7.0, "≤")
    diverged = search.best({-7.0: (3.0, 3.0), -6.0: (2.0, 2.0), -5.0: (1.0, math.nan)})
    assert (diverged.exponent, diverged.bound) == (-6.0, ""), "that some of its runs diverged says where it ends"
    # a seed whose own losses fall: no further than an octave
    assert search.best({-7.0: (3.0, 3.0), -6.0: (2.0, 1.0), -5.0: (1.5, 4.0)}).seeds[0] == -5.0


def test_error_is_that_of_numpy() -> None:
    values = (0.3, -0.1, 0.7, 0.2)
    found = Estimate.over(values, 1.0)
    assert (found.value, found.error) == (1.0, pytest.approx(np.std(values, ddof=1) / 2))
    assert math.isnan(Estimate.over((0.3,), 1.0).error) and Estimate(1.0, math.nan).text(2) == "1.00"
    assert Estimate(-0.123, 0.0456).text(2) == "-0.12 ± 0.05"


def test_search_and_its_result(study: Study, shared: dict[Any, str]) -> None:
    runs = made_up(study, shared, valley)
    tried: dict[tuple[int, str], set[float]] = {}
    for run in runs:
        tried.setdefault((dict(run.shape)["depth"], run.parameterization), set()).add(run.exponent)
    expected = {
        (2, "mlu"): {-7.0, -6.5, -6.0, -5.5, -5.0},
        (4, "mlu"): {-7.0, -6.0, -5.0},
        (8, "mlu"): {-7.0, -6.0, -5.0},
    }
    expected |= {(4, "sp"): {-8.0, -7.0, -6.0, -5.0}, (8, "sp"): {-9.0, -8.0, -7.0, -6.0, -5.0}}
    assert tried == expected and len(runs) == len(set(runs)) == 3 * 20
    found = {(one.factor, one.parameterization): one for one in search.transfers(study, shared, runs)}
    assert found.keys() == set(itertools.product((1, 2, 4), ("mlu", "sp")))
    for (factor, parameterization), one in found.items():
        doublings = math.log2(factor)
        lower = 0.7 * doublings * (parameterization == "sp")
        assert one.exponent == pytest.approx(-6.1 - lower)
        assert one.drift.value == pytest.approx(-lower * math.log10(2), abs=1e-9)
        # each seed is compared with itself, so that what they are apart at the base is not in the error
        assert one.drift.error == pytest.approx(0.2 * doublings * math.log10(2) / math.sqrt(3), abs=1e-9)
        assert one.regret.value == pytest.approx(0.05 * (0.1 + lower) ** 2), "at 2^-6, the base's best of those tried"
        assert one.loss.value == pytest.approx(2.01 - 0.1 * doublings + 0.05 * (0.1 + 0.2 * doublings) ** 2 * 2 / 3)
    assert report.slope_of([found[factor, "sp"] for factor in (1, 2, 4)]).value == pytest.approx(-0.7)


def test_search_ends_where_losses_fall_for_ever(study: Study, shared: dict[Any, str]) -> None:
    def loss(shape: dict[str, int], parameterization: str, exponent: float, seed: int) -> float:
        return valley(shape, parameterization, exponent, seed) if shape["depth"] == 2 else 2 + 0.1 * exponent

    found = search.transfers(study, shared, made_up(study, shared, loss))
    grown = {(one.exponent, one.bound, one.drift.value < -1.9) for one in found if one.factor > 1}
    assert grown == {(-7.0 - search.LIMIT, "≤", True)}


def test_best_learning_rates_of_all_horizons_are_searched(study: Study, shared: dict[Any, str]) -> None:
    """The best learning rate is 2^-5.5 at 1 step, 2^-8.5 at 4: one run gives both."""
    long = replace(study, horizons=[1, 4], spacing=1.0)
    runs: list[Any] = []
    while missing := search.missing_runs(long, shared, runs):
        runs += [replace(run, losses=((run.exponent + 5.4) ** 2, (run.exponent + 8.4) ** 2)) for run in missing]
    found = search.transfers(long, shared, runs)
    assert {(one.horizon, round(one.exponent, 6)) for one in found} == {(1, -5.4), (4, -8.4)}


def test_summary_is_of_the_largest_size_and_marks_the_least(study: Study, shared: dict[Any, str]) -> None:
    def loss(shape: dict[str, int], name: str, exponent: float, seed: int) -> float:
        return valley(shape, name, exponent, 1) - 0.5 * (name == "sp" and shape["depth"] == 8)

    def table(found: Any) -> list[list[str]]:
        columns = report.summary_table(study, found).columns
        return [[str(cell) for cell in row] for row in zip(*(column.cells for column in columns), strict=True)]

    # the least loss of SP is 2.01 - 0.2 - 0.5, its best learning rate 2^-7.5 instead of 2^-6.1
    found = search.transfers(study, shared, made_up(study, shared, loss))
    mlu, sp = table(found)
    assert mlu[:4] == ["depth", "MLU", "3 of 3", "[bold]+0.00 ± 0.00*[/bold]"]
    assert sp[:5] == ["depth", "SP", "3 of 3", "-0.42 ± 0.00 ", "-0.70 ± 0.00"]
    assert mlu[5:] == ["[bold]0.001 ± 0.000*[/bold]", "1.810 ± 0.000 "]
    assert sp[5:] == ["0.113 ± 0.000 ", "[bold]1.310 ± 0.000*[/bold]"]
    # nothing is said of a largest size that there was no time for
    partial = table([one for one in found if (one.factor, one.parameterization) != (4, "sp")])
    assert partial[1][2:3] + partial[1][5:] == ["2 of 3", "-", "-"] and partial[0][6] == "[bold]1.810 ± 0.000*[/bold]"


def test_figure_shows_what_was_measured(study: Study, shared: dict[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    runs = made_up(study, shared, valley)
    figures.save_figure(study, search.transfers(study, shared, runs), Path("a.png"))
    drift, regret, loss = drawn[0].axes
    wanted = [[0, 0, 0], [0, -0.7 * math.log10(2), -1.4 * math.log10(2)]]
    drawn_drifts = [bars[0].get_ydata().tolist() for bars in drift.containers]
    np.testing.assert_allclose(drawn_drifts, wanted, rtol=0, atol=1e-9)
    assert regret.containers[1][0].get_ydata() == pytest.approx([0.0005, 0.032, 0.1125])
    assert loss.containers[0][0].get_xdata().tolist() == [1, 2, 4]
    figures.save_curves(study, shared, runs, Path("b.png"))
    dots = [line.get_xdata()[0] for line in drawn[1].axes[1].lines if line.get_marker() == "o"]
    assert dots == pytest.approx([2**-6.1, 2**-6.8, 2**-7.5])
