"""The shapes of a check along depth, hidden width, embedding or all together, and whether a module grows with them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlu_lightning.planning import Plan
from mlu_lightning.shapes import Shape
from mlu_lightning.utilities.names import name_pattern

AXES = "depth", "hidden", "embedding", "width", "together"
"""Ways for a shape to grow; the width is hidden and embedding together, for modules that fix their ratio."""


@dataclass(frozen=True)
class Size:
    """A shape on an axis, and how many times as large it is as the first one there."""

    axis: str
    factor: int
    shape: Shape


def default_axes(factors: Sequence[int], axes: Sequence[str] = AXES[:3]) -> tuple[str, ...]:
    """Axes of a check: each on its own, and all together if that makes three sizes, the least that show a slope."""
    return (*axes, "together") if len(axes) > 1 and len(factors) > 3 else (*axes,)


def sizes(base: Shape, factors: Sequence[int], axes: Sequence[str] = AXES) -> tuple[Size, ...]:
    """List all sizes along each axis; a shape on several axes is listed for each.

    The embedding grows at the largest hidden width: the random part of the stream grows with D/(L M) (theory.md,
    section 2), and at the base's own width it would be what is measured.
    """
    if len(factors) < 2 or factors[0] != 1 or any(one >= next_ for one, next_ in itertools.pairwise(factors)):
        raise ValueError(f"factors={list(factors)} should be two or more that ascend from 1, such as [1, 2, 4, 8].")
    if not axes or not set(axes) <= set(AXES):
        raise ValueError(f"axes={list(axes)} should be some of: {', '.join(AXES)}.")

    def grown(depth: int, hidden: int, embedding: int) -> Shape:
        return Shape(base.depth * depth, base.hidden * hidden, base.embedding * embedding)

    found = [Size("depth", factor, grown(factor, 1, 1)) for factor in factors]
    found += [Size("hidden", factor, grown(1, factor, 1)) for factor in factors]
    found += [Size("embedding", factor, grown(1, factors[-1], factor)) for factor in factors]
    found += [Size("width", factor, grown(1, factor, factor)) for factor in factors]
    found += [Size("together", factor, grown(factor, factor, factor)) for factor in factors[:-1]]
    return tuple(size for size in found if size.axis in axes)


def check_growth(axis: str, factor: int, small: Plan, large: Plan) -> None:
    """Refuse modules that do not grow along an axis, because they would pass; one kind of stream or branch is enough."""
    if any(_grows(grown, factor, small, large) for grown in _PARTS.get(axis, (axis,))):
        return
    if axis in _PARTS:
        parts = "depth, hidden width or embedding" if axis == "together" else "hidden width or embedding"
        raise ValueError(
            f"The module does not grow with its {parts}. Let the module_factory use depth=..., hidden=... and embedding=..."
        )
    had = "as they had at half of it" if factor == 2 else f"as they had at 1/{factor} of it"
    whose, what = _COUNTED[axis]
    listed = ", ".join(map(str, dict.fromkeys(_sizes(axis, large))))
    raise ValueError(
        f"The module does not grow with its {axis}: {whose} have {listed} {what}, {had}. Let the "
        f"module_factory use {axis}=..., or leave it out with axes=[...] (--{axis} null on the command line, or names "
        "of other arguments)."
    )


_COUNTED = {
    "depth": ("its streams", "additions"),
    "hidden": ("its branches", "hidden units, heads or channels"),
    "embedding": ("its streams", "dimensions"),
}

_PARTS = {"width": ("hidden", "embedding"), "together": ("depth", "hidden", "embedding")}


def _grows(axis: str, factor: int, small: Plan, large: Plan) -> bool:
    before, after = _sizes(axis, small), _sizes(axis, large)
    if len(before) != len(after):
        return True
    # sizes may be rounded
    return any(new >= old * math.sqrt(factor) for old, new in zip(before, after, strict=True))


def _sizes(axis: str, plan: Plan) -> list[int]:
    if axis == "hidden":
        # each kind and name once, however many blocks there are
        return list({(name_pattern(branch.name), branch.kind): branch.hidden for branch in plan.branches}.values())
    return [stream.depth if axis == "depth" else stream.embedding for stream in plan.streams]
