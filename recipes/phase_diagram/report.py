"""Verdicts and figure of the phase diagram."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from recipes.common.figures import Axes, hide_spines, new_figure, plain_log_axis, size_axis
from recipes.common.fits import Slope, fit_slope, root_mean_square

Shape = tuple[int, int, int]  # L, M, D

THRESHOLD = 0.25
"""Slopes nearer to 0 than to ±1/2, the smallest that theory has for a wrong scale, are those of MLU."""

THEORY = {
    ("MLU", "α"): "-1",
    ("1/√L, η/L", "L"): "-1/2",
    ("1/√L, η", "L"): "1/2",
    ("1/M, η·D", "D"): "1/2",
    ("1/M, η", "D"): "-1/2 in 1 step",
}
"""Slopes of the local feature update that are not 0. It is 1/α, and α is sqrt(L) or 1/sqrt(D) with learning rates / α²; at
learning rates of MLU it is α instead, for which a std of 1/M takes one step only: weights then are what was learned."""


@dataclass(frozen=True)
class Sweeps:
    """Sizes that are changed."""

    base: Shape  # in which one size is changed
    sizes: Mapping[str, Sequence[int]]  # values of L, M and D
    rich: Shape  # at which the richness is changed
    alphas: Sequence[float]  # values of the richness

    def shapes(self, axis: str) -> list[Shape]:
        """Shapes of the sweep of L, M or D."""
        place = "LMD".index(axis)
        return [(*self.base[:place], size, *self.base[place + 1 :]) for size in self.sizes[axis]]


SWEEPS = {
    "default": Sweeps(
        base=(32, 256, 64),
        sizes={"L": (8, 16, 32, 64, 128), "M": (64, 128, 256, 512, 1024), "D": (32, 64, 128, 256, 512)},
        rich=(64, 1024, 64),
        alphas=(1.0, 2.0, 4.0, 8.0, 16.0),
    ),
    "quick": Sweeps(
        base=(4, 32, 16),
        sizes={"L": (2, 4, 8), "M": (16, 32, 64), "D": (8, 16, 32)},
        rich=(4, 256, 16),
        alphas=(1.0, 4.0, 16.0),
    ),
}


@dataclass(frozen=True)
class Point:
    """What was measured of one network.

    The local update is how far pre-activations have moved by the weights of their own block: root mean square over units
    and samples, mean over blocks.
    """

    variant: str  # of its plan
    depth: int
    hidden: int
    embedding: int
    alpha: float  # richness, before the plan was edited
    seed: int
    local_first: float  # local update in one step
    local_last: float  # local update in all steps
    stream_update: float  # root mean square change of the stream at s = 1 in all steps
    stream_distance: float  # of the stream at s = 1 from that of the limit of MLU
    output_distance: float  # of outputs from those of the limit of MLU
    loss_first: float  # before training
    loss_last: float  # after it

    @property
    def shape(self) -> Shape:
        """L, M, D."""
        return self.depth, self.hidden, self.embedding

    @property
    def diverged(self) -> bool:
        """Whether training has made the loss larger, or not finite."""
        return not self.loss_last <= self.loss_first


def sweep(points: Sequence[Point], sweeps: Sweeps, variant: str, axis: str) -> dict[float, list[Point]]:
    """Networks of all seeds by size, in the sweep of L, M, D or α."""
    if axis == "α":
        wanted: dict[float, tuple[Shape, float]] = {alpha: (sweeps.rich, alpha) for alpha in sweeps.alphas}
    else:
        wanted = {size: (shape, 1.0) for size, shape in zip(sweeps.sizes[axis], sweeps.shapes(axis), strict=True)}
    own = [point for point in points if point.variant == variant]
    found = {size: [point for point in own if (point.shape, point.alpha) == case] for size, case in wanted.items()}
    return {size: group for size, group in found.items() if group}


def slope(found: Mapping[float, Sequence[Point]], quantity: str) -> Slope:
    """Fit a line to the logarithms of root mean squares over seeds of a quantity, one of :class:`Point`."""
    return fit_slope(list(found), [_mean(group, quantity) for group in found.values()])


def verdict(fitted: Slope, diverged: bool = False) -> str:
    """Name the phase of a slope of the local feature update, which has to be two standard errors on one side of ±1/4."""
    if diverged:
        return "diverges"
    low, high = fitted.value - 2 * fitted.error, fitted.value + 2 * fitted.error
    if low > -THRESHOLD and high < THRESHOLD:
        return "MLU"
    if high < -THRESHOLD:
        return "lazy"
    return "explodes" if low > THRESHOLD else "unclear"


def verdict_table(points: Sequence[Point], variants: Sequence[str], sweeps: Sweeps, steps: int) -> Table:
    """What every variant is, in each size: slopes of the local feature update, and what comes of them."""
    columns = "scale, lr", "in", "theory", "slope, 1 step", "verdict", f"slope, {steps} steps", "verdict"
    table = Table(
        *columns,
        *("stream moves", "stream to limit", "output to limit", "last loss"),
        title="Slope of the local feature update, and other values from the smallest to the largest size",
        caption=f"MLU: |slope| < {THRESHOLD:g}, lazy: slope < -{THRESHOLD:g}, explodes: slope > {THRESHOLD:g}, all by two "
        "standard errors; diverges: the loss has become larger in training",
    )
    for variant in variants:
        for axis in "LMDα":
            found = sweep(points, sweeps, variant, axis)
            if len(found) < 2:
                continue
            first, last = slope(found, "local_first"), slope(found, "local_last")
            diverged = any(point.diverged for group in found.values() for point in group)
            groups = list(found.values())
            ends = [
                f"{_short(_mean(groups[0], quantity))} → {_short(_mean(groups[-1], quantity))}"
                for quantity in ("stream_update", "stream_distance", "output_distance", "loss_last")
            ]
            theory = "" if variant.startswith("none") else THEORY.get((variant, axis), "0")
            shown = "" if diverged else str(last)
            table.add_row(variant, axis, theory, str(first), verdict(first), shown, verdict(last, diverged), *ends)
        table.add_section()
    return table


def save_figure(points: Sequence[Point], variants: Sequence[str], sweeps: Sweeps, steps: int, path: Path) -> None:
    """Draw every quantity against every size, a line for each variant."""
    quantities = {
        "local_first": "local feature update\nin 1 step",
        "local_last": f"local feature update\nin {steps} steps",
        "stream_update": f"update of the stream\nin {steps} steps",
        "stream_distance": "stream: distance from\nthe limit of MLU",
        "output_distance": "outputs: distance from\nthe limit of MLU",
        "loss_last": f"loss after {steps} steps",
    }
    figure = new_figure(13, 16)
    panels = figure.subplots(len(quantities), 4, sharex="col", sharey="row")
    for row, (quantity, title) in zip(panels, quantities.items(), strict=True):
        for axes, axis in zip(row, "LMDα", strict=True):
            for variant, color, marker in zip(variants, _COLORS, _MARKERS, strict=True):
                found = sweep(points, sweeps, variant, axis)
                if len(found) > 1:
                    means = [_mean(group, quantity) for group in found.values()]
                    front = 3 if variant == variants[0] else 2
                    axes.plot(list(found), means, f"{marker}-", color=color, markersize=5, label=variant, zorder=front)
            _finish(axes, axis, sweeps)
        row[0].set_ylabel(title)
        _limit_range(row, [_mean([point], quantity) for point in points if not point.diverged])
    for top, bottom, axis in zip(panels[0], panels[-1], "LMDα", strict=True):
        top.set_title(f"against {axis}, at {_others(axis, sweeps)}", loc="left", fontsize=10)
        bottom.set_xlabel(axis)
    handles, labels = panels[0][0].get_legend_handles_labels()
    scales = "residual scale (in place of 1/L, of √D/M, or of all)"
    title = f"{scales}, learning rate of branches; what leaves a panel diverges"
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, title=title)
    figure.savefig(path, dpi=120)


_COLORS, _MARKERS = ("black", "gray", "#D55E00", "#E69F00", "#332288", "#56B4E9", "#CC79A7"), "ooDsDs^"
"""Of Okabe and Ito's and of Tol's palettes, which people with any colour vision can tell apart."""


def _mean(group: Sequence[Point], quantity: str) -> float:
    """Root mean square over seeds, infinite if any has overflowed."""
    value = root_mean_square([getattr(point, quantity) for point in group])
    return value if value < math.inf else math.inf


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0e}".replace("e+", "e")


def _others(axis: str, sweeps: Sweeps) -> str:
    """The sizes that stay as they are."""
    shape = sweeps.rich if axis == "α" else sweeps.base
    return ", ".join(f"{name} = {size}" for name, size in zip("LMD", shape, strict=True) if name != axis)


def _finish(axes: Axes, axis: str, sweeps: Sweeps) -> None:
    """Logarithmic axes with plain numbers."""
    size_axis(axes, sweeps.alphas if axis == "α" else sweeps.sizes[axis])
    plain_log_axis(axes)
    axes.grid(color="0.92")
    hide_spines(axes)


def _limit_range(row: Sequence[Axes], values: Sequence[float]) -> None:
    """Leave out what has diverged, which would make everything else a line."""
    row[0].set_ylim(min(values) / 1.5, max(values) * 1.5)
