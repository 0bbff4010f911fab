"""The distances of ``distances.py`` as torchmetrics, for batched data and several ranks.

``compute()`` is the distance of all samples seen since ``reset()``, on all processes, as if they had come at once, and NaN
if there were none. States are float64 whatever type a module is converted to; values have no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from mlu_lightning.observation.distances import (
    cka_distance,
    comparable,
    gram_distance,
    output_distance,
    procrustes_distance,
    rms_distance,
)


class _Distance(Metric):
    """A metric whose states stay float64."""

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    _distance: Callable[[Tensor, Tensor], Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the states, which torchmetrics also gives to what a rank without samples sends."""
        return torch.float64

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> nn.Module:
        """Move the states to where ``fn`` moves tensors, and leave their type."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), *args)


class _MeanSquareDistance(_Distance):
    """Root mean square of entries, from their number and the sum of squares."""

    total: Tensor
    entries: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("entries", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, streams: Tensor, reference: Tensor) -> None:
        distance = self._distance(streams.detach(), reference.detach())
        self.total = self.total + distance.square() * streams.numel()
        self.entries = self.entries + streams.numel()

    def compute(self) -> Tensor:
        return (self.total / self.entries).sqrt()


class _SampleDistance(_Distance):
    """Distance that needs all samples at once; they are flat, as torchmetrics gathers one axis from empty ranks."""

    rows: list[Tensor]
    samples: Tensor
    widths: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("rows", [], dist_reduce_fx="cat")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("widths", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="max")

    def update(self, streams: Tensor, reference: Tensor) -> None:
        streams, reference = comparable(streams.detach(), reference.detach())
        widths = self.widths.new_tensor([streams.shape[1], reference.shape[1]])
        self.rows.append(torch.cat((streams, reference), dim=1).flatten())
        self.samples = self.samples + len(streams)
        self.widths = torch.maximum(self.widths, widths)

    def compute(self) -> Tensor:
        samples, (width, reference_width) = int(self.samples), self.widths.tolist()
        if not samples:
            return torch.full((), math.nan, dtype=self.dtype, device=self.samples.device)
        rows = dim_zero_cat(self.rows)
        if rows.numel() != samples * (width + reference_width):
            raise ValueError(
                f"The batches had streams of different dimensions, up to {width} and {reference_width} of the reference. "
                "Use one metric per pair of models and location, and reset() it before others."
            )
        rows = rows.view(samples, -1)
        return self._distance(rows[:, :width], rows[:, width:])


class RMSDistance(_MeanSquareDistance):
    """:func:`~mlu_lightning.observation.distances.rms_distance` of all samples seen: for coupled embeddings, D <= D_ref."""

    _distance = staticmethod(rms_distance)


class GramDistance(_SampleDistance):
    """:func:`~mlu_lightning.observation.distances.gram_distance` of all samples seen, kept until ``reset()``."""

    _distance = staticmethod(gram_distance)


class CKADistance(_SampleDistance):
    """:func:`~mlu_lightning.observation.distances.cka_distance` of all samples seen, kept until ``reset()``."""

    _distance = staticmethod(cka_distance)


class ProcrustesDistance(_SampleDistance):
    """:func:`~mlu_lightning.observation.distances.procrustes_distance` of all samples seen, kept until ``reset()``."""

    _distance = staticmethod(procrustes_distance)


class OutputDistance(_MeanSquareDistance):
    """:func:`~mlu_lightning.observation.distances.output_distance` of all samples seen."""

    def update(self, outputs: Tensor, reference: Tensor) -> None:
        """Add samples: outputs [samples, targets] of one model and of the other on them."""
        super().update(outputs, reference)

    _distance = staticmethod(output_distance)
