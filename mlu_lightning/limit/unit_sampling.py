"""Sample hidden units of the infinite model, with less noise than independent draws.

A unit is a draw of Gaussian numbers, and its layer the mean over all (theory.md, section 5). Most of the error of n units,
1/sqrt(n), is taken away by units that are *antithetic* (two read the same and write the opposite, so that their sum is what
training has changed, alone) and *orthogonal* (of the lengths of Gaussian vectors: they cover all directions evenly).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Sampling = Literal["orthogonal", "independent"]


def draw_units(units: int, reads: int, writes: int, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw what hidden units read and write [units, reads + writes], with entries N(0, 1), in float32.

    ``"orthogonal"`` units are pairs that read the same and write the opposite, perpendicular to the other pairs of a
    block.
    """
    check_sampling(sampling, units)
    dimensions = reads + writes
    if sampling == "independent":
        return torch.randn(units, dimensions, generator=generator, dtype=torch.float32, device="cpu")
    pairs = units // 2
    full = math.ceil(pairs / dimensions)
    height = math.ceil(pairs / full)  # of blocks of equal height, none of them taller than it is wide
    gaussian = torch.randn(full, dimensions, height, generator=generator, dtype=torch.float32, device="cpu")
    # QR fixes signs by its own rule; those of the diagonal of R make the directions uniform
    directions, triangle = torch.linalg.qr(gaussian)
    directions = directions * triangle.diagonal(dim1=1, dim2=2).sign()[:, None, :]
    lengths = torch.randn(full, height, dimensions, generator=generator, dtype=torch.float32, device="cpu").norm(dim=2)
    drawn = (directions.mT * lengths[..., None]).flatten(0, 1)[:pairs]
    return torch.cat((drawn, torch.cat((drawn[:, :reads], -drawn[:, reads:]), 1)))


def check_sampling(sampling: str, *sizes: int) -> None:
    """Refuse an unknown sampling, and numbers of units that :func:`draw_units` cannot draw."""
    if sampling not in get_args(Sampling):
        raise ValueError(f"sampling={sampling!r} is none of: {', '.join(get_args(Sampling))}.")
    for units in sizes:
        if sampling == "orthogonal" and units % 2:
            raise ValueError(
                f'{units} hidden units or heads cannot be "orthogonal", which come in pairs: give an even number, or '
                'sampling="independent".'
            )


def exact_units(dimension: int) -> Tensor:
    """Make the 2r units [2r, 2r], in float64, with which a linear activation has its exact expectations.

    Linear branches depend on the moments E[(u, v)(u, v)ᵀ] alone, and updates are linear in (u, v), so units that start
    with the moments of the infinite population keep them (theory.md, section 5). Each reads or writes one coordinate.
    """
    return math.sqrt(2 * dimension) * torch.eye(2 * dimension, dtype=torch.float64, device="cpu")
