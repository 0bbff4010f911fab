"""Checksums of tensors, which tell that any of their values has changed, without a copy of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

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
    found: dict[str, tuple[Tensor, int]] = {}  # values, and how many parts they have
    margins: dict[torch.device, list[Tensor]] = {}
    for name, tensor in tensors.items():
        values = tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
        if type(values) is Tensor and not values.is_meta and values.numel() > 0:
            parts = (values.real, values.imag) if values.is_complex() else (values,)
            found[name] = values, len(parts)
            for part in parts:
                margins.setdefault(values.device, []).extend(_margins(part))
    sums = {device: iter(_sums(each)) for device, each in margins.items()}
    return {
        name: Checksum(values.shape, values.dtype, tuple(chain(*(next(sums[values.device]) for _ in range(parts)))))
        for name, (values, parts) in found.items()
    }


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LONGEST, _WIDTH = 2**20, 2**10


def _margins(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sums along all axes but the first, and but the last, in the type of the values: another would need a copy."""
    values = values.view(_INTEGERS[values.element_size()])
    if values.ndim < 2:
        values = values.reshape(-1)
        if len(values) <= _LONGEST:
            return values, values
        whole, rest = (
            values[: len(values) // _WIDTH * _WIDTH].view(-1, _WIDTH),
            values[len(values) // _WIDTH * _WIDTH :],
        )
        rows, columns = _margins(whole)
        return torch.cat((rows, rest)), torch.cat((columns, rest))
    first, last = range(1, values.ndim), range(values.ndim - 1)
    return values.sum(tuple(first), dtype=values.dtype), values.sum(tuple(last), dtype=values.dtype)


def _sums(margins: list[Tensor]) -> Iterator[list[int]]:
    """Sum of rows, and sums of rows and of columns with weights, for margins of rows and columns in turn.

    All are computed at once, and read once, because operations and reading take longer than the sums of most tensors.
    """
    lengths = [len(margin) for margin in margins]
    weights = {length: _weights(length, margins[0].device) for length in {*lengths}}
    values = torch.cat(margins).long()
    sums = torch.stack((values, values * torch.cat([weights[length] for length in lengths]))).cumsum(1)
    ends = torch.tensor(lengths, device="cpu").cumsum(0).to(sums.device) - 1
    found = torch.diff(sums[:, ends], prepend=sums.new_zeros(2, 1)).T.reshape(-1, 4)
    return ([plain, rows, columns] for plain, rows, _, columns in found.tolist())


def _weights(length: int, device: torch.device) -> Tensor:
    """Integers that look random, so that no simple exchange or change of signs leaves a sum as it is."""
    places = torch.arange(1, length + 1, device=device)
    return places * places * 2654435761 % 2147483647
