"""Samples of tensors: a few entries of each, which tell at little cost that values have changed, where they are."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sample:
    """Entries of one tensor, or of this process's part of it."""

    shape: torch.Size
    values: Tensor  # on the CPU

    def is_of(self, other: Sample) -> bool:
        """Whether both are of equal values, or of values that were rounded to another precision; True if shapes differ."""
        one, two = self.values, other.values
        if self.shape != other.shape:
            return True  # as where a strategy has divided a tensor since
        if one.dtype == two.dtype:
            return torch.equal(one, two) or torch.equal(_bits(one), _bits(two))  # which are equal where there are NaN
        if not (one.is_floating_point() and two.is_floating_point()):
            return False
        infos = torch.finfo(one.dtype), torch.finfo(two.dtype)
        eps = max(1e-4, *(info.eps for info in infos))
        one, two = one.double(), two.double()
        size = float(one.square().mean().sqrt())
        least = max(info.smallest_normal * info.eps for info in infos)
        return torch.allclose(one, two, eps, eps * size + least, equal_nan=True)

    def is_near(self, other: Sample) -> bool:
        """Whether both are of values that are equal up to rounding, as those that were moved and moved back."""
        one, two = self.values, other.values
        if self.is_of(other) or one.dtype != two.dtype or not one.is_floating_point():
            return self.is_of(other)
        most = 8 * torch.finfo(one.dtype).eps * float(one.abs().max())
        return torch.allclose(one.double(), two.double(), 0.0, most, equal_nan=True)

    def is_doubled(self, other: Sample) -> bool:
        """Whether the other's values are these but for a power of two, or have none that could be compared."""
        sizes = [float(torch.linalg.vector_norm(each.values.float())) for each in (self, other)]
        ratio = sizes[1] / sizes[0] if sizes[0] else 0.0
        if ratio == 0 or not math.isfinite(ratio):
            return True
        return math.frexp(ratio)[0] == 0.5 and torch.equal(self.values * ratio, other.values)

    def has_part_of(self, third: Sample, other: Sample) -> bool:
        """Whether the other's values are a multiple of these and, by more than rounding, one of the third's."""
        if self.is_of(other) or self.shape != third.shape or len(other.values) < 4:
            return False
        columns = torch.stack([self.values, third.values], dim=1).double()
        values = other.values.double()[:, None]
        parts = torch.linalg.lstsq(columns.nan_to_num(0, 0, 0), values.nan_to_num(0, 0, 0), driver="gelsd").solution
        return bool((values - columns @ parts).norm() < 1e-3 * (columns[:, 1] * parts[1]).norm())


@torch.no_grad()
def samples(tensors: Mapping[str, Tensor]) -> dict[str, Sample]:
    """Take entries of each tensor; those without values, or of other classes than torch's own, are left out.

    Every row and every column has one: of units, inputs and tokens, and of whole tensors if they are small. Unlike
    versions, values show changes through ``.data``.
    """
    alike: defaultdict[object, list[tuple[str, torch.Size, Tensor]]] = defaultdict(list)
    for name, tensor in tensors.items():
        values = tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
        if type(values) is Tensor and values.layout is torch.strided and not values.is_meta and values.numel() > 0:
            taken = values.reshape(-1)[:: _stride(values.shape)]
            alike[values.device, values.dtype].append((name, values.shape, taken))
    found: dict[str, Sample] = {}
    for group in alike.values():  # at once, because reading waits for the device
        joined = torch.cat([taken for *_, taken in group]).cpu()
        parts = joined.split_with_sizes([len(taken) for *_, taken in group])
        found |= {name: Sample(shape, part) for (name, shape, _), part in zip(group, parts, strict=True)}
    return {name: found[name] for name in tensors if name in found}


_WHOLE = 4096
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@cache
def _stride(shape: torch.Size) -> int:
    """Distance of entries that are taken: at most a row, and without a common divisor, so that no column is left out."""
    count = shape.numel()
    if count <= _WHOLE:
        return 1
    lengths = [math.prod(shape[axis:]) for axis in range(1, len(shape))] or [math.isqrt(count)]
    length = min(lengths, key=lambda length: max(length, count // length))
    stride = min(length, count // length)
    while math.gcd(stride, length) > 1:
        stride -= 1
    return stride


def _bits(values: Tensor) -> Tensor:
    values = torch.view_as_real(values) if values.is_complex() else values
    return values.view(_INTEGERS[values.element_size()])
