"""Figures of the study of learning rates: drift, regret and loss against size, all curves, and horizons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlu_lightning.tuning.found import Estimate
from recipes.common.figures import Axes, hide_spines, new_figure, shade, size_axis
from recipes.lr_transfer.report import NAMES, along
from recipes.lr_transfer.runs import Run, Shape, Study
from recipes.lr_transfer.search import Curve, Transfer, best, curves_of, mean

STYLES: dict[str, dict[str, Any]] = {
    "mlu": {"color": "#D55E00", "linewidth": 3.2, "marker": "o", "markersize": 6, "linestyle": "-"},
    "completep": {"color": "#0072B2", "linewidth": 2.2, "marker": "s", "markersize": 4.5, "linestyle": "-"},
    "mup": {"color": "#009E73", "linewidth": 1.4, "marker": "^", "markersize": 4, "linestyle": "-"},
    "sp": {"color": "#000000", "linewidth": 1.4, "marker": "D", "markersize": 3, "linestyle": "--"},
    "capped": {"color": "#CC79A7", "linewidth": 1.4, "marker": "v", "markersize": 4, "linestyle": ":"},
}
"""Colours of Okabe and Ito's palette, which people with any colour vision can tell apart; where lines are the same, the
thinner ones leave the thicker ones below them to be seen."""


def save_figure(study: Study, found: Sequence[Transfer], path: Path) -> None:
    """Draw drift, regret and loss against size, a column of panels for each axis."""
    figure = new_figure(2.6 * len(study.axes) + 0.4, 7.2)
    panels = figure.subplots(3, len(study.axes), sharey="row", sharex="col", squeeze=False)
    for column, axis in zip(panels.T, study.axes, strict=True):
        for name in study.parameterizations:
            sweep, style = along(found, axis, name), STYLES[name]
            factors = [transfer.factor for transfer in sweep]
            for axes, quantity in zip(column, ("drift", "regret", "loss"), strict=True):
                values = _with_errors([getattr(transfer, quantity) for transfer in sweep])
                axes.errorbar(factors, *values, **style, capsize=2, elinewidth=1, label=NAMES[name])
            _mark_bounds(column[0], sweep, style["color"], factors)
        for axes in column:
            size_axis(axes, list(study.shapes(axis)))
            hide_spines(axes)
        column[0].axhline(0, color="0.6", linewidth=1, linestyle=":", zorder=0)
        column[0].set_title(axis, loc="left", fontsize=11)
        column[1].set_yscale("symlog", linthresh=0.01, linscale=0.6)
        column[2].set_xlabel("size / the base's")
    _log_ticks(panels[1, 0], [transfer.regret.value for transfer in found])
    labels = "drift of the best lr (decades)", "regret (nats per byte)", "loss at the best lr\n(nats per byte)"
    for axes, label in zip(panels[:, 0], labels, strict=True):
        axes.set_ylabel(label)
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=160)


def save_curves(study: Study, shared: Mapping[tuple[Shape, str], str], runs: Sequence[Run], path: Path) -> None:
    """Draw validation loss against learning rate: a row of panels for each axis, a column for each parameterization."""
    curves, horizon = curves_of(study, runs), study.horizons[-1]
    figure = new_figure(2.6 * len(study.parameterizations) + 0.6, 2.1 * len(study.axes) + 0.6)
    panels = figure.subplots(len(study.axes), len(study.parameterizations), sharex=True, sharey="row", squeeze=False)
    for row, axis in zip(panels, study.axes, strict=True):
        shapes = study.shapes(axis)
        for axes, name in zip(row, study.parameterizations, strict=True):
            for place, (factor, shape) in enumerate(shapes.items()):
                curve = curves.get((shape, shared[shape, name], horizon))
                if curve is not None:  # else the time was over
                    _draw_curve(axes, curve, shade(place / max(1, len(shapes) - 1)), f"× {factor:g}")
            base = curves[study.base, shared[study.base, name], horizon]
            axes.axvline(2.0 ** best(base).exponent, color="0.6", linestyle=":", linewidth=1, zorder=0)
            axes.set_xscale("log", base=2)
            hide_spines(axes)
        _fit_height(row[0], [curve for (shape, _, _), curve in curves.items() if shape in shapes.values()])
        row[0].set_ylabel(f"{axis}\nvalidation loss")
        row[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=1.2)
    for top, bottom, name in zip(panels[0], panels[-1], study.parameterizations, strict=True):
        top.set_title(NAMES[name], loc="left", fontsize=11)
        bottom.set_xlabel("learning rate")
    figure.savefig(path, dpi=160)


def save_horizons(found: Mapping[str, Sequence[Transfer]], path: Path) -> None:
    """Draw drift and regret against the number of steps, for each depth: solid lines constant, hollow markers cosine.

    The dotted lines are the base: its regret is not 0 because its best learning rate is between those tried.
    """
    figure = new_figure(10, 4.2)
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.05})
    every = [transfer for transfers in found.values() for transfer in transfers]
    factors = sorted({transfer.factor for transfer in every if transfer.factor > 1})
    for place, factor in enumerate(factors):
        color = shade(place / max(1, len(factors) - 1))
        for schedule, transfers in found.items():
            sweep = sorted((t for t in transfers if t.factor == factor), key=lambda transfer: transfer.horizon)
            # next to each other where they are equal
            steps = [transfer.horizon * 1.04 ** (place - (len(factors) - 1) / 2) for transfer in sweep]
            marker, face, line = ("s", "white", "--") if schedule == "cosine" else ("o", color, "-")
            style = {"marker": marker, "markerfacecolor": face, "linestyle": line, "color": color}
            style["label"] = f"depth × {factor:g}, {schedule}"
            for axes, quantity in ((left, "drift"), (right, "regret")):
                values = _with_errors([getattr(transfer, quantity) for transfer in sweep])
                axes.errorbar(steps, *values, **style, capsize=2, elinewidth=1)
            _mark_bounds(left, sweep, color, steps)
    base = [transfer for transfer in found["constant"] if transfer.factor == 1]
    regrets = [transfer.regret.value for transfer in base]
    right.plot([transfer.horizon for transfer in base], regrets, color="0.6", linestyle=":", zorder=0)
    left.axhline(0, color="0.6", linewidth=1, linestyle=":", zorder=0)
    left.set_ylabel("drift of the best lr from the base's (decades)")
    right.set_ylabel("regret (nats per byte)")
    for axes in (left, right):
        size_axis(axes, sorted({transfer.horizon for transfer in every}))
        hide_spines(axes)
        axes.set_xlabel("steps")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=max(1, len(factors)), frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)


def _with_errors(estimates: Sequence[Estimate]) -> tuple[list[float], list[float]]:
    """Values, and errors that are 0 where they are not known."""
    errors = [0.0 if math.isnan(estimate.error) else estimate.error for estimate in estimates]
    return [estimate.value for estimate in estimates], errors


def _mark_bounds(axes: Axes, sweep: Sequence[Transfer], color: str, places: Sequence[float]) -> None:
    """Arrows where the best learning rate may be further than what was tried."""
    for transfer, place in zip(sweep, places, strict=True):
        if transfer.bound:
            arrow, side = ("↓", "top") if transfer.bound == "≤" else ("↑", "bottom")
            axes.annotate(arrow, (place, transfer.drift.value), color=color, fontsize=12, ha="center", va=side)


def _log_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Ticks at powers of ten, and at none below the part that is linear."""
    finite = [value for value in values if math.isfinite(value)]
    ticks = [0, 0.01, *(tick for tick in (0.1, 1.0) if finite and tick < 2 * max(finite))]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(bottom=-0.002)


def _draw_curve(axes: Axes, curve: Curve, color: Any, name: str) -> None:
    """Mean over seeds, its standard error, and the best learning rate."""
    exponents = sorted(curve)
    losses = [Estimate.over(curve[exponent]) for exponent in exponents]
    style = {"color": color, "linewidth": 1.5, "marker": ".", "markersize": 4, "elinewidth": 1, "label": name}
    axes.errorbar([2.0**exponent for exponent in exponents], *_with_errors(losses), **style)
    found = best(curve)
    axes.plot(2.0**found.exponent, mean(found.losses), marker="o", markersize=6, color=color)


def _fit_height(axes: Axes, curves: Sequence[Curve]) -> None:
    """Leave out losses that are far above the least ones."""
    finite = [loss for curve in curves for losses in curve.values() for loss in losses if math.isfinite(loss)]
    if finite:
        axes.set_ylim(min(finite) - 0.03, min(max(finite), min(finite) + 0.6) + 0.03)
