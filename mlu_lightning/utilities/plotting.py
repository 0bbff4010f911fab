"""Names beside curves, apart from each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

__all__ = ["apart"]


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Move ascending places apart to at least a gap: the mean of pushing all up and pushing all down.

    Args:
        places: ascending.
        gap: that there should be between them, in the same units.

    >>> apart([0.0, 0.0, 5.0], 1.0)
    [-0.5, 0.5, 5.0]
    """
    up = list(accumulate(places, lambda last, place: max(place, last + gap)))
    down = list(accumulate(reversed(places), lambda last, place: min(place, last - gap)))
    return [(high + low) / 2 for high, low in zip(up, reversed(down), strict=True)]
