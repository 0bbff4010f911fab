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
    """Draw the drift against M/D, where depth stays, and against r, a column of panels for each study."""
    studies = list(dict.fromkeys(row.study for row in rows))
    names = list(dict.fromkeys(row.parameterization for row in rows))
    figure = new_figure(3.2 * len(studies) + 0.6, 6.4)
    panels = figure.subplots(2, len(studies), sharey=True, squeeze=False)
    for column, study in zip(panels.T, studies, strict=True):
        for place, name in enumerate(names):
            own = [row for row in rows if (row.study, row.parameterization) == (study, name)]
            style = {**STYLES[name], "linestyle": "none", "capsize": 2, "elinewidth": 1, "label": NAMES[name]}
            shift = 1.05 ** (place - (len(names) - 1) / 2)  # next to each other where they are equal
            for axes, key in zip(column, ("aspect", "ratio"), strict=True):
                shown = [row for row in own if key == "ratio" or math.isclose(row.aspect * row.ratio**2, 1)]
                errors = [0.0 if math.isnan(row.drift.error) else row.drift.error for row in shown]
                places = [getattr(row, key) * shift for row in shown]
                axes.errorbar(places, [row.drift.value for row in shown], errors, **style)
        for axes, key in zip(column, ("aspect", "ratio"), strict=True):
            values = sorted({round(math.log2(getattr(row, key)), 6) for row in rows if row.study == study})
            size_axis(axes, [2.0**value for value in values])
            axes.tick_params(axis="x", labelsize=8, rotation=45)
            axes.set_xticks([2.0**value for value in values], [f"{2.0**value:.2g}" for value in values])
            axes.axhline(0, color="0.6", linewidth=1, linestyle=":", zorder=0)
            axes.axvline(1, color="0.6", linewidth=1, linestyle=":", zorder=0)
            hide_spines(axes)
        column[0].set_title(study, loc="left", fontsize=11)
        column[0].set_xlabel("M/D, next to the base's")
        column[1].set_xlabel("r = √(d/(l·m))")
    for axes in panels[:, 0]:
        axes.set_ylabel("drift of the best lr (octaves)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=160)


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
