"""The shapes along each axis of a check."""

import pytest

from mlu_lightning import Shape
from mlu_lightning.checking.sizes import sizes


def test_sizes() -> None:
    grid = sizes(Shape(2, 3, 5), (1, 2, 4))
    assert [(s.shape.depth, s.shape.hidden, s.shape.embedding) for s in grid] == [
        *((2 * f, 3, 5) for f in (1, 2, 4)),
        *((2, 3 * f, 5) for f in (1, 2, 4)),
        *((2, 12, 5 * f) for f in (1, 2, 4)),
        *((2, 3 * f, 5 * f) for f in (1, 2, 4)),
        *((2 * f, 3 * f, 5 * f) for f in (1, 2)),
    ]
    assert {s.axis for s in sizes(Shape(2, 3, 5), (1, 2), ["hidden"])} == {"hidden"}
    for factors in ((), (1,), (2, 4), (1, 4, 2), (1, 1)):
        with pytest.raises(ValueError, match="should be two or more that ascend from 1"):
            sizes(Shape(2, 3, 5), factors)
    for axes in ([], ["wide"]):
        with pytest.raises(ValueError, match="should be some of: depth, hidden, embedding, width, together"):
            sizes(Shape(2, 3, 5), (1, 2, 4, 8), axes)
