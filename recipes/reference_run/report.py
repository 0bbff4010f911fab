"""Tables and figure of the reference run: distance against step, and its slopes against L, M and D."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from mlu_lightning.utilities.fitted_tables import number_table
from recipes.common.figures import Axes, hide_spines, new_figure, plain_log_axis, size_axis
from recipes.common.fits import Slope, fit_slope, root_mean_square

METRICS = {"rms": "rms/s=1", "gram": "gram/s=1", "procrustes": "procrustes/s=1", "cka": "cka/s=1", "output": "output"}
"""Name in the logs, without "mlu/distance/", of each metric."""
LAST = 3  # recordings over which a final distance is averaged, those at 128, 181 and 200 steps
SWEEPS = {"L": (8, 4, 2), "M": (16, 8, 4, 2), "D": (16, 8, 4, 2), "L, M, D": (8, 4, 2)}
"""By what the reference's size is divided."""
THEORY = {
    "rms": {"L": "-1/2 to -1", "M": "-1/2", "D": "-1/2", "L, M, D": "-1/2"},
    "output": {"L": "-1", "M": "-1", "D": "-1/2", "L, M, D": "-1/2"},
}
"""Slopes of the terms of theory.md, section 2, that grow as a size becomes small."""


@dataclass(frozen=True)
class Run:
    """One run of the study."""

    axis: str  # which sizes are smaller than the reference's, a key of SWEEPS; empty for the reference itself
    divisor: int  # of these sizes
    depth: int
    heads: int
    embedding: int
    seed: int  # of the weights in branches

    @property
    def sizes(self) -> dict[str, str]:
        """L, M and D."""
        return {"L": str(2 * self.depth), "M": str(self.heads), "D": str(self.embedding)}

    @property
    def name(self) -> str:
        """Name of its folder."""
        return "-".join(axis + size for axis, size in self.sizes.items()) + f"-seed{self.seed}"


@dataclass(frozen=True)
class Distances:
    """What a run logged."""

    run: Run
    loss: float  # on validation at the end, nats per byte
    curve: Mapping[str, Mapping[int, float]]  # mean distance from the references by metric and step, and their floor

    def final(self, key: str) -> float:
        """Root mean square of a metric, or of its floor, over the last recordings."""
        return root_mean_square(list(self.curve[key].values())[-LAST:])

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
    title = "Distance from the reference at the end of training"
    table = number_table("smaller", "L", "M", "D", "val loss", *METRICS, title=title)
    for reference in references:
        table.add_row("-", *reference.run.sizes.values(), f"{reference.loss:.3f}")
    table.add_section()
    for axis in SWEEPS:
        for small in _of(found, axis):
            distances = (f"{small.final(metric):.3g}" for metric in METRICS)
            table.add_row(axis, *small.run.sizes.values(), f"{small.loss:.3f}", *distances)
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
            table.add_row(
                metric, axis, _theory(metric, axis, [small.run.divisor for small in sweep]), *map(str, slopes)
            )
        table.add_section()
    return table


def save_figure(found: Sequence[Distances], path: Path) -> None:
    """Draw the stream's distance against step for each sweep, and final distances against size."""
    figure = new_figure(11, 8.4)
    grid = figure.add_gridspec(2, 4, height_ratios=(1, 1.3))
    curves = [figure.add_subplot(grid[0, 0])]
    curves += [figure.add_subplot(grid[0, place], sharey=curves[0]) for place in range(1, len(SWEEPS))]
    values = [
        value for small in found for key in ("rms", "rms/floor") for value in small.curve[key].values() if value > 0
    ]
    plain_log_axis(curves[0])
    curves[0].set_ylim(min(values) / 1.2, max(values) * 1.2)
    curves[0].set_ylabel("RMS distance of the stream at s = 1")
    for axes, axis in zip(curves, SWEEPS, strict=True):
        _draw_curves(axes, _of(found, axis), axis)
        axes.tick_params(labelleft=axes is curves[0], which="both")
    titles = {"rms": "RMS distance of the stream at s = 1", "output": "RMS distance of outputs"}
    for place, (metric, title) in enumerate(titles.items()):
        axes = figure.add_subplot(grid[1, 2 * place : 2 * place + 2])
        _draw_slopes(axes, found, metric)
        axes.set_title(f"{title}, end of training", loc="left", fontsize=11)
    figure.savefig(path, dpi=150)


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
    return sorted((small for small in found if small.run.axis == axis), key=lambda small: -small.run.divisor)


def _slopes(sweep: Sequence[Distances], metric: str) -> tuple[Slope, Slope]:
    """Of distances as logged, and beyond the reference's own part, against the fraction of the reference's size."""
    fractions = [1 / small.run.divisor for small in sweep]
    values = [small.final(metric) for small in sweep], [small.beyond(metric) for small in sweep]
    return fit_slope(fractions, values[0]), fit_slope(fractions, values[1])


_COLORS = {"L": "#0072B2", "M": "#D55E00", "D": "#009E73", "L, M, D": "#AA4499"}
"""Of Okabe and Ito's and of Tol's palettes, which people with any colour vision can tell apart."""
_MARKERS = {"L": "o", "M": "s", "D": "^", "L, M, D": "D"}
_TITLES = {"L": "smaller depth L", "M": "smaller hidden width M", "D": "smaller embedding D", "L, M, D": "all smaller"}


def _draw_curves(axes: Axes, sweep: Sequence[Distances], axis: str) -> None:
    """Distance of the stream against step: the smaller the run, the darker its line."""
    for place, small in enumerate(sweep):
        curve, color = small.curve["rms"], _paler(_COLORS[axis], 0.65 * place / (len(sweep) - 1))
        name = ", ".join(f"{letter}={small.run.sizes[letter]}" for letter in axis.split(", "))
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
    hide_spines(axes)


def _draw_slopes(axes: Axes, found: Sequence[Distances], metric: str) -> None:
    """Final distances against size: as logged, and beyond the floor with the line that was fitted."""
    for axis in SWEEPS:
        sweep, color, marker = _of(found, axis), _COLORS[axis], _MARKERS[axis]
        sizes = [1 / small.run.divisor for small in sweep]
        _, slope = _slopes(sweep, metric)
        axes.plot(sizes, [small.final(metric) for small in sweep], marker, color=color, markerfacecolor="white")
        axes.plot(sizes, [small.beyond(metric) for small in sweep], marker, color=color)
        axes.plot(sizes, [slope.factor * size**slope.value for size in sizes], color=color, linewidth=1.5)
        axes.plot([], [], f"{marker}-", color=color, label=f"{axis}: slope {slope}")
    floor = found[0].final(f"{metric}/floor")
    axes.axhline(floor, color="black", linewidth=1.5, linestyle="--")
    plain_log_axis(axes)
    ticks = sorted({small.run.divisor for small in found}, reverse=True)
    place = 1 / ticks[0], floor
    axes.annotate("floor: two seeds of the reference", place, xytext=(0, 4), textcoords="offset points", fontsize=9)
    size_axis(axes, [1 / divisor for divisor in ticks], [f"1/{divisor}" for divisor in ticks])
    axes.set_xlabel("size / the reference's (hollow: as logged, filled: beyond the floor)")
    axes.legend(frameon=False, fontsize=10, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    hide_spines(axes)


def _paler(color: str, share: float) -> list[float]:
    """Mix a color with a share of white."""
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    return [part + share * (1 - part) for part in parts]
