"""The figure of a search: the best value over trials, and the value against each factor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import accumulate

import numpy as np

from mlu_lightning.tuning.space import Dimension

_DOTS, _BEST = "#0072B2", "#D55E00"
"""Two of Okabe and Ito's colours, which people with any colour vision can tell apart."""
_COLUMNS = 4


def draw_search(
    space: Sequence[Dimension],
    curve: Sequence[tuple[int, Mapping[str, float], float]],
    metric: str,
    mode: str,
    best: Mapping[str, float],
) -> bytes:
    """Draw trials (number, factors by dimension, value) as a PNG; the best point's factors are marked."""
    from matplotlib.figure import Figure

    rows = math.ceil((1 + len(space)) / _COLUMNS)
    figure = Figure(figsize=(2.8 * _COLUMNS, 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    numbers, values = [number for number, _, _ in curve], [value for _, _, value in curve]
    panels[0].plot(numbers, values, ".", color=_DOTS, markersize=4, alpha=0.5)
    panels[0].step(numbers, [*accumulate(values, min if mode == "min" else max)], where="post", color=_BEST)
    panels[0].set_xlabel("trial (line: the best so far)")
    for panel, dimension in zip(panels[1:], space, strict=False):
        factors = [point.get(dimension.name, 1.0) for _, point, _ in curve]
        panel.plot(factors, values, ".", color=_DOTS, markersize=4, alpha=0.5)
        if dimension.name in best:
            panel.axvline(best[dimension.name], color=_BEST, linewidth=1.2)
        panel.set_xscale("log", base=2)
        panel.set_xlim(dimension.low / 1.2, dimension.high * 1.2)
        panel.set_xlabel(f"factor of {dimension.name}", parse_math=False)
    if values:  # what diverges is far off
        low, high = (np.quantile(values, (0.0, 0.8)) if mode == "min" else np.quantile(values, (0.2, 1.0)))[:2]
        room = 0.05 * (high - low) or 0.1
    for panel in panels[: 1 + len(space)]:
        panel.spines[["top", "right"]].set_visible(False)
        if values:
            panel.set_ylim(low - room, high + room)
    for panel in panels[1 + len(space) :]:
        panel.set_visible(False)
    for first in panels[::_COLUMNS]:
        first.set_ylabel(metric, parse_math=False)
    content = BytesIO()
    figure.savefig(content, dpi=140)
    return content.getvalue()
