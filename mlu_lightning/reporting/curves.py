"""Figures of logged values against optimizer steps, one for each panel, as wide as a phone."""

from __future__ import annotations

import base64
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from io import BytesIO
from itertools import islice
from operator import itemgetter

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from mlu_lightning.reporting.run_folder import Curve


def panels_of(values: Mapping[str, Curve], prefix: str) -> dict[str, dict[str, Curve]]:
    """Sort logged values whose names begin with a prefix into panels, by the next part of their names."""
    panels: dict[str, dict[str, Curve]] = defaultdict(dict)
    for name, curve in values.items():
        if name.startswith(prefix):
            panel, _, rest = name.removeprefix(prefix).partition("/")
            panels[panel][rest or "all"] = curve
    return {panel: dict(sorted(curves.items(), key=lambda item: _natural(item[0]))) for panel, curves in panels.items()}


def panel_figure(title: str, curves: Mapping[str, Curve], label: str, logarithmic: bool) -> Figure:
    """Draw curves against steps, floors of others dotted, with values on a logarithmic axis of six decades if wanted."""
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    _draw(axes, curves, logarithmic)
    axes.set_title(_visible(title), loc="left", fontsize=10)
    axes.set_ylabel(label, fontsize=9)
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    columns = max(1, min(4, 44 // (max(map(len, names), default=0) + 5)))
    lines = math.ceil(len(names) / columns) if len(names) > 1 else 0
    figure.set_size_inches(3.9, 2.7 + 0.17 * lines)
    if lines:  # below the axes, where it is over no curve
        figure.legend(handles, names, loc="outside lower left", ncols=columns, fontsize=8.5, frameon=False)
    return figure


def first_panels(panels: Mapping[str, Mapping[str, Curve]]) -> tuple[dict[str, dict[str, Curve]], int]:
    """As many panels and curves as anybody looks at, and the number of the other curves."""
    chosen = islice(panels.items(), _MOST_PANELS)
    first = {title: dict(islice(curves.items(), _MOST_CURVES)) for title, curves in chosen}
    return first, sum(map(len, panels.values())) - sum(map(len, first.values()))


def not_drawn(panels: Mapping[str, Mapping[str, Curve]], logarithmic: bool) -> int:
    """Count the values that a figure cannot show: those not finite, or, on a logarithmic axis, not above zero."""
    curves = [curve for panel in panels.values() for curve in panel.values()]
    return sum(len(curve) - len(_drawn(curve, logarithmic)) for curve in curves)


def as_data_uri(figure: Figure) -> str:
    """Encode a figure as an SVG image that is part of a page itself, the same for equal figures."""
    buffer = BytesIO()
    with mpl.rc_context({"svg.hashsalt": "mlu_lightning", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    content = _NOT_XML.sub("\ufffd", buffer.getvalue().decode())
    return "data:image/svg+xml;base64," + base64.b64encode(content.encode()).decode()


_Color = tuple[float, float, float, float]
_COLORS = mpl.colormaps["viridis"]
_MOST_PANELS = 24
_MOST_CURVES = 100
_MOST_NAMED = 8
_LONGEST_NAME = 40
_MOST_MARKERS = 40
_COLUMNS = 1000
_LARGEST = 1e100  # beyond it, and below its inverse, matplotlib cannot place ticks
_DECADES = 6
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
"""Characters that names from files may have, and that a browser refuses in an image."""


def _draw(axes: Axes, curves: Mapping[str, Curve], logarithmic: bool) -> None:
    plain = [name for name in curves if not _is_floor(name)]
    every = max(1, math.ceil(len(plain) / _MOST_NAMED))
    colors = {name: _COLORS(0.7 * i / max(len(plain) - 1, 1)) for i, name in enumerate(plain)}
    colors["all"] = mpl.colors.to_rgba("black")
    drawn = {name: points for name, curve in curves.items() if (points := _thinned(_drawn(curve, logarithmic)))}
    first_floor = next(filter(_is_floor, drawn), None)
    for name, points in drawn.items():
        if _is_floor(name):
            # one name for all of them, which are those of the curves in their colour
            label = "floor" if name == first_floor else None
            axes.plot(*zip(*points, strict=True), ":", color=_color_of_floor(name, colors), label=label)
        else:
            label = _visible(name) if plain.index(name) % every == 0 else None
            marker = "." if len(points) <= _MOST_MARKERS else None
            axes.plot(*zip(*points, strict=True), "-", color=colors[name], linewidth=1.2, marker=marker, label=label)
    steps = [step for points in drawn.values() for step, _ in points]
    values = [value for points in drawn.values() for _, value in points]
    if not steps:
        return
    if min(steps) < 1:
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(left=0)
        decades = range(len(str(max(*steps, 1))))
        axes.set_xticks([0, *(10.0**decade for decade in decades[:: math.ceil(len(decades) / 5)])])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(_as_text)
    else:
        axes.set_xscale("log")
        _set_ticks(axes.xaxis, min(steps), max(steps), whole=True)
    if logarithmic:
        axes.set_yscale("log")
        lowest = max(min(values), max(values) * 10.0**-_DECADES)
        if lowest > min(values):
            axes.set_ylim(bottom=lowest)  # what is rounding only would make the rest look flat
        _set_ticks(axes.yaxis, lowest, max(values), whole=False)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))


def _set_ticks(axis: Axis, lowest: float, highest: float, whole: bool) -> None:
    """Give a logarithmic axis a few ticks with plain numbers, however many decades it has."""
    decades = math.log10(highest) - math.log10(lowest)
    if decades > 0.7:
        axis.set_major_locator(LogLocator(subs=(1,) if decades > 2 else (1, 2, 5), numticks=6))
    else:
        axis.set_major_locator(MaxNLocator(4, integer=whole))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_as_text)


def _as_text(value: float, _: float) -> str:
    return f"{value:.7g}"


def _drawn(curve: Curve, logarithmic: bool) -> Curve:
    lowest = 1 / _LARGEST if logarithmic else -_LARGEST
    return tuple((step, value) for step, value in curve if lowest < value < _LARGEST)


def _thinned(points: Curve) -> Curve:
    """The least and the largest value in every column of the axis, where there are more than can be told apart."""
    if len(points) <= 2 * _COLUMNS:
        return points
    width = math.log1p(max(step for step, _ in points))
    columns: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for step, value in points:
        columns[round(_COLUMNS * math.log1p(max(step, 0)) / width)].append((step, value))
    kept = {extreme(column, key=itemgetter(1)) for column in columns.values() for extreme in (min, max)}
    return tuple(sorted(kept))


def _is_floor(name: str) -> bool:
    return name.rpartition("/")[2] == "floor"


def _color_of_floor(floor: str, colors: Mapping[str, _Color]) -> _Color:
    """Color of the first curve that it is the floor of, which shares the other parts of its name, such as the depth."""
    base = floor.removesuffix("floor")
    return next((color for name, color in colors.items() if f"{name}/".startswith(base)), colors["all"])


def _visible(name: str) -> str:
    """A name as one short line of plain text, not as mathematics, nor hidden from the legend by a leading underscore."""
    shown = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME // 2]}...{name[-_LONGEST_NAME // 2 :]}"
    return " ".join(shown.split()).replace("$", r"\$").lstrip("_") or "_"


def _natural(name: str) -> list[tuple[int, float, str]]:
    """Key that sorts numbers in names as numbers."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [(1, float(part), "") if i % 2 else (0, 0.0, part) for i, part in enumerate(parts)]
