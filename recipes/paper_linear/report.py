"""Table and figure of the paper's linear experiment: slopes of errors, streams over depth, and their distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table

from mlu_lightning.utilities.fitted_tables import number_table
from recipes.common.figures import Axes, hide_spines, new_figure, size_axis
from recipes.common.fits import Slope, fit_slope, root_mean_square

Kept = Literal["", "trace", "histogram"]

PARTS = {"": "all of it", "_of_depth_and_hidden": "part of L and M", "_of_embedding": "part of D"}
"""Of an error, by the ending of its name."""

THEORY = {"stream": {"L": "-1/2", "M": "-1/2", "D": "-1/2"}, "output": {"L": "-1", "M": "-1", "D": "-1/2"}}
"""Slopes of sqrt(D/(L M)), of D/(L M) and of 1/sqrt(D) (theory.md, section 2)."""


@dataclass(frozen=True)
class Point:
    """Errors of one network: root mean square distances from the infinite model."""

    axis: str  # of its sweep: L, M or D
    depth: int
    hidden: int
    embedding: int
    seed: int
    stream: float  # at s = 1 after training
    output: float  # over the steps of training
    stream_of_depth_and_hidden: float  # distance from the limit of L and M alone
    output_of_depth_and_hidden: float
    stream_of_embedding: float  # distance of that limit from the infinite model
    output_of_embedding: float

    @property
    def size(self) -> int:
        """What is changed in its sweep."""
        return {"L": self.depth, "M": self.hidden, "D": self.embedding}[self.axis]


@dataclass(frozen=True)
class Streams:
    """Coordinates of a network's stream after training, and those of its limit."""

    kept: Kept  # what for
    shape: tuple[int, int, int]  # L, M, D
    depths: list[float]  # relative
    coordinates: list[list[float]]  # h at each depth
    limits: list[list[float]]  # W a at each depth
    deviations: list[float]  # |ã| at each depth


def sweep(points: Sequence[Point], axis: str, error: str) -> dict[int, list[float]]:
    """Errors of all seeds, by size, in the sweep of an axis; ``error`` is the name of one in :class:`Point`."""
    found: dict[int, list[float]] = {}
    for point in sorted((point for point in points if point.axis == axis), key=lambda point: point.size):
        found.setdefault(point.size, []).append(getattr(point, error))
    return found


def slope(points: Sequence[Point], axis: str, error: str) -> Slope:
    """Fit a line to the logarithms of root mean squares over seeds."""
    found = sweep(points, axis, error)
    return fit_slope(list(found), [root_mean_square(values) for values in found.values()])


def slope_table(points: Sequence[Point]) -> Table:
    """Fitted slopes beside those of theory, of errors and of the part in them that has this slope."""
    columns = "error of", "against", "from", "to", "theory", "slope", "smallest", "largest"
    table = number_table(*columns, words=2, title="d log error / d log size")
    for kind in ("stream", "output"):
        for axis in "LMD":
            for ending in ("", _own_part(axis)):
                found = sweep(points, axis, kind + ending)
                errors = [root_mean_square(values) for values in found.values()]
                sizes, ends = map(str, (min(found), max(found))), (f"{min(errors):.3g}", f"{max(errors):.3g}")
                fitted = str(slope(points, axis, kind + ending))
                table.add_row(f"{kind}, {PARTS[ending]}", axis, *sizes, THEORY[kind][axis], fitted, *ends)
        table.add_section()
    return table


def save_figure(points: Sequence[Point], streams: Sequence[Streams], path: Path) -> None:
    """Draw errors against L, M and D, coordinates of streams over depth, and their distribution."""
    figure = new_figure(12, 11)
    rows = figure.subfigures(3, 1, height_ratios=(1.25, 1, 1), hspace=0.03)
    panels = rows[0].subplots(1, 3, sharey=True)
    for axes, axis in zip(panels, "LMD", strict=True):
        _draw_errors(axes, points, axis)
    panels[0].set_ylabel("root mean square error")
    _draw_traces(rows[1], [kept for kept in streams if kept.kept == "trace"])
    _draw_histograms(rows[2], [kept for kept in streams if kept.kept == "histogram"])
    figure.savefig(path, dpi=150)


_STYLES = {"stream": ("#0072B2", "o"), "output": ("#D55E00", "s")}
_SHADES = ("#88CCEE", "#44AA99", "#332288")
"""Of Okabe and Ito's and of Tol's palettes, which people with any colour vision can tell apart."""


def _own_part(axis: str) -> str:
    return "_of_embedding" if axis == "D" else "_of_depth_and_hidden"


def _draw_errors(axes: Axes, points: Sequence[Point], axis: str) -> None:
    """Errors with the spread over seeds, and (hollow) the part of what is changed, with its fitted line."""
    for kind, (color, marker) in _STYLES.items():
        found = sweep(points, axis, kind)
        sizes = list(found)
        means = [root_mean_square(values) for values in found.values()]
        spread = [
            [mean - min(values) for mean, values in zip(means, found.values(), strict=True)],
            [max(values) - mean for mean, values in zip(means, found.values(), strict=True)],
        ]
        fitted = slope(points, axis, kind)
        label = f"{kind}: slope {fitted}"
        axes.errorbar(sizes, means, spread, fmt=marker, color=color, capsize=3, label=label, zorder=3)
        axes.plot(sizes, [fitted.factor * size**fitted.value for size in sizes], color=color)
        part = sweep(points, axis, kind + _own_part(axis))
        parts = [root_mean_square(values) for values in part.values()]
        fitted = slope(points, axis, kind + _own_part(axis))
        label = f"{PARTS[_own_part(axis)]} in it: slope {fitted}"
        axes.plot(sizes, parts, marker, color=color, markerfacecolor="white", linestyle=":", label=label)
        _draw_guide(axes, sizes, parts, THEORY[kind][axis])
    size_axis(axes, sizes)
    axes.set_yscale("log")
    first = next(point for point in points if point.axis == axis)
    others = {"L": first.depth, "M": first.hidden, "D": first.embedding}
    fixed = ", ".join(f"{name} = {size}" for name, size in others.items() if name != axis)
    axes.set_title(f"against {axis}, at {fixed}", loc="left", fontsize=11)
    axes.set_xlabel(axis)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda place: (place % len(_STYLES), -place))  # lines come before error bars
    ordered = [handles[place] for place in order], [labels[place] for place in order]
    axes.legend(*ordered, frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    hide_spines(axes)


def _draw_guide(axes: Axes, sizes: Sequence[int], errors: Sequence[float], power: str) -> None:
    """A line of the slope of theory below the points, with its name."""
    exponent = {"-1/2": -0.5, "-1": -1.0}[power]
    factor = min(error / size**exponent for size, error in zip(sizes, errors, strict=True)) / 1.6
    ends = [sizes[0], sizes[-1]]
    axes.plot(ends, [factor * size**exponent for size in ends], color="gray", linestyle="--", linewidth=1)
    middle = math.sqrt(ends[0] * ends[1])
    style = {"color": "gray", "fontsize": 9, "ha": "right", "va": "top"}
    place = middle, factor * middle**exponent
    axes.annotate(f"slope {power}", place, xytext=(-2, -3), textcoords="offset points", **style)


def _draw_traces(figure: Any, traces: Sequence[Streams]) -> None:
    """Some coordinates over depth: the larger the network, the darker its line."""
    panels = figure.subplots(1, len(traces[0].coordinates[0]))
    for place, axes in enumerate(panels):
        for shade, trace in zip(_SHADES, traces, strict=False):
            name = "L, M, D = " + ", ".join(map(str, trace.shape))
            axes.plot(trace.depths, [row[place] for row in trace.coordinates], color=shade, linewidth=1.8, label=name)
        last = traces[-1]
        axes.plot(last.depths, [row[place] for row in last.limits], color="black", linestyle="--", label="limit, W a")
        axes.set_title(f"coordinate {place + 1} of h", loc="left", fontsize=11)
        axes.set_xlabel("relative depth s")
        hide_spines(axes)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=10)


def _draw_histograms(figure: Any, samples: Sequence[Streams]) -> None:
    """Coordinates of the stream of all seeds at some depths, against the Gaussian density of the limit."""
    depths = samples[0].depths
    widest = 4 * max(samples[0].deviations)
    places = np.linspace(-widest, widest, 200)
    for place, axes in enumerate(figure.subplots(1, len(depths), sharey=True)):
        values = np.concatenate([sample.coordinates[place] for sample in samples])
        deviation = samples[0].deviations[place]
        bins = np.linspace(-widest, widest, 49)
        axes.hist(values, bins=bins, density=True, color=_SHADES[0], label="coordinates of h")
        density = np.exp(-((places / deviation) ** 2) / 2) / (deviation * math.sqrt(2 * math.pi))
        axes.plot(places, density, color="black", linestyle="--", label=f"N(0, |a|²), |a| = {deviation:.3f}")
        title = f"s = {depths[place]:g}: root mean square {root_mean_square(values):.3f}"
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("coordinate of h")
        axes.legend(frameon=False, fontsize=9, loc="upper right")
        hide_spines(axes)
    axes.set_ylim(top=1.25 * axes.get_ylim()[1])  # for the legends
