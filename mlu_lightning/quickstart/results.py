"""The results of the quickstart: a table of losses, a figure, and a sentence for each shape."""

from __future__ import annotations

import math
from io import BytesIO
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from mlu_lightning.quickstart.study import BASE, Run, Study, best_exponent, curve_of
from mlu_lightning.utilities.fitted_tables import number_table
from mlu_lightning.utilities.plotting import spread
from mlu_lightning.utilities.whole_files import write_whole

_COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
"""Okabe and Ito's palette, which people with any colour vision can tell apart."""
_TITLES = {True: "MLU: one callback", False: "Standard: the same model, plain"}


def loss_table(study: Study, runs: list[Run]) -> Table:
    """Tabulate validation losses by shape, parameterization and learning rate, the least of each row marked."""
    table = number_table("shape", "", *(f"2^{exponent}" for exponent in study.exponents), "best lr", words=2)
    for mlu in (True, False):
        for shape in study.shapes:
            losses = dict(curve_of(runs, shape, mlu))
            least = min(filter(math.isfinite, losses.values()), default=None)
            known = [losses.get(exponent) for exponent in study.exponents]  # not all, if the study was interrupted
            cells = [
                "" if loss is None else f"[bold]{loss:.3f}*[/bold]" if loss == least else f"{loss:.3f} "
                for loss in known
            ]
            whole = least is not None and len(losses) == len(study.exponents)
            best = f"2^{best_exponent(runs, shape, mlu):.1f}" if whole else "-"
            table.add_row(shape, "MLU" if mlu else "standard", *cells, best)
        table.add_section()
    return table


def verdicts(study: Study, runs: list[Run]) -> list[str]:
    """Say for every shape by which factor the best learning rate moved, in both parameterizations."""
    ends = {min(study.exponents), max(study.exponents)}
    sentences = [
        f"{shape}: the best learning rate is {_moved(study, runs, shape, True)} with MLU, "
        f"and {_moved(study, runs, shape, False)} without."
        for shape in study.shapes
        if shape != BASE
    ]
    if _learned(runs, BASE, False) and best_exponent(runs, BASE, False) in ends:
        warning = f"{BASE}: the best learning rate is at an end of those tried, so that the factors say little."
        return [warning, *sentences]
    return sentences


def save_figure(study: Study, runs: list[Run], path: Path, label: str = "validation loss (nats per byte)") -> None:
    """Draw validation loss against learning rate, with MLU and without, a curve for each shape with a dot at its best."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    finite = [run.loss for run in runs if math.isfinite(run.loss)] or [0.0]
    left.set_ylim(min(finite) - 0.05, min(max(finite), min(finite) + 1.1) + 0.02)
    for axes, mlu in ((left, True), (right, False)):
        _draw(axes, study, runs, mlu)
    left.set_ylabel(label)
    content = BytesIO()
    figure.savefig(content, dpi=160)
    write_whole({path: content.getvalue()})


def _draw(axes: Axes, study: Study, runs: list[Run], mlu: bool) -> None:
    """Draw a panel; the dotted line is the base's best learning rate."""
    axes.axvline(2.0 ** best_exponent(runs, BASE, mlu), color="0.6", linestyle=":", linewidth=1.2, zorder=0)
    colors = dict(zip(study.shapes, cycle(_COLORS)))
    ends: dict[str, tuple[float, float]] = {}
    for shape, color in colors.items():
        curve = [(exponent, loss) for exponent, loss in curve_of(runs, shape, mlu) if math.isfinite(loss)]
        if not curve:
            continue
        exponents, losses = zip(*curve, strict=True)
        rates = [2.0**exponent for exponent in exponents]
        axes.plot(rates, losses, color=color, linewidth=2.4 if shape == BASE else 1.6, marker=".", markersize=4)
        best = best_exponent(runs, shape, mlu)
        axes.plot(2.0**best, np.interp(best, exponents, losses), marker="o", markersize=8, color=color)
        ends[shape] = (rates[-1], losses[-1])
    _label(axes, ends, colors)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("learning rate (large dots: the best; dotted line: the base's best)")
    axes.set_title(_TITLES[mlu], loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _label(axes: Axes, ends: dict[str, tuple[float, float]], colors: dict[str, str]) -> None:
    bottom, top = axes.get_ylim()
    shapes = sorted(ends, key=lambda shape: ends[shape][1])
    wanted = [min(ends[shape][1], top) for shape in shapes]
    for shape, height in zip(shapes, spread(wanted, (top - bottom) / 20), strict=True):
        axes.annotate(
            shape,
            (ends[shape][0], height),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=colors[shape],
            annotation_clip=False,
        )


def _moved(study: Study, runs: list[Run], shape: str, mlu: bool) -> str:
    if not _learned(runs, shape, mlu):
        return "unknown (every run diverged)"
    if not _learned(runs, BASE, mlu):
        return "unknown (every run of the base diverged)"
    exponent = best_exponent(runs, shape, mlu)
    factor = 2.0 ** (exponent - best_exponent(runs, BASE, mlu))
    times = f"{factor:.2f} times the base's"
    if exponent == min(study.exponents):
        return f"at most {times} (the smallest that was tried)"
    if exponent == max(study.exponents):
        return f"at least {times} (the largest that was tried)"
    return times


def _learned(runs: list[Run], shape: str, mlu: bool) -> bool:
    return any(math.isfinite(loss) for _, loss in curve_of(runs, shape, mlu))
