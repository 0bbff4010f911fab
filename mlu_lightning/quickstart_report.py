"""What a quickstart study found: a table, a figure, and a sentence for each shape."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from mlu_lightning.quickstart import BASE, Run, Study, best_exponent, curve_of

__all__ = ["loss_table", "save_figure", "verdicts"]

_COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
"""Okabe and Ito's palette, which people with any colour vision can tell apart."""
_TITLES = {True: "MLU: one callback", False: "Standard: the same model, plain"}


def loss_table(study: Study, runs: list[Run]) -> Table:
    """Validation losses by shape, parameterization and learning rate, the least of each row marked.

    Args:
        study: what was trained.
        runs: with their losses.
    """
    table = Table("shape", "", *(f"2^{exponent}" for exponent in study.exponents), "best lr")
    for column in table.columns[2:]:
        column.justify = "right"
    for mlu in (True, False):
        for shape in study.shapes:
            losses = [loss for _, loss in curve_of(runs, shape, mlu)]
            finite = [loss for loss in losses if math.isfinite(loss)]
            cells = [
                f"[bold]{loss:.3f}*[/bold]" if finite and loss == min(finite) else f"{loss:.3f} " for loss in losses
            ]
            best = f"2^{best_exponent(runs, shape, mlu):.1f}" if finite else "-"
            table.add_row(shape, "MLU" if mlu else "standard", *cells, best)
        table.add_section()
    return table


def verdicts(study: Study, runs: list[Run]) -> list[str]:
    """Say for every shape by which factor the best learning rate moved, in both parameterizations.

    Args:
        study: what was trained.
        runs: with their losses.
    """
    return [
        f"{shape}: the best learning rate is {_moved(study, runs, shape, True)} with MLU, "
        f"and {_moved(study, runs, shape, False)} without."
        for shape in study.shapes
        if shape != BASE
    ]


def save_figure(study: Study, runs: list[Run], path: Path) -> None:
    """Draw validation loss against learning rate, with MLU and without, one curve for each shape.

    Args:
        study: what was trained.
        runs: with their losses.
        path: of the PNG file.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    finite = [run.loss for run in runs if math.isfinite(run.loss)]
    for axes, mlu in ((left, True), (right, False)):
        _draw(axes, study, runs, mlu)
        axes.set_ylim(min(finite) - 0.05, min(max(finite), min(finite) + 1.1) + 0.02)
    left.set_ylabel("validation loss (nats per byte)")
    figure.savefig(path, dpi=160)


def _draw(axes: Axes, study: Study, runs: list[Run], mlu: bool) -> None:
    """One panel; dots mark the best run of each curve, and the dotted line the base's best learning rate."""
    best_rate = 2.0 ** best_exponent(runs, BASE, mlu)
    axes.axvline(best_rate, color="0.6", linestyle=":", linewidth=1.2, zorder=0)
    axes.annotate(
        "best at base ", (best_rate, 0.01), xycoords=("data", "axes fraction"), ha="right", fontsize=8, color="0.4"
    )
    for shape, color in zip(study.shapes, _COLORS, strict=False):
        curve = curve_of(runs, shape, mlu)
        rates, losses = [2.0**exponent for exponent, _ in curve], [loss for _, loss in curve]
        width = 2.4 if shape == BASE else 1.6
        axes.plot(rates, losses, color=color, linewidth=width, marker=".", markersize=4, label=shape)
        known = [i for i, loss in enumerate(losses) if math.isfinite(loss)]
        if known:
            best = min(known, key=losses.__getitem__)
            axes.plot(rates[best], losses[best], marker="o", markersize=8, color=color)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("learning rate")
    axes.set_title(_TITLES[mlu], loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    if mlu:
        axes.legend(frameon=False, loc="upper center", fontsize=9)


def _moved(study: Study, runs: list[Run], shape: str, mlu: bool) -> str:
    """By what factor the best learning rate is not the base's."""
    exponent = best_exponent(runs, shape, mlu)
    factor = 2.0 ** (exponent - best_exponent(runs, BASE, mlu))
    times = f"{factor:.2f} times the base's"
    if exponent == min(study.exponents):
        return f"at most {times} (the smallest that was tried)"
    if exponent == max(study.exponents):
        return f"at least {times} (the largest that was tried)"
    return times
