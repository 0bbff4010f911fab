"""Tables and figure of the paper's nonlinear experiment: fits of the error bound, and slopes of errors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table

from mlu_lightning.shapes.error_bound import (
    PAPER,
    ErrorConstants,
    FittedConstants,
    Measured,
    Shape,
    error_at,
    fit_error_bound,
)
from recipes.common.figures import new_figure
from recipes.common.fits import Slope, fit_slope, root_mean_square

Errors = Literal["stream", "output", "reference_stream", "reference_output"]

PUBLISHED = ErrorConstants(0.0, PAPER.hidden, PAPER.embedding)
"""The paper's fit of the error in embedding space, hypot(0.8 sqrt(D/(L M)), 2.5/sqrt(D))."""

FROM = 16  # sizes from which on a network is one of the asymptotic regime that bounds and slopes are fitted to
MOSTLY = 0.75  # share of a term in the square of the fitted bound from which on a slope against its size is fitted

TITLES: dict[Errors, str] = {
    "stream": "stream, to the infinite model",
    "reference_stream": "stream, to the largest network",
    "output": "output, to the infinite model",
    "reference_output": "output, to the largest network",
}


@dataclass(frozen=True)
class Point:
    """One network."""

    hidden: int  # M
    embedding: int  # D
    seed: int  # of its weights
    stream: float  # root mean square distance of its stream from that of the infinite model, in its coordinates
    output: float  # the same of outputs
    reference_stream: float | None = None  # distance from the largest network, of the first seed
    reference_output: float | None = None
    seconds: float = 0.0


def means(points: Sequence[Point], errors: Errors) -> dict[tuple[int, int], float]:
    """Root mean square over seeds of an error, by hidden width and embedding dimension."""
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for point in points:
        value = getattr(point, errors)
        if value:  # the largest network is at 0 from itself only if it is the same one
            found[point.hidden, point.embedding].append(value)
    return {shape: root_mean_square(values) for shape, values in found.items()}


def report(points: Sequence[Point], depth: int, limits: Mapping[str, Mapping[Errors, float]]) -> list[Any]:
    """Tables of fits and slopes; ``limits`` are distances between infinite models, "1" of other units, "L=2" of 2 steps."""
    fits = Table("error", "shapes", "c1/L", "c2", "c3", "scatter", title=f"Fits to networks with M and D from {FROM}")
    slopes = Table(
        "error", "against", "theory", "slope", "over", title="d log error / d log size, where its term dominates"
    )
    for name, title in TITLES.items():
        found = means(points, name)
        fit = _fit(found, name, depth)
        kind: Measured = "stream" if "stream" in name else "output"
        if fit is not None:
            bars = fit.uncertainty or ErrorConstants(0, 0, 0)
            rest = f"{fit.depth / depth:.4f} ± {bars.depth / depth:.4f}"
            hidden, embedding = (
                f"{getattr(fit, name):.2f} ± {getattr(bars, name):.2f}" for name in ("hidden", "embedding")
            )
            fits.add_row(title, str(len(_asymptotic(found))), rest, hidden, embedding, f"{fit.scatter:.0%}")
        for axis, theory in (("D", "-1/2"), ("M", "-1/2" if "stream" in name else "-1"), ("P", "-1/6")):
            fitted = None if fit is None else _slope(found, axis, depth, fit, kind)
            if fitted is not None:
                slopes.add_row(title, axis, theory, *map(str, fitted))
        slopes.add_section()
    fits.add_row("published, stream", "", "", f"{PUBLISHED.hidden}", f"{PUBLISHED.embedding}", "")
    few = {int(key[2:]): errors for key, errors in limits.items() if key.startswith("L=")}
    alone = {name: [size * errors[name] for size, errors in few.items()] for name in ("stream", "output")}
    return [
        fits,
        "second term of the stream: c2 sqrt(D/(L M)), of the output: c2 D/(L M); third term: c3/sqrt(D)",
        slopes,
        "Infinite models with other units differ by "
        f"{limits['1']['stream']:.1g} in the stream and {limits['1']['output']:.1g} on the output.",
        f"Infinite models of L = {', '.join(map(str, few))} are at c1/L from that of many Euler steps, with c1 = "
        f"{_range(alone['stream'])} in the stream and {_range(alone['output'])} on the output.",
    ]


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def save_figure(points: Sequence[Point], depth: int, path: Path) -> None:
    """Draw errors against D, M and P = LMD, with the fitted bound and the published one."""
    from matplotlib import colormaps

    figure = new_figure(15, 17)
    rows: tuple[Errors, ...] = ("stream", "reference_stream", "output", "reference_output")
    for axes, name in zip(figure.subplots(len(rows), 3, sharey="row"), rows, strict=True):
        found = means(points, name)
        fit = _fit(found, name, depth)
        kind: Measured = "stream" if "stream" in name else "output"
        for axis, (fixed, size) in zip(axes, (("M", 1), ("D", 0)), strict=False):
            widths = sorted({shape[1 - size] for shape in found})
            shown = widths[:: max(1, len(widths) // 6)] if len(widths) > 7 else widths
            for number, width in enumerate(shown):
                color = colormaps["viridis"](number / max(1, len(shown) - 1) * 0.9)
                line = sorted((shape[size], error) for shape, error in found.items() if shape[1 - size] == width)
                sizes = np.array([x for x, _ in line], dtype=float)
                axis.loglog(sizes, [error for _, error in line], "o", ms=4, color=color, label=f"{fixed} = {width}")
                for constants, style, least in ((fit, "-", FROM), (PUBLISHED if kind == "stream" else None, ":", 1)):
                    within = sizes[sizes >= least] if width >= least else sizes[:0]
                    if constants is not None:
                        shapes = [(width, x) if size else (x, width) for x in within]
                        bound = [error_at(depth, m, d, constants, kind) for m, d in shapes]
                        axis.loglog(within, bound, style, lw=1.2, color=color)
            axis.set_xlabel("embedding dimension D" if size else "hidden width M")
            axis.legend(fontsize=8)
        _draw_budgets(axes[2], found, depth, fit, kind)
        axes[0].set_ylabel(f"{TITLES[name]}\nroot mean square error")
    figure.suptitle(
        f"Distance after training, L = {depth}: dots are networks, lines the fitted bound, dotted the published one"
    )
    figure.savefig(path, dpi=110)


def _draw_budgets(axis: Any, found: dict[tuple[int, int], float], depth: int, fit: Any, kind: Measured) -> None:
    """All errors against the number of parameters in branches, and the least."""
    budgets = np.array([depth * m * d for m, d in found], dtype=float)
    errors = np.array(list(found.values()))
    axis.loglog(budgets, errors, ".", color="0.75", ms=4, label="all shapes")
    best = _front(found, depth)
    axis.loglog(*zip(*best, strict=True), "o-", ms=4, color="C3", label="best shape")
    if len(best) > 2:
        x = np.array([budget for budget, _ in best])
        axis.loglog(x, best[-1][1] * (x / x[-1]) ** (-1 / 6), "k--", lw=1, label=r"$P^{-1/6}$")
    axis.set_xlabel("P = L M D")
    axis.legend(fontsize=8)


def _front(found: dict[tuple[int, int], float], depth: int) -> list[tuple[float, float]]:
    """Budgets and errors of the shapes than which no smaller one is better."""
    front: list[tuple[float, float]] = []
    for budget, error in sorted((float(depth * m * d), error) for (m, d), error in found.items()):
        if not front or error < front[-1][1]:
            front.append((budget, error))
    return front


def _asymptotic(found: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    return {shape: error for shape, error in found.items() if min(shape) >= FROM}


def _fit(found: dict[tuple[int, int], float], name: Errors, depth: int) -> FittedConstants | None:
    """The bound, fitted to what is asymptotic, if that is enough for it."""
    points = {Shape(depth, m, d): error for (m, d), error in _asymptotic(found).items()}
    if len({shape.hidden for shape in points}) < 3 or len({shape.embedding for shape in points}) < 3:
        return None
    return fit_error_bound(points, of="stream" if "stream" in name else "output")


def _slope(
    found: dict[tuple[int, int], float], axis: str, depth: int, fit: FittedConstants, kind: Measured
) -> tuple[Slope, str] | None:
    """Slope against one size where the fitted bound is mostly the term of that size, and over what it was fitted."""
    if axis == "P":
        lines = {"best shapes": [(p, error) for p, error in _front(found, depth) if p >= depth * FROM**2]}
    else:
        size, other = (1, "M") if axis == "D" else (0, "D")
        alone = ErrorConstants(0, 0, fit.embedding) if axis == "D" else ErrorConstants(0, fit.hidden, 0)
        lines = defaultdict(list)
        for shape, error in sorted(_asymptotic(found).items()):
            share = error_at(depth, *shape, alone, kind) / error_at(depth, *shape, fit, kind)
            if share**2 >= MOSTLY:
                lines[f"{other} = {shape[1 - size]}"].append((float(shape[size]), error))
    where, line = max(lines.items(), key=lambda item: (len(item[1]), item[0]), default=("", []))
    if len(line) < 3:
        return None
    slope = fit_slope(*zip(*line, strict=True))
    first, last = (f"{line[end][0]:{'.0e' if axis == 'P' else '.0f'}}" for end in (0, -1))
    return slope, f"{where}, {axis} from {first} to {last}"
