"""Tables and figures of ``lr_transfer.py``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from recipes.lr_transfer.runs import Run, Shape, Study
from recipes.lr_transfer.search import Estimate, Transfer, best, curves_of
from recipes.reference_run.report import Slope, fit_slope

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["horizon_table", "save_curves", "save_figure", "save_horizons", "size_table", "slope_of", "summary_table"]

NAMES = {"mlu": "MLU", "completep": "CompleteP", "mup": "µP", "sp": "SP"}


def size_table(study: Study, shared: Mapping[tuple[Shape, str], str], found: Sequence[Transfer]) -> Table:
    """Best learning rate, drift, regret and loss at every shape; parameterizations whose runs are the same have one row.

    Args:
        study: of the runs.
        shared: parameterizations whose runs stand for those of a shape and parameterization.
        found: what was measured.
    """
    table = Table(
        "axis", "size", "parameterization", "best lr", "drift (decades)", "regret (nats per byte)", "loss at best lr"
    )
    for column in table.columns[3:]:
        column.justify = "right"
    for axis in study.axes:
        shapes = dict(zip(study.factors(axis), study.shapes(axis), strict=True))
        for parameterization in study.parameterizations:
            for one in _of(found, axis, parameterization):
                shape = shapes[one.factor]
                if shared[shape, parameterization] == parameterization:
                    same = [
                        NAMES[other] for other in study.parameterizations if shared[shape, other] == parameterization
                    ]
                    names = "all" if len(same) == len(study.parameterizations) else ", ".join(same)
                    table.add_row(
                        axis,
                        f"× {one.factor:g}",
                        names,
                        _best_lr(one),
                        _drift(one),
                        one.regret.text(3),
                        one.loss.text(3),
                    )
        table.add_section()
    return table


def summary_table(study: Study, found: Sequence[Transfer]) -> Table:
    """Largest drift, slope, and regret and loss at the largest size, for each axis and parameterization; * marks the least.

    Args:
        study: of the runs.
        found: what was measured.
    """
    table = Table(
        "axis",
        "parameterization",
        "sizes",
        "largest drift",
        "d log lr / d log size",
        "regret at the largest",
        "loss at its best lr",
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for axis in study.axes:
        sweeps = {
            parameterization: sweep
            for parameterization in study.parameterizations
            if len(sweep := _of(found, axis, parameterization)) > 1
        }
        furthest = {
            parameterization: max(sweep, key=lambda one: abs(one.drift.value))
            for parameterization, sweep in sweeps.items()
        }
        least_drift = min((abs(one.drift.value) for one in furthest.values()), default=math.nan)
        whole = [sweep[-1] for sweep in sweeps.values() if len(sweep) == len(study.factors(axis))]
        least_regret = min((one.regret.value for one in whole), default=math.nan)
        least_loss = min((one.loss.value for one in whole), default=math.nan)
        for parameterization, sweep in sweeps.items():
            one, last = furthest[parameterization], sweep[-1]
            cells = ["-", "-"]
            if last in whole:
                cells = [
                    _marked(last.regret.text(3), last.regret.value == least_regret),
                    _marked(last.loss.text(3), last.loss.value == least_loss),
                ]
            table.add_row(
                axis,
                NAMES[parameterization],
                f"{len(sweep)} of {len(study.factors(axis))}",
                _marked(_drift(one), abs(one.drift.value) == least_drift),
                str(slope_of(sweep)),
                *cells,
            )
        table.add_section()
    return table


def horizon_table(found: Mapping[str, Sequence[Transfer]]) -> Table:
    """Drift and regret of every depth, for each schedule and horizon.

    Args:
        found: what was measured, by schedule.
    """
    table = Table(
        "schedule", "steps", "depth", "best lr", "drift (decades)", "regret (nats per byte)", "loss at best lr"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for schedule, transfers in found.items():
        for one in sorted(transfers, key=lambda one: (one.horizon, one.factor)):
            table.add_row(
                schedule,
                str(one.horizon),
                f"× {one.factor:g}",
                _best_lr(one),
                _drift(one),
                one.regret.text(3),
                one.loss.text(3),
            )
        table.add_section()
    return table


def slope_of(sweep: Sequence[Transfer]) -> Slope:
    """Fit the logarithm of the best learning rate against that of the size.

    Args:
        sweep: of one axis, parameterization and horizon.
    """
    return fit_slope([one.factor for one in sweep], [2.0**one.exponent for one in sweep])


def save_figure(study: Study, found: Sequence[Transfer], path: Path) -> None:
    """Draw drift, regret and loss against size, a column of panels for each axis.

    Args:
        study: of the runs.
        found: what was measured.
        path: of the PNG file.
    """
    figure = _figure(2.6 * len(study.axes) + 0.4, 7.2)
    panels = figure.subplots(3, len(study.axes), sharey="row", sharex="col", squeeze=False)
    for column, axis in zip(panels.T, study.axes, strict=True):
        for parameterization in study.parameterizations:
            sweep = _of(found, axis, parameterization)
            factors = [one.factor for one in sweep]
            style = _STYLES[parameterization]
            for axes, values in zip(column, (_drifts(sweep), _regrets(sweep), _losses(sweep)), strict=True):
                axes.errorbar(factors, *values, **style, capsize=2, elinewidth=1, label=NAMES[parameterization])
            _mark_bounds(column[0], sweep, style["color"])
        for axes in column:
            _by_factor(axes, study.factors(axis))
        column[0].axhline(0, color="0.6", linewidth=1, linestyle=":", zorder=0)
        column[0].set_title(axis, loc="left", fontsize=11)
        column[1].set_yscale("symlog", linthresh=0.01, linscale=0.6)
        column[2].set_xlabel("size / the base's")
    _log_ticks(panels[1, 0], [one.regret.value for one in found])
    for axes, label in zip(
        panels[:, 0],
        ("drift of the best lr (decades)", "regret (nats per byte)", "loss at the best lr\n(nats per byte)"),
        strict=True,
    ):
        axes.set_ylabel(label)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=160)


def save_curves(study: Study, shared: Mapping[tuple[Shape, str], str], runs: Sequence[Run], path: Path) -> None:
    """Draw validation loss against learning rate: a row of panels for each axis, a column for each parameterization.

    Args:
        study: of the runs.
        shared: parameterizations whose runs stand for those of a shape and parameterization.
        runs: that were made.
        path: of the PNG file.
    """
    curves, horizon = curves_of(study, runs), study.horizons[-1]
    figure = _figure(2.6 * len(study.parameterizations) + 0.6, 2.1 * len(study.axes) + 0.6)
    panels = figure.subplots(len(study.axes), len(study.parameterizations), sharex=True, sharey="row", squeeze=False)
    for row, axis in zip(panels, study.axes, strict=True):
        shapes = study.shapes(axis)
        for axes, parameterization in zip(row, study.parameterizations, strict=True):
            for place, (factor, shape) in enumerate(zip(study.factors(axis), shapes, strict=True)):
                curve = curves.get((shape, shared[shape, parameterization], horizon))
                if curve is not None:  # else the time was over
                    _draw_curve(axes, curve, _shade(place / max(1, len(shapes) - 1)), f"× {factor:g}")
            base = curves[study.base, shared[study.base, parameterization], horizon]
            axes.axvline(2.0 ** best(base).exponent, color="0.6", linestyle=":", linewidth=1, zorder=0)
            axes.set_xscale("log", base=2)
            axes.spines[["top", "right"]].set_visible(False)
        _fit_height(row[0], [curve for (shape, _, _), curve in curves.items() if shape in shapes])
        row[0].set_ylabel(f"{axis}\nvalidation loss")
        row[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=1.2)
    for axes, parameterization in zip(panels[0], study.parameterizations, strict=True):
        axes.set_title(NAMES[parameterization], loc="left", fontsize=11)
    for axes in panels[-1]:
        axes.set_xlabel("learning rate")
    figure.savefig(path, dpi=160)


def save_horizons(found: Mapping[str, Sequence[Transfer]], path: Path) -> None:
    """Draw drift and regret against the number of steps, for each depth: solid lines constant, hollow markers cosine.

    The dotted lines are the base: its regret is not 0 because its best learning rate is between those tried.

    Args:
        found: what was measured, by schedule.
        path: of the PNG file.
    """
    figure = _figure(10, 4.2)
    left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.05})
    every = [one for transfers in found.values() for one in transfers]
    factors = sorted({one.factor for one in every if one.factor > 1})
    for place, factor in enumerate(factors):
        color = _shade(place / max(1, len(factors) - 1))
        for schedule, transfers in found.items():
            sweep = sorted((one for one in transfers if one.factor == factor), key=lambda one: one.horizon)
            steps = [one.horizon for one in sweep]
            # beside each other where they are equal
            steps = [step * 1.04 ** (place - (len(factors) - 1) / 2) for step in steps]
            cosine = schedule == "cosine"
            style = {
                "color": color,
                "marker": "s" if cosine else "o",
                "markerfacecolor": "white" if cosine else color,
                "linestyle": "--" if cosine else "-",
                "label": f"depth × {factor:g}, {schedule}",
            }
            for axes, values in ((left, _drifts(sweep)), (right, _regrets(sweep))):
                axes.errorbar(steps, *values, **style, capsize=2, elinewidth=1)
            _mark_bounds(left, sweep, color, steps)
    base = [one for one in found["constant"] if one.factor == 1]
    right.plot([one.horizon for one in base], _regrets(base)[0], color="0.6", linestyle=":", zorder=0)
    left.axhline(0, color="0.6", linewidth=1, linestyle=":", zorder=0)
    left.set_ylabel("drift of the best lr from the base's (decades)")
    right.set_ylabel("regret (nats per byte)")
    for axes in (left, right):
        _by_factor(axes, sorted({one.horizon for one in every}))
        axes.set_xlabel("steps")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=max(1, len(factors)), frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)


_STYLES: dict[str, dict[str, Any]] = {
    "mlu": {"color": "#D55E00", "linewidth": 3.2, "marker": "o", "markersize": 6, "linestyle": "-"},
    "completep": {"color": "#0072B2", "linewidth": 2.2, "marker": "s", "markersize": 4.5, "linestyle": "-"},
    "mup": {"color": "#009E73", "linewidth": 1.4, "marker": "^", "markersize": 4, "linestyle": "-"},
    "sp": {"color": "#000000", "linewidth": 1.4, "marker": "D", "markersize": 3, "linestyle": "--"},
}
"""Colours of Okabe and Ito's palette, which people with any colour vision can tell apart; where lines are the same, the
thinner ones leave the thicker ones below them to be seen."""


def _of(found: Iterable[Transfer], axis: str, parameterization: str) -> list[Transfer]:
    return [one for one in found if (one.axis, one.parameterization) == (axis, parameterization)]


def _best_lr(one: Transfer) -> str:
    return f"{one.bound} 2^{one.exponent:.1f}".lstrip()


def _drift(one: Transfer) -> str:
    text = one.drift.text(2)
    return f"{one.bound} {text if text.startswith('-') else f'+{text}'}".lstrip()


def _marked(text: str, least: bool) -> str:
    return f"[bold]{text}*[/bold]" if least else f"{text} "


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _drifts(sweep: Sequence[Transfer]) -> tuple[list[float], list[float]]:
    return [one.drift.value for one in sweep], [_known(one.drift.error) for one in sweep]


def _regrets(sweep: Sequence[Transfer]) -> tuple[list[float], list[float]]:
    return [one.regret.value for one in sweep], [_known(one.regret.error) for one in sweep]


def _losses(sweep: Sequence[Transfer]) -> tuple[list[float], list[float]]:
    return [one.loss.value for one in sweep], [_known(one.loss.error) for one in sweep]


def _known(error: float) -> float:
    return 0.0 if math.isnan(error) else error


def _mark_bounds(axes: Axes, sweep: Sequence[Transfer], color: str, places: Sequence[float] | None = None) -> None:
    """Arrows where the best learning rate may be further than what was tried."""
    for one, place in zip(sweep, places or [one.factor for one in sweep], strict=True):
        if one.bound:
            axes.annotate(
                "↓" if one.bound == "≤" else "↑",
                (place, one.drift.value),
                color=color,
                fontsize=12,
                ha="center",
                va="top" if one.bound == "≤" else "bottom",
            )


def _by_factor(axes: Axes, factors: Sequence[float]) -> None:
    """A logarithmic x axis with these ticks."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
    axes.spines[["top", "right"]].set_visible(False)


def _log_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Ticks at powers of ten, and at none below the part that is linear."""
    finite = [value for value in values if math.isfinite(value)]
    ticks = [0, 0.01, *(tick for tick in (0.1, 1.0) if finite and tick < 2 * max(finite))]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(bottom=-0.002)


def _draw_curve(axes: Axes, curve: Mapping[float, tuple[float, ...]], color: Any, name: str) -> None:
    """Mean over seeds, its standard error, and the best learning rate."""
    exponents = sorted(curve)
    means = [Estimate.over(math.fsum(curve[one]) / len(curve[one]), curve[one]) for one in exponents]
    rates = [2.0**one for one in exponents]
    errors = [_known(mean.error) for mean in means]
    axes.errorbar(
        rates,
        [mean.value for mean in means],
        errors,
        color=color,
        linewidth=1.5,
        marker=".",
        markersize=4,
        elinewidth=1,
        label=name,
    )
    one = best(curve)
    axes.plot(2.0**one.exponent, math.fsum(one.losses) / len(one.losses), marker="o", markersize=6, color=color)


def _fit_height(axes: Axes, curves: Sequence[Mapping[float, tuple[float, ...]]]) -> None:
    """Leave out losses that are far above the least ones."""
    finite = [loss for curve in curves for losses in curve.values() for loss in losses if math.isfinite(loss)]
    if finite:
        axes.set_ylim(min(finite) - 0.03, min(max(finite), min(finite) + 0.6) + 0.03)


def _shade(share: float) -> Any:
    """From green, the smallest, to dark violet, the largest."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.8 * (1 - share))
