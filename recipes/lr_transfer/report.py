"""Tables of the study of learning rates: every size, a summary, and horizons."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

from mlu_lightning.utilities.fitted_tables import number_table
from recipes.common.fits import Slope, fit_slope
from recipes.lr_transfer.runs import Shape, Study
from recipes.lr_transfer.search import Transfer

NAMES = {"mlu": "MLU", "completep": "CompleteP", "mup": "µP", "sp": "SP", "capped": "capped MLU"}
_OF_LARGEST = "regret at the largest", "loss at its best lr"
_QUANTITIES = "best lr", "drift (decades)", "regret (nats per byte)", "loss at best lr"


def size_table(study: Study, shared: Mapping[tuple[Shape, str], str], found: Sequence[Transfer]) -> Table:
    """Best learning rate, drift, regret and loss at every shape; parameterizations whose runs are the same have one row."""
    table = number_table("axis", "size", "parameterization", *_QUANTITIES, words=3)
    for axis in study.axes:
        shapes = study.shapes(axis)
        for name in study.parameterizations:
            for transfer in along(found, axis, name):
                shape = shapes[transfer.factor]
                if shared[shape, name] == name:
                    same = [NAMES[other] for other in study.parameterizations if shared[shape, other] == name]
                    names = "all" if len(same) == len(study.parameterizations) else ", ".join(same)
                    table.add_row(axis, f"× {transfer.factor:g}", names, *_cells(transfer))
        table.add_section()
    return table


def summary_table(study: Study, found: Sequence[Transfer]) -> Table:
    """Largest drift, slope, and regret and loss at the largest size, by axis and parameterization; * marks the least."""
    table = number_table(
        "axis", "parameterization", "sizes", "largest drift", "d log lr / d log size", *_OF_LARGEST, words=2
    )
    for axis in study.axes:
        sizes = len(study.shapes(axis))
        sweeps = {name: sweep for name in study.parameterizations if len(sweep := along(found, axis, name)) > 1}
        furthest = {name: max(sweep, key=lambda transfer: abs(transfer.drift.value)) for name, sweep in sweeps.items()}
        least_drift = min((abs(transfer.drift.value) for transfer in furthest.values()), default=math.nan)
        largest = [sweep[-1] for sweep in sweeps.values() if len(sweep) == sizes]
        least_regret = min((transfer.regret.value for transfer in largest), default=math.nan)
        least_loss = min((transfer.loss.value for transfer in largest), default=math.nan)
        for name, sweep in sweeps.items():
            last = sweep[-1]
            table.add_row(
                axis,
                NAMES[name],
                f"{len(sweep)} of {sizes}",
                _marked(_drift(furthest[name]), abs(furthest[name].drift.value) == least_drift),
                str(slope_of(sweep)),
                _marked(last.regret.text(3), last.regret.value == least_regret) if last in largest else "-",
                _marked(last.loss.text(3), last.loss.value == least_loss) if last in largest else "-",
            )
        table.add_section()
    return table


def horizon_table(found: Mapping[str, Sequence[Transfer]]) -> Table:
    """Drift and regret of every depth, for each schedule and horizon."""
    table = number_table("schedule", "steps", "depth", *_QUANTITIES)
    for schedule, transfers in found.items():
        for transfer in sorted(transfers, key=lambda transfer: (transfer.horizon, transfer.factor)):
            table.add_row(schedule, str(transfer.horizon), f"× {transfer.factor:g}", *_cells(transfer))
        table.add_section()
    return table


def slope_of(sweep: Sequence[Transfer]) -> Slope:
    """Fit the logarithm of the best learning rate against that of the size."""
    return fit_slope([transfer.factor for transfer in sweep], [2.0**transfer.exponent for transfer in sweep])


def along(found: Iterable[Transfer], axis: str, parameterization: str) -> list[Transfer]:
    """What was measured along an axis with a parameterization."""
    return [transfer for transfer in found if (transfer.axis, transfer.parameterization) == (axis, parameterization)]


def _cells(transfer: Transfer) -> tuple[str, str, str, str]:
    best = f"{transfer.bound} 2^{transfer.exponent:.1f}".lstrip()
    return best, _drift(transfer), transfer.regret.text(3), transfer.loss.text(3)


def _drift(transfer: Transfer) -> str:
    text = transfer.drift.text(2)
    return f"{transfer.bound} {text if text.startswith('-') else f'+{text}'}".lstrip()


def _marked(text: str, least: bool) -> str:
    return f"[bold]{text}*[/bold]" if least else f"{text} "
