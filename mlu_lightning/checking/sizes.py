"""The shapes at which a module is checked: along depth, hidden width and embedding, and along all of them together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mlu_lightning.shapes import Shape

__all__ = ["AXES", "Size", "default_axes", "sizes"]

AXES = "depth", "hidden", "embedding", "together"
"""Ways for a shape to grow."""


@dataclass(frozen=True)
class Size:
    """A shape on an axis, and how many times as large it is as the first one there."""

    axis: str
    factor: int
    shape: Shape


def default_axes(factors: Sequence[int], axes: Sequence[str] = AXES[:-1]) -> tuple[str, ...]:
    """Axes of a check: each on its own, and all together if that makes three sizes, the least that show a slope."""
    return (*axes, "together") if len(axes) > 1 and len(factors) > 3 else (*axes,)


def sizes(base: Shape, factors: Sequence[int], axes: Sequence[str] = AXES) -> tuple[Size, ...]:
    """List all sizes along each axis; a shape on several axes is there for each.

    Depth and hidden width grow from the base. The embedding grows where the hidden width is largest: in a network of
    finite width what happens at random in the stream is larger than what the theory has in the limit as D/(L M) grows
    (theory.md, section 2), and at the base's own hidden width that would be measured. All three together grow by all
    factors but the last.
    """
    if len(factors) < 2 or factors[0] != 1 or any(one >= next_ for one, next_ in itertools.pairwise(factors)):
        raise ValueError(f"factors={list(factors)} should be two or more that ascend from 1, such as [1, 2, 4, 8].")
    if not axes or not set(axes) <= set(AXES):
        raise ValueError(f"axes={list(axes)} should be some of: {', '.join(AXES)}.")
    depth, hidden, embedding = base.depth, base.hidden, base.embedding
    widest = hidden * factors[-1]
    found = [Size("depth", factor, Shape(depth * factor, hidden, embedding)) for factor in factors]
    found += [Size("hidden", factor, Shape(depth, hidden * factor, embedding)) for factor in factors]
    found += [Size("embedding", factor, Shape(depth, widest, embedding * factor)) for factor in factors]
    found += [
        Size("together", factor, Shape(depth * factor, hidden * factor, embedding * factor)) for factor in factors[:-1]
    ]
    return tuple(size for size in found if size.axis in axes)
