"""Sizes at which a module is built to be checked: along depth, hidden width and embedding, and all of them together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mlu_lightning.shapes.error_bound import Shape

__all__ = ["AXES", "Size", "default_axes", "sizes"]

AXES = "depth", "hidden", "embedding", "together"
"""Ways for a shape to grow."""


@dataclass(frozen=True)
class Size:
    """A shape on the way along an axis.

    Args:
        axis: one of :data:`AXES`.
        factor: how many times as large as where the axis begins.
        shape: L, M and D.

    >>> Size("depth", 2, Shape(4, 8, 32)).factor
    2
    """

    axis: str
    factor: int
    shape: Shape


def default_axes(factors: Sequence[int], axes: Sequence[str] = AXES[:-1]) -> tuple[str, ...]:
    """Axes of a check: each on its own, and all together if that makes three sizes, from which slopes can be told.

    Args:
        factors: by which each grows.
        axes: that there are on their own.

    >>> default_axes((1, 2, 4)), default_axes((1, 2, 4, 8), ["depth", "embedding"])
    (('depth', 'hidden', 'embedding'), ('depth', 'embedding', 'together'))
    """
    return (*axes, "together") if len(axes) > 1 and len(factors) > 3 else (*axes,)


def sizes(base: Shape, factors: Sequence[int], axes: Sequence[str] = AXES) -> tuple[Size, ...]:
    """All shapes, along each axis; those that lie on several are there for each.

    Depth and hidden width grow from the base. The embedding grows where the hidden width is largest: in a network of
    finite width what happens at random in the stream is larger than what the theory has in the limit as D/(L M) grows
    (theory.md, section 2), so that at the base's own hidden width it would be this that is measured. All three together
    grow by all factors but the last.

    Args:
        base: L, M and D of the base.
        factors: by which they grow, ascending from 1.
        axes: along which.

    Raises:
        ValueError: if there are less than two factors, or they do not ascend from 1, or there is no such axis.

    >>> [(size.axis, size.shape.hidden, size.shape.embedding) for size in sizes(Shape(2, 4, 8), [1, 2]) if size.factor == 2]
    [('depth', 4, 8), ('hidden', 8, 8), ('embedding', 8, 16)]
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
