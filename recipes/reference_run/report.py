"""Tables and figure of the study in ``reference_run.py``: distance against step, and its slopes against L, M and D."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from scipy.stats import linregress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "METRICS",
    "SWEEPS",
    "Distances",
    "Run",
    "Slope",
    "distance_table",
    "fit_slope",
    "save_figure",
    "slope_table",
]

METRICS = {"rms": "rms/s=1", "gram": "gram/s=1", "procrustes": "procrustes/s=1", "cka": "cka/s=1", "output": "output"}
"""Name in the logs, without "mlu/distance/", of each metric."""
LAST = 3
"""Recordings over which a final distance is averaged, those at 128, 181 and 200 steps."""
SWEEPS = {"L": (8, 4, 2), "M": (16, 8, 4, 2), "D": (16, 8, 4, 2), "L, M, D": (8, 4, 2)}
"""By what the reference's size is divided."""
THEORY = {
    "rms": {"L": "-1/2 to -1", "M": "-1/2", "D": "-1/2", "L, M, D": "-1/2"},
    "output": {"L": "-1", "M": "-1", "D": "-1/2", "L, M, D": "-1/2"},
}
"""Slopes of the terms of theory.md, section 2, that grow as a size becomes small."""


@dataclass(frozen=True)
class Run:
    """One run of the study.

    Args:
        axis: which sizes are smaller than the reference's, a key of ``SWEEPS``; empty for the reference itself.
        divisor: of these sizes.
        depth: of the model.
        heads: of the model.
        embedding: of the model.
        seed: of the weights in branches.
    """

    axis: str
    divisor: int
    depth: int
    heads: int
    embedding: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"L{2 * self.depth}-M{self.heads}-D{self.embedding}-seed{self.seed}"


@dataclass(frozen=True)
class Slope:
    """Of a line through logarithms.

    Args:
        value: d log y / d log x.
        error: its standard error, NaN if there are but two points.
        factor: y at x = 1.
    """

    value: float
    error: float
    factor: float

    def __str__(self) -> str:
        return f"{self.value:.2f}" if math.isnan(self.error) else f"{self.value:.2f} ± {self.error:.2f}"


@dataclass(frozen=True)
class Distances:
    """What a run logged.

    Args:
        run: whose log it is.
        loss: validation loss at the end, in nats per byte.
        curve: mean distance from the references by metric and step, and likewise their own mutual distance, the floor.
    """

    run: Run
    loss: float
    curve: Mapping[str, Mapping[int, float]]

    def final(self, key: str) -> float:
        """Root mean square of a metric, or of its floor, over the last recordings."""
        last = list(self.curve[key].values())[-LAST:]
        return math.sqrt(math.fsum(value**2 for value in last) / len(last))

    def beyond(self, metric: str) -> float:
        """Final distance without the reference's own part in it, NaN if nothing is left.

        Errors of two runs to their common limit are independent, so that squares of distances add: that of a small run
        from a reference is err(small)^2 + err(reference)^2, and that of two references 2 err(reference)^2. 1 - CKA is
        quadratic already.
        """
        power = 1 if metric == "cka" else 2
        left = self.final(metric) ** power - self.final(f"{metric}/floor") ** power / 2
        return left ** (1 / power) if left > 0 else math.nan


def distance_table(references: Sequence[Distances], found: Sequence[Distances]) -> Table:
    """Final distances, by what is smaller than in the reference."""
    table = Table(
        "smaller", "L", "M", "D", "val loss", *METRICS, title="Distance from the reference at the end of training"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for one in references:
        table.add_row("-", *_sizes(one.run), f"{one.loss:.3f}")
    table.add_section()
    for axis in SWEEPS:
        for one in _of(found, axis):
            table.add_row(
                axis, *_sizes(one.run), f"{one.loss:.3f}", *(f"{one.final(metric):.3g}" for metric in METRICS)
            )
        table.add_section()
    table.add_row("floor", "", "", "", "", *(f"{found[0].final(f'{metric}/floor'):.3g}" for metric in METRICS))
    return table


def slope_table(found: Sequence[Distances]) -> Table:
    """Fitted slopes, as logged and beyond the reference's own part."""
    table = Table(
        "metric", "against", "theory", "slope as logged", "slope beyond the floor", title="d log distance / d log size"
    )
    for metric in METRICS:
        for axis in SWEEPS:
            sweep = _of(found, axis)
            slopes = _slopes(sweep, metric)
            table.add_row(metric, axis, _theory(metric, axis, [one.run.divisor for one in sweep]), *map(str, slopes))
        table.add_section()
    return table


def fit_slope(sizes: Sequence[float], distances: Sequence[float]) -> Slope:
    """Least squares line through the logarithms of points; those that are not finite are left out.

    Args:
        sizes: x, positive.
        distances: y, positive or NaN.

    Returns:
        The slope, of NaNs if there are fewer than two points.

    >>> str(fit_slope([1, 4, 16], [3.0, 1.5, 0.75]))
    '-0.50 ± 0.00'
    """
    x, y = np.log(sizes), np.log(distances)
    known = np.isfinite(y)
    if known.sum() < 2:
        return Slope(math.nan, math.nan, math.nan)
    line = linregress(x[known], y[known])
    error = float(line.stderr) if known.sum() > 2 else math.nan
    return Slope(float(line.slope), error, math.exp(line.intercept))


def save_figure(found: Sequence[Distances], path: Path) -> None:
    """Draw the stream's distance against step for each sweep, and final distances against size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 4, height_ratios=(1, 1.3))
    curves = [figure.add_subplot(grid[0, 0])]
    curves += [figure.add_subplot(grid[0, place], sharey=curves[0]) for place in range(1, len(SWEEPS))]
    values = [value for one in found for key in ("rms", "rms/floor") for value in one.curve[key].values() if value > 0]
    _logarithmic(curves[0])
    curves[0].set_ylim(min(values) / 1.2, max(values) * 1.2)
    curves[0].set_ylabel("RMS distance of the stream at s = 1")
    for axes, axis in zip(curves, SWEEPS, strict=True):
        _draw_curves(axes, _of(found, axis), axis)
        axes.tick_params(labelleft=axes is curves[0], which="both")
    for place, (metric, title) in enumerate(
        {"rms": "RMS distance of the stream at s = 1", "output": "RMS distance of outputs"}.items()
    ):
        axes = figure.add_subplot(grid[1, 2 * place : 2 * place + 2])
        _draw_slopes(axes, found, metric)
        axes.set_title(f"{title}, end of training", loc="left", fontsize=11)
    figure.savefig(path, dpi=150)


def _sizes(run: Run) -> tuple[str, str, str]:
    """L, M and D."""
    return str(2 * run.depth), str(run.heads), str(run.embedding)


def _smaller(run: Run) -> str:
    """The sizes of a run that are smaller than the reference's."""
    sizes = dict(zip("LMD", _sizes(run), strict=True))
    return ", ".join(f"{axis}={sizes[axis]}" for axis in run.axis.split(", "))


def _theory(metric: str, axis: str, divisors: Sequence[int]) -> str:
    """Slope in theory; for D also against a finite reference with the same embedding.

    The term 1/sqrt(D) comes from averages over the stream's coordinates. Those of a small run are the first of the
    reference's, with the same embeddings, so that the variance of the difference is 1/D - 1/D_reference.
    """
    slope = THEORY.get(metric, {}).get(axis, "")
    if not slope or axis != "D":
        return slope
    finite = fit_slope([1 / divisor for divisor in divisors], [math.sqrt(divisor - 1) for divisor in divisors])
    return f"{slope} ({finite.value:.2f})"


def _of(found: Sequence[Distances], axis: str) -> list[Distances]:
    return sorted((one for one in found if one.run.axis == axis), key=lambda one: -one.run.divisor)


def _slopes(sweep: Sequence[Distances], metric: str) -> tuple[Slope, Slope]:
    """Of distances as logged, and beyond the reference's own part, against the fraction of the reference's size."""
    fractions = [1 / one.run.divisor for one in sweep]
    return fit_slope(fractions, [one.final(metric) for one in sweep]), fit_slope(
        fractions, [one.beyond(metric) for one in sweep]
    )


_COLORS = {"L": "#0072B2", "M": "#D55E00", "D": "#009E73", "L, M, D": "#AA4499"}
"""Of Okabe and Ito's and of Tol's palettes, which people with any colour vision can tell apart."""
_MARKERS = {"L": "o", "M": "s", "D": "^", "L, M, D": "D"}
_TITLES = {"L": "smaller depth L", "M": "smaller hidden width M", "D": "smaller embedding D", "L, M, D": "all smaller"}


def _draw_curves(axes: Axes, sweep: Sequence[Distances], axis: str) -> None:
    """Distance of the stream against step: the smaller the run, the darker its line."""
    lines = [(_smaller(one.run), one.curve["rms"]) for one in sweep]
    for place, (name, curve) in enumerate(lines):
        color = _paler(_COLORS[axis], 0.65 * place / (len(lines) - 1))
        axes.plot(list(curve), list(curve.values()), color=color, linewidth=2, label=name)
    floor = sweep[0].curve["rms/floor"]
    axes.plot(list(floor), list(floor.values()), color="black", linewidth=1.5, linestyle="--", label="floor")
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    axes.set_xlim(0, max(floor))
    ticks = [step for step in (0, 1, 10, 100, 1000) if step <= max(floor)]
    axes.set_xticks(ticks, [str(step) for step in ticks])
    axes.set_xlabel("step")
    axes.set_title(_TITLES[axis], loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8, loc="upper left", handlelength=1.5)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_slopes(axes: Axes, found: Sequence[Distances], metric: str) -> None:
    """Final distances against size: as logged, and beyond the floor with the line that was fitted."""
    for axis in SWEEPS:
        sweep, color, marker = _of(found, axis), _COLORS[axis], _MARKERS[axis]
        sizes = [1 / one.run.divisor for one in sweep]
        _, slope = _slopes(sweep, metric)
        axes.plot(sizes, [one.final(metric) for one in sweep], marker, color=color, markerfacecolor="white")
        axes.plot(sizes, [one.beyond(metric) for one in sweep], marker, color=color)
        axes.plot(sizes, [slope.factor * size**slope.value for size in sizes], color=color, linewidth=1.5)
        axes.plot([], [], f"{marker}-", color=color, label=f"{axis}: slope {slope}")
    floor = found[0].final(f"{metric}/floor")
    axes.axhline(floor, color="black", linewidth=1.5, linestyle="--")
    axes.annotate(
        "floor: two seeds of the reference",
        (min(1 / one.run.divisor for one in found), floor),
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=9,
    )
    axes.set_xscale("log", base=2)
    _logarithmic(axes)
    ticks = sorted({one.run.divisor for one in found}, reverse=True)
    axes.set_xticks([1 / divisor for divisor in ticks], [f"1/{divisor}" for divisor in ticks])
    axes.set_xlabel("size / the reference's (hollow: as logged, filled: beyond the floor)")
    axes.legend(frameon=False, fontsize=10, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    axes.spines[["top", "right"]].set_visible(False)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))


def _paler(color: str, share: float) -> tuple[float, float, float]:
    """Mix a color with a share of white."""
    red, green, blue = (int(color[start : start + 2], 16) / 255 for start in (1, 3, 5))
    return red + share * (1 - red), green + share * (1 - green), blue + share * (1 - blue)
