"""Figures: best learning rates against M/D and against the distance ratio, and distances from the limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from recipes.aspect.limit import Distances
from recipes.aspect.report import Row
from recipes.common.figures import hide_spines, new_figure, plain_log_axis, size_axis
from recipes.lr_transfer.figures import STYLES
from recipes.lr_transfer.report import NAMES


def save_drifts(rows: Sequence[Row], path: Path) -> None:
    """Draw the drift against M/D, where depth stays, and against r, a column of panels for each kind of study.

    What is the same lies one over the other, the thinner over the thicker.
    """
    kinds = list(dict.fromkeys(row.kind for row in rows))
    names = list(dict.fromkeys(row.parameterization for row in rows))
    figure = new_figure(3.1 * len(kinds) + 0.6, 6.4)
    panels = figure.subplots(2, len(kinds), sharey=True, squeeze=False)
    for column, kind in zip(panels.T, kinds, strict=True):
        for axes, key in zip(column, ("aspect", "ratio"), strict=True):
            shown = [row for row in rows if row.kind == kind]
            shown = [row for row in shown if key == "ratio" or math.isclose(row.aspect * row.ratio**2, 1)]
            for place, name in enumerate(names):
                own = [row for row in shown if row.parameterization == name]
                errors = [0.0 if math.isnan(row.drift.error) else row.drift.error for row in own]
                shift = 1.06 ** (place - (len(names) - 1) / 2)  # next to each other where they are equal
                style = {**STYLES[name], "linestyle": "none", "capsize": 2, "elinewidth": 1, "label": NAMES[name]}
                places = [getattr(row, key) * shift for row in own]
                axes.errorbar(places, [row.drift.value for row in own], errors, **style)
                for row, where in zip(own, places, strict=True):
                    if row.bound == "≤":
                        axes.annotate("↓", (where, row.drift.value), color=style["color"], ha="center", va="top")
            values = sorted({round(math.log2(getattr(row, key)), 6) for row in shown})
            room = max(0.6, (values[-1] - values[0]) / 10)
            apart = [v for v, last in zip(values, [-99.0, *values], strict=False) if v - last > room]
            size_axis(axes, [2.0**value for value in apart], [_size(2.0**value) for value in apart])
            axes.axhline(0, color="0.6", linewidth=1, linestyle=":", zorder=0)
            axes.axvline(1, color="0.6", linewidth=1, linestyle=":", zorder=0)
            axes.tick_params(axis="x", labelsize=8)
            hide_spines(axes)
        column[0].set_title(kind, loc="left", fontsize=11)
        column[0].set_xlabel("M/D, next to the base's")
        column[1].set_xlabel("r = √(d/(l·m))")
    for axes in panels[:, 0]:
        axes.set_ylabel("drift of the best lr (octaves)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=160)


def _size(value: float) -> str:
    return f"{round(value, 1):g}" if value > 0.99 else f"1/{round(1 / value, 1):g}"


def save_limits(found: Sequence[Distances], path: Path) -> None:
    """Draw distances from the infinite model, and from the widest network of a kind, against M/D."""
    figure = new_figure(8.4, 3.8)
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"to_limit": "to the infinite model of MLU", "to_widest": "to a wider network of its own kind"}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for name in dict.fromkeys(row.parameterization for row in found):
            own = [row for row in found if row.parameterization == name and getattr(row, key).value < 100]
            values = [getattr(row, key) for row in own]
            errors = [0.0 if math.isnan(value.error) else value.error for value in values]
            label = NAMES[name] + (" = µP" if name == "completep" else "")
            axes.errorbar(
                [row.aspect for row in own], [value.value for value in values], errors, **STYLES[name], label=label
            )
        size_axis(axes, sorted({row.aspect for row in found}))
        plain_log_axis(axes)
        hide_spines(axes)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("M/D")
    panels[0].set_ylabel("RMS distance of the stream")
    panels[1].legend(frameon=False)
    figure.savefig(path, dpi=160)
