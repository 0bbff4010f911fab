"""Figures of what a run has logged, against optimizer steps."""

from __future__ import annotations

import base64
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from io import BytesIO

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from mlu_lightning.reporting.run_folder import Curve

__all__ = ["as_data_uri", "curves_figure", "panels_of"]


def panels_of(values: Mapping[str, Curve], prefix: str) -> dict[str, dict[str, Curve]]:
    """Sort logged values into panels: by what comes after the prefix, with one curve for each of the rest of the name.

    Args:
        values: by name.
        prefix: of the names that are meant, ``"mlu/distance/"`` or ``"mlu/update/"``.

    >>> panels_of({"mlu/distance/rms/s=0.5": ((1, 0.1),), "loss": ((1, 2.0),)}, "mlu/distance/")
    {'rms': {'s=0.5': ((1, 0.1),)}}
    """
    panels: dict[str, dict[str, Curve]] = defaultdict(dict)
    for name, curve in values.items():
        if name.startswith(prefix):
            panel, _, rest = name.removeprefix(prefix).partition("/")
            panels[panel][rest or "all"] = curve
    return {panel: dict(sorted(curves.items(), key=lambda item: _natural(item[0]))) for panel, curves in panels.items()}


def curves_figure(panels: Mapping[str, Mapping[str, Curve]], logarithmic: bool) -> Figure:
    """Draw curves against steps.

    Args:
        panels: curves by the name of their panel and their own; those whose name ends in "floor" are dotted, and with more
            than eight in a panel only some are named.
        logarithmic: whether values are drawn on a logarithmic axis; steps always are.
    """
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(4.2 * across, 3.1 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False).flatten()
    for axes, (title, curves) in zip(grid, panels.items(), strict=False):
        _draw(axes, title, curves, logarithmic)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return figure


def as_data_uri(figure: Figure) -> str:
    """A figure as an image that stands in a page itself, the same for equal figures.

    Args:
        figure: of matplotlib.

    >>> as_data_uri(Figure()).startswith("data:image/svg+xml;base64,")
    True
    """
    FigureCanvasSVG(figure)
    buffer = BytesIO()
    with mpl.rc_context({"svg.hashsalt": "mlu_lightning", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


_COLORS = mpl.colormaps["viridis"]
_MOST_NAMED = 8


def _draw(axes: Axes, title: str, curves: Mapping[str, Curve], logarithmic: bool) -> None:
    plain = [name for name in curves if not name.endswith("floor")]
    every = max(1, math.ceil(len(plain) / _MOST_NAMED))
    for name, curve in curves.items():
        points = [(step, value) for step, value in curve if math.isfinite(value) and (value > 0 or not logarithmic)]
        if not points:
            continue
        floor = name.endswith("floor")
        place = plain.index(name) if name in plain else _belongs_to(name, plain)
        color = "black" if name == "all" else _COLORS(0.85 * place / max(len(plain) - 1, 1))
        named = not floor and place % every == 0
        label = _visible(name) if named else None
        style = ":" if floor else "-"
        axes.plot(*zip(*points, strict=True), style, color=color, marker="." if not floor else "", label=label)
    if any(step < 1 for curve in curves.values() for step, _ in curve):
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(left=0)
    else:
        axes.set_xscale("log")
    if logarithmic:
        axes.set_yscale("log")
    axes.set_title(_visible(title), loc="left", fontsize=10)
    axes.set_xlabel("optimizer step")
    axes.spines[["top", "right"]].set_visible(False)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=7, frameon=False)


def _belongs_to(floor: str, names: list[str]) -> int:
    base = floor.removesuffix("floor").rstrip("/")
    return names.index(base) if base in names else 0


def _visible(name: str) -> str:
    """A name as it is, and not as mathematics, or hidden because of what it begins with."""
    return name.replace("$", r"\$").lstrip("_") or "_"


def _natural(name: str) -> list[tuple[int, float, str]]:
    """Sort numbers in names as numbers."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [(1, float(part), "") if i % 2 else (0, 0.0, part) for i, part in enumerate(parts)]
