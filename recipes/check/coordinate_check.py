"""The coordinate check of microsoft/mup, read as a careful reader of its picture would, but with numbers.

The picture has a curve for every module, of the mean absolute value (``l1``) of its output against width, in a panel for
every step, t = 1 before the first update. Its README asks that they be "stable over many widths".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from mup.coord_check import _get_coord_data
from torch import Tensor, nn
from torch.optim import Optimizer

from mlu_lightning.checking.quantities import DRIFT, Kind, Quantity
from mlu_lightning.checking.verdicts import Point, fit_row


@dataclass(frozen=True)
class Curve:
    """One curve of the picture."""

    module: str  # whose output it is
    t: int  # panel, 1 before the first update
    slope: float  # d log l1 / d log width
    error: float  # half the width of its 95 % confidence interval

    def __str__(self) -> str:
        return f"{self.module} at t={self.t}: {self.slope:+.2f}±{self.error:.2f}"


def coordinate_check(
    build: Callable[[int], nn.Module],
    make_optimizer: Callable[[nn.Module], Optimizer],
    batch: Tensor,
    factors: Sequence[int],
    seeds: int,
    steps: int,
    seed: int,
) -> list[Curve]:
    """Train networks of several widths by mup's own function, and fit the curves of its picture, panel by panel.

    That is the function behind ``get_coord_data``, whose optimizers have neither weight decay nor an eps of one's own, with
    its defaults. There is one panel more than there are steps, and no curve of the whole network, which mup does not plot.
    """
    numbers = itertools.count(seed * len(factors))

    def lazy(factor: int) -> Callable[[], nn.Module]:
        def built() -> nn.Module:
            torch.manual_seed(next(numbers))
            return build(factor)

        return built

    with isolate_rng():
        records = _get_coord_data(
            {factor: lazy(factor) for factor in factors},
            [(batch[:, :-1], batch[:, 1:].flatten())],
            make_optimizer,
            nsteps=steps + 1,
            nseeds=seeds,
            flatten_output=True,
            cuda=False,
            show_progress=False,
        )
    return [
        _fitted(module, t, found.to_dict("records"))
        for (t, module), found in records.groupby(["t", "module"], sort=False)
        if module
    ]


def excess(curve: Curve, output: str) -> float:
    """How far a slope is from flat.

    The module of the network's output may fall as width^(-1/2) at first, as mup's README says, and here as well after
    updates, with what is left of the start in it. Before the first of them it has to.
    """
    least, most = 0.0, 0.0
    if curve.module == output:
        least, most = -0.5, -0.5 if curve.t == 1 else 0.0
    return abs(curve.slope - min(max(curve.slope, least), most))


def is_off(curve: Curve, output: str) -> bool:
    """Whether a curve blows up or shrinks: all of its interval is above the 1/4 of this package's check."""
    return math.isnan(curve.slope) or excess(curve, output) - curve.error > DRIFT


def _fitted(module: str, t: int, records: Sequence[Mapping[str, Any]]) -> Curve:
    """Fit one curve; records have no seed, but come seed after seed, and for each width after width."""
    widths = len({record["width"] for record in records})
    points = [Point(record["width"], i // widths, *[record["l1"]] * 3) for i, record in enumerate(records)]
    row = fit_row(Quantity(Kind.FEATURES, module), "together", points)
    return Curve(module, t, row.slope, row.error)
