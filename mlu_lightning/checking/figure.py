"""The figure of a check: everything that should not change with the size, against the size."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import geometric_mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlu_lightning.checking.quantities import Kind, lowest_and_highest
from mlu_lightning.checking.verdicts import Row, Verdict, axes_of, overall_verdict
from mlu_lightning.shapes import Shape
from mlu_lightning.utilities.plotting import spread


def draw_check(rows: Sequence[Row], base: Shape) -> Figure:
    """Draw every quantity over its value at the smallest size, a panel for each kind and axis, over the band that passes."""
    panels: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        kind = row.quantity.kind
        moves = kind in (Kind.FEATURES, Kind.STREAM, Kind.OUTPUT)
        panels["features, stream, output" if moves else str(kind)].append(row)
    axes = axes_of(rows)
    figure = Figure(figsize=(3.5 * len(axes) + 0.4, 2.2 * len(panels) + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(panels), len(axes), squeeze=False, sharex="col", sharey="row")
    for line, (group, members) in zip(grid, panels.items(), strict=True):
        of_axes = [[row for row in members if row.axis == axis] for axis in axes]
        ends = [_draw(panel, of_axis, axis) for panel, of_axis, axis in zip(line, of_axes, axes, strict=True)]
        for panel, heights in zip(line, ends, strict=True):  # after all of a line, which share an axis
            _name(panel, heights)
        line[0].set_ylabel(f"{group}\n/ at the smallest", fontsize=9)
    for top, bottom, axis in zip(grid[0], grid[-1], axes, strict=True):
        top.set_title(axis, loc="left", fontsize=10)
        bottom.set_xlabel("size / the base's", fontsize=9)
    verdict = overall_verdict(rows)
    figure.suptitle(
        f"{verdict.upper()}   sizes over that at the smallest network, from L={base.depth}, M={base.hidden}, "
        f"D={base.embedding}",
        color=_COLORS[verdict],
        x=0.01,
        ha="left",
    )
    return figure


_COLORS: dict[Verdict, str] = {"pass": "#0072B2", "fail": "#C40000", "undecided": "#B87700"}
"""Okabe and Ito's blue, and a red and an orange that can be seen on white: people with any colour vision tell them apart."""


def _draw(panel: Axes, rows: Sequence[Row], axis: str) -> dict[str, float]:
    """Draw a panel, and return the last values of the curves that are to be named, by name."""
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.spines[["top", "right"]].set_visible(False)
    panel.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    factors = sorted({point.factor for row in rows for point in row.points})
    if not factors:
        return {}
    sizes = np.array(factors, dtype=float) / factors[0]
    lowest, highest = lowest_and_highest(rows[0].quantity, axis)
    panel.fill_between(factors, sizes**lowest, sizes**highest, color="0.92", zorder=-1)
    named: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: ("pass", "undecided", "fail").index(row.verdict)):
        curve = _curve(row, factors)
        if curve is None:
            continue
        width, alpha = {"fail": (2.0, 1.0), "undecided": (1.3, 1.0), "pass": (0.9, 0.7)}[row.verdict]
        panel.plot(factors, curve, color=_COLORS[row.verdict], linewidth=width, alpha=alpha)
        if row.verdict == "fail":
            named[row.quantity.label] = curve[-1]
    panel.plot([factors[0]] * 2, [1 / 2, 2], alpha=0)  # the least that is shown
    panel.set_xticks(factors, [f"{factor}" for factor in factors])
    lowest, highest = np.log2(panel.get_ylim())
    every = math.ceil((highest - lowest) / 6)
    exponents = range(math.ceil(lowest), math.floor(highest) + 1)
    ticks = [2.0**number for number in exponents if number % every == 0]
    panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    return named


def _name(panel: Axes, heights: dict[str, float]) -> None:
    """Name curves beside their right ends, where no other curve is."""
    at = max(panel.get_xticks())
    names = sorted(heights, key=lambda name: heights[name])
    bottom, top = np.log(panel.get_ylim())
    spread_out = spread([math.log(heights[name]) for name in names], (top - bottom) / 12)
    for name, height in zip(names, spread_out, strict=True):
        panel.annotate(
            name,
            (at, math.exp(height)),
            xytext=(5, 0),
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=8,
            color=_COLORS["fail"],
            parse_math=False,  # names may come from files
        )


def _curve(row: Row, factors: Sequence[int]) -> list[float] | None:
    """Geometric means over seeds, over that at the smallest size; None if there is no such number at every size."""
    values: dict[int, list[float]] = defaultdict(list)
    for point in row.points:
        values[point.factor].append(point.at(row.reason))
    if values.keys() != set(factors) or not all(0 < value < math.inf for found in values.values() for value in found):
        return None
    means = [geometric_mean(values[factor]) for factor in factors]
    return [mean / means[0] for mean in means]
