"""Checksums of tensors, which tell on the device whether values have changed, without a copy of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Checksum:
    """Sums over one tensor, or over this process's part of it."""

    shape: torch.Size
    dtype: torch.dtype
    exact: tuple[int, ...]  # of bits, which are the same on every device
    rough: tuple[float, ...]  # of values, for a comparison with those in another precision

    def is_of(self, other: Checksum) -> bool:
        """Whether both are of equal values, or of values that were rounded to another precision; True if shapes differ."""
        if self.shape != other.shape:
            return True  # as where a strategy has divided a tensor since
        if self.dtype == other.dtype or not (self.rough and other.rough):
            return self.exact == other.exact
        return self._differs_by_at_most(other, max(1e-4, torch.finfo(self.dtype).eps, torch.finfo(other.dtype).eps))

    def is_alike(self, other: Checksum) -> bool:
        """Whether both are of one shape and type."""
        return (self.shape, self.dtype) == (other.shape, other.dtype)

    def is_near(self, other: Checksum) -> bool:
        """Whether both are of values that are equal up to rounding, as those that were moved and moved back."""
        if self.is_of(other) or self.dtype != other.dtype or not (self.rough and other.rough):
            return self.is_of(other)
        return self._differs_by_at_most(other, 8 * torch.finfo(self.dtype).eps)

    def _differs_by_at_most(self, other: Checksum, eps: float) -> bool:
        # sums over random signs of rounding errors, and over equal ones, where values are equal
        norm, rows, columns, *sums = self.rough
        return all(
            math.isclose(one, two, rel_tol=0.0, abs_tol=eps * (norm + rows + columns))
            for one, two in zip((norm, *sums), (other.rough[0], *other.rough[3:]), strict=True)
        )


@torch.no_grad()
def checksums(tensors: Mapping[str, Tensor], rough: bool = False) -> dict[str, Checksum]:
    """Sum over each tensor that has values and is of torch's own class.

    With ``rough``, values can also be compared after a cast to another precision. Unlike versions, sums see changes
    through ``.data``. Rows and columns have different weights, because sums of bits alone miss an even number of signs.
    """
    kinds, found = {}, {}
    for name, tensor in tensors.items():
        values = tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
        if type(values) is Tensor and not values.is_meta and values.numel() > 0:
            parts = (values.real, values.imag) if values.is_complex() else (values,)
            kinds[name] = values.shape, values.dtype
            castable = rough and values.is_floating_point() and values.element_size() > 1
            found[name] = torch.cat([*map(_exact, parts)]), _rough(values) if castable else None
    return {  # read after all were computed, because reading waits for the device
        name: Checksum(*kinds[name], tuple(bits.tolist()), () if sums is None else tuple(sums.tolist()))
        for name, (bits, sums) in found.items()
    }


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _exact(values: Tensor) -> Tensor:
    rows, columns = (part.long() for part in _margins(values.view(_INTEGERS[values.element_size()])))
    return torch.stack([rows.sum(), *((part * _weights(part)).sum() for part in (rows, columns))])


def _weights(part: Tensor) -> Tensor:
    """Integers that look random, so that no simple exchange or change of signs leaves a sum as it is."""
    places = torch.arange(1, len(part) + 1, device=part.device)
    return places * places * 2654435761 % 2147483647


def _rough(values: Tensor) -> Tensor:
    rows, columns = (part.float() for part in _margins(values))
    norms = [torch.linalg.vector_norm(each).float() for each in (values, rows, columns)]
    places = (torch.arange(len(part), device=part.device).cos() for part in (rows, columns))
    return torch.stack([*norms, *((part * place).sum() for part, place in zip((rows, columns), places, strict=True))])


def _margins(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sums along all axes but the first, and but the last, in the type of the values: another would need a copy."""
    if values.ndim < 2:
        return values.reshape(-1), values.reshape(-1)
    first, last = range(1, values.ndim), range(values.ndim - 1)
    return values.sum(tuple(first), dtype=values.dtype), values.sum(tuple(last), dtype=values.dtype)
