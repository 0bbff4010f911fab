"""Which axis of a tensor its coordinates, channels or units are in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlu_lightning.discovery.graph import Graph, Op
from mlu_lightning.discovery.operations import CONVOLUTIONS, PERMUTATIONS, VIEWS

__all__ = ["coordinate_axes"]


def coordinate_axes(graph: Graph, streams: Mapping[Op, Op]) -> dict[Op, int]:
    """Follow the axis of what the last matrix made, and on a stream that of the matrix which made the stream.

    A branch may mix tokens instead of coordinates: the axis that its last matrix made then is that of tokens. ``streams``
    has the operand of every residual addition that is the stream. Operations that cannot be followed have no axis.
    """
    axes: dict[Op, int] = {}
    for op in graph.ops:
        if graph.is_matrix(op):
            axes[op] = _written_axis(graph, op)
        elif graph.is_lookup(op):
            axes[op] = len(op.shape) - 1
        else:
            operands = (streams[op], *op.data) if op in streams else op.data
            moved = (_moved(op, operand, axes[operand]) for operand in operands if operand in axes)
            axis = next((axis for axis in moved if axis is not None), None)
            if axis is not None:
                axes[op] = axis
    return axes


def _written_axis(graph: Graph, op: Op) -> int:
    """Axis of the units that a parameter matrix makes."""
    if op.name in CONVOLUTIONS:
        return 1
    matrix_first = op.name in ("Mm", "Bmm", "Addmm", "Baddbmm") and not graph.matrices(op)[0].inputs_first
    return len(op.shape) - (2 if matrix_first else 1)


def _moved(op: Op, operand: Op, axis: int) -> int | None:
    """Where an operation puts an axis of its operand, None if that cannot be told."""
    before, after = operand.shape, op.shape
    if op.name in PERMUTATIONS:
        order = _order(op, len(before))
        return order.index(axis)
    if op.name in VIEWS | {"Squeeze", "Unsqueeze"}:
        ahead = math.prod(before[:axis])
        fits = (i for i, size in enumerate(after) if size == before[axis] and math.prod(after[:i]) == ahead)
        return next(fits, None)
    axis_after = axis + len(after) - len(before)  # shapes are broadcast at the front
    kept = len(after) >= len(before) and after[axis_after] == before[axis]
    return axis_after if kept and op.name not in ("Mm", "Bmm", "AsStrided") else None


def _order(op: Op, dimensions: int) -> list[int]:
    """Axis of the operand that each axis of a permutation is."""
    node: Any = op.node
    if op.name == "Permute":
        return [_signed(axis) % dimensions for axis in node._saved_dims]
    order = list(range(dimensions))
    if op.name == "Transpose":
        first, second = (_signed(axis) % dimensions for axis in (node._saved_dim0, node._saved_dim1))
        order[first], order[second] = second, first
        return order
    return order[::-1]


def _signed(axis: int) -> int:
    """Autograd shows negative axes as unsigned numbers."""
    return axis - 2**64 if axis >= 2**63 else axis
