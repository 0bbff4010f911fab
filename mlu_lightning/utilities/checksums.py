"""Checksums of tensors, which tell that any of their values has changed, without a copy of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Checksum:
    """Sums over one tensor, or over this process's part of it."""

    shape: torch.Size
    dtype: torch.dtype
    sums: tuple[int, ...]  # of bits, which are the same on every device


@torch.no_grad()
def checksums(tensors: Mapping[str, Tensor]) -> dict[str, Checksum]:
    """Sum over each tensor that has values and is of torch's own class.

    Unlike versions, sums see changes through ``.data``. Rows and columns have different weights, because sums of bits alone
    miss an even number of signs.
    """
    found, weights = {}, cache(_weights)
    for name, tensor in tensors.items():
        values = tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
        if type(values) is Tensor and not values.is_meta and values.numel() > 0:
            parts = (values.real, values.imag) if values.is_complex() else (values,)
            found[name] = values.shape, values.dtype, torch.cat([_sums(part, weights) for part in parts])
    # read after all were computed, because reading waits for the device
    return {name: Checksum(shape, dtype, tuple(sums.tolist())) for name, (shape, dtype, sums) in found.items()}


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sums(values: Tensor, weights: Callable[[int, torch.device], Tensor]) -> Tensor:
    rows, columns = (part.long() for part in _margins(values.view(_INTEGERS[values.element_size()])))
    weighted = (part * weights(part.shape[0], part.device) for part in (rows, columns))
    return torch.stack([rows.sum(), *(part.sum() for part in weighted)])


def _weights(length: int, device: torch.device) -> Tensor:
    """Integers that look random, so that no simple exchange or change of signs leaves a sum as it is."""
    places = torch.arange(1, length + 1, device=device)
    return places * places * 2654435761 % 2147483647


def _margins(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sums along all axes but the first, and but the last, in the type of the values: another would need a copy."""
    if values.ndim < 2:
        return values.reshape(-1), values.reshape(-1)
    first, last = range(1, values.ndim), range(values.ndim - 1)
    return values.sum(tuple(first), dtype=values.dtype), values.sum(tuple(last), dtype=values.dtype)
