"""Labels beside curves that do not overlap."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending heights apart by at least a gap: halfway between pushing all of them up and all of them down."""
    up = list(accumulate(heights, lambda last, height: max(height, last + gap)))
    down = list(accumulate(reversed(heights), lambda last, height: min(height, last - gap)))
    return [(high + low) / 2 for high, low in zip(up, reversed(down), strict=True)]
