"""The table, the figure and the sentences of the study of tuned factors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table

from mlu_lightning.tuning.found import Estimate, paired
from mlu_lightning.utilities.fitted_tables import number_table
from recipes.common.figures import hide_spines, new_figure
from recipes.tune.runs import METHODS, Run, Study, curve_of


def losses_of(study: Study, runs: Sequence[Run], shape: str, method: str) -> tuple[float, list[float]] | None:
    """Exponent of the learning rate of least mean loss and the losses of all seeds there; None before all were made."""
    if shape == "base":
        method = "MLU, tuned" if METHODS[method][1] else "MLU, lr alone"  # which is the same there
    curves = [curve_of([*runs], shape, method, seed) for seed in range(study.seeds)]
    whole = set.intersection(*(set(curve) for curve in curves))
    if not whole:
        return None
    best = min(whole, key=lambda exponent: sum(curve[exponent] for curve in curves))
    return best, [curve[best] for curve in curves]


def loss_table(study: Study, runs: Sequence[Run]) -> Table:
    """Validation loss by shape and method, over seeds, the least of each row marked."""
    table = number_table("shape", *METHODS, title="Validation loss (nats per byte) and learning rate")
    for shape in study.shapes:
        found = {method: of for method in METHODS if (of := losses_of(study, runs, shape, method)) is not None}
        estimates = {method: Estimate.over(losses) for method, (_, losses) in found.items()}
        least = min((estimate.value for estimate in estimates.values()), default=math.nan)
        texts = {
            method: f"[bold]{estimate.text(3)}*[/bold]" if estimate.value == least else estimate.text(3)
            for method, estimate in estimates.items()
        }
        rates = {method: f" 2^{exponent:g}" for method, (exponent, _) in found.items() if METHODS[method][2]}
        table.add_row(shape, *(texts.get(method, "-") + rates.get(method, "") for method in METHODS))
    return table


def verdicts(study: Study, runs: Sequence[Run]) -> Iterator[str]:
    """Say for each shape by how much MLU with the factors ends below each other one, in pairs of seeds."""
    for shape in [*study.shapes][1:]:
        losses = {method: of[1] for method in METHODS if (of := losses_of(study, runs, shape, method)) is not None}
        if tuned := losses.pop("MLU, tuned", None):
            gains = {method: paired(of, tuned, "min") for method, of in losses.items()}
            listed = "; ".join(f"{method} {gain.value:+.3f} ± {gain.error:.3f}" for method, gain in gains.items())
            yield f"{shape}, less MLU, tuned: {listed}."


def save_figure(study: Study, runs: Sequence[Run], path: Path) -> None:
    """Draw the loss of every method at every shape, with its standard error."""
    shapes = [shape for shape in study.shapes if losses_of(study, runs, shape, "MLU, tuned") is not None]
    figure = new_figure(4.6 + 1.2 * len(shapes), 4.0)
    axes = figure.subplots()
    for place, method in enumerate(METHODS):
        points = [
            (at + 0.13 * (place - 2), Estimate.over(of[1]))
            for at, shape in enumerate(shapes)
            if (of := losses_of(study, runs, shape, method)) is not None
        ]
        style = {"color": METHODS[method][3], "marker": "o" if method.startswith("MLU") else "s", "linestyle": "none"}
        errors = [0.0 if math.isnan(estimate.error) else estimate.error for _, estimate in points]
        axes.errorbar(
            [x for x, _ in points], [estimate.value for _, estimate in points], errors, **style, capsize=3, label=method
        )
    axes.set_xticks(range(len(shapes)), [shape.replace(" and ", " and\n") for shape in shapes])
    axes.set_ylabel("validation loss (nats per byte)")
    hide_spines(axes)
    figure.legend(loc="outside upper center", ncols=2 if len(shapes) < 5 else 3, frameon=False)
    figure.savefig(path, dpi=160)
