"""Losses of all shapes during training at one learning rate, a panel for each parameterization."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from recipes.common.figures import hide_spines, new_figure, plain_log_axis, shade
from recipes.lr_transfer.report import NAMES
from recipes.lr_transfer.runs import Run, Study, plans_of, shared_runs, train


@dataclass(frozen=True)
class Losses:
    """Losses of one shape, from the first step on."""

    name: str
    ratio: float  # r
    steps: tuple[int, ...]
    losses: tuple[float, ...]


def curve_runs(study: Study, exponent: float) -> Mapping[str, Sequence[Losses]]:
    """Train one seed of every shape, and validate it often, by parameterization."""
    last = study.horizons[-1]
    often = replace(study, horizons=list(range(math.gcd(last, 4), last + 1, math.gcd(last, 4))))
    plans = plans_of(often)
    shared = shared_runs(plans)
    made: dict[object, Run] = {}
    found: dict[str, list[Losses]] = {name: [] for name in study.parameterizations}
    for (shape, name), plan in plans.items():
        key = shape, shared[shape, name]
        if key not in made:
            made[key] = train(often, Run(*key, exponent, 0), plan)
        changes = ", ".join(f"{argument} {value}" for argument, value in shape if (argument, value) not in study.base)
        ratio = max(distance.ratio or 0.0 for distance in plans[shape, "mlu"].distances)
        found[name].append(Losses(changes or "base", ratio, tuple(often.horizons), made[key].losses))
    return found


def save_curves(found: Mapping[str, Sequence[Losses]], path: Path) -> None:
    """Draw all shapes of a parameterization on one panel: solid where r ≤ 1, dashed where it is larger."""
    figure = new_figure(2.7 * len(found) + 1.8, 3.6)
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    ratios = [math.log2(curve.ratio) for curves in found.values() for curve in curves]
    low, high = min(ratios), max(ratios)
    least = min(loss for curves in found.values() for curve in curves for loss in curve.losses)
    for axes, (name, curves) in zip(panels, found.items(), strict=True):
        for curve in sorted(curves, key=lambda curve: curve.ratio):
            color = shade((math.log2(curve.ratio) - low) / (high - low or 1.0))
            style = {"linestyle": "-" if curve.ratio <= 1 else "--", "linewidth": 2.5 if curve.name == "base" else 1.4}
            label = f"{curve.name} (r = {curve.ratio:.2g})"
            axes.plot(curve.steps, curve.losses, color=color, label=label, **style)
        axes.set_title(NAMES[name], loc="left", fontsize=11)
        axes.set_xlabel("steps")
        plain_log_axis(axes)
        axes.set_ylim(0.9 * least, 8 * least)
        hide_spines(axes)
    panels[0].set_ylabel("validation loss")
    panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=160)
