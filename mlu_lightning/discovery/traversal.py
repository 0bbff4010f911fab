"""Walks over the graph of a forward pass: back to where data comes from, between two points, and who comes before whom."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import cached_property

from mlu_lightning.discovery.graph import Graph, Op, Value
from mlu_lightning.discovery.operations import ARITHMETIC, NORMS, RESHAPES, SIZES

__all__ = [
    "Ancestry",
    "between",
    "descendants",
    "full_factors",
    "in_order",
    "is_normalizer",
    "is_transparent",
    "origin",
    "transparent_source",
    "walk_back",
]


def walk_back(starts: Iterable[Op], operands: Callable[[Op], Iterable[Op]] = lambda op: op.data) -> list[Op]:
    """Operations that a walk back from ``starts`` visits, these included; ``operands`` says where it goes on to."""
    visited = dict.fromkeys(starts)
    stack = list(visited)
    while stack:
        for operand in operands(stack.pop()):
            if operand not in visited:
                visited[operand] = None
                stack.append(operand)
    return list(visited)


def between(
    ends: Iterable[Op],
    stops: Callable[[Op], bool],
    operands: Callable[[Op], Iterable[Op]] = lambda op: op.data,
) -> tuple[tuple[Op, ...], set[Op]]:
    """Operations on the way back from ``ends`` to operations that stop it, in order, and those that did."""
    met: set[Op] = set()

    def further(op: Op) -> Iterable[Op]:
        if stops(op):
            met.add(op)
            return ()
        return operands(op)

    visited = walk_back(ends, further)
    return in_order(op for op in visited if op not in met), met


def in_order(ops: Iterable[Op]) -> tuple[Op, ...]:
    """Operations in topological order."""
    return tuple(sorted(ops, key=lambda op: op.index))


def descendants(ops: Iterable[Op], starts: Iterable[Op]) -> set[Op]:
    """``starts``, and those of ``ops``, which are in order, that come from them."""
    found = set(starts)
    for op in ops:
        if op not in found and any(operand in found for operand in op.data):
            found.add(op)
    return found


class Ancestry:
    """Which of some marked operations come before each operation of a region, or of the whole graph.

    Args:
        graph: graph of the forward pass.
        ops: operations of the region, in order.
        marked: operations to look for.
    """

    def __init__(self, graph: Graph, ops: Iterable[Op], marked: Iterable[Op]) -> None:
        self._graph, self._ops, self._marked = graph, tuple(ops), in_order(marked)
        self._bit = {op: 1 << i for i, op in enumerate(self._marked)}

    def of(self, op: Op) -> frozenset[Op]:
        """Marked operations that come before one."""
        found = self._before.get(op, 0)
        return frozenset(op for op in self._marked if found & self._bit[op]) if found else frozenset()

    def precedes(self, op: Op, other: Op) -> bool:
        """Whether a marked operation comes before another one."""
        return bool(self._before.get(other, 0) & self._bit[op])

    def feeds_matrix_before(self, op: Op, other: Op) -> bool:
        """Whether a parameter matrix lies on a way from a marked operation to another one, or is that other one."""
        return bool(self._through_matrix.get(other, 0) & self._bit[op])

    @cached_property
    def _before(self) -> dict[Op, int]:
        before: dict[Op, int] = {}
        for op in self._ops:
            bits = 0
            for operand in op.data:
                bits |= before.get(operand, 0) | self._bit.get(operand, 0)
            before[op] = bits
        return before

    @cached_property
    def _through_matrix(self) -> dict[Op, int]:
        through: dict[Op, int] = {}
        for op in self._ops:
            bits = self._before[op] if self._graph.is_matrix(op) else 0
            for operand in op.data:
                bits |= through.get(operand, 0)
            through[op] = bits
        return through


def origin(value: Value, passes: Callable[[Op], bool]) -> Value:
    """Walk back over operations that ``passes`` lets through, by the first operand that data enters."""
    while passes(value[0]):
        value = next(operand for operand in value[0].operands if operand is not None and operand[0].from_data)
    return value


def transparent_source(op: Op) -> Op:
    """Walk back over operations that only arrange, scale by constants, drop out or cast."""
    while is_transparent(op):
        op = op.data[0]
    return op


def is_transparent(op: Op) -> bool:
    """Whether an operation only arranges data, or computes them with constants."""
    if not op.data:
        return False
    alone = len(op.data) == 1 and sum(operand is not None for operand in op.operands) == 1
    return op.name in RESHAPES or (alone and (op.name in ARITHMETIC or op.name == "Neg"))


def full_factors(op: Op) -> tuple[Op, ...]:
    """Data that a product multiplies, without factors of which one number stands for many entries, such as weights."""
    size = math.prod(op.shape)
    return tuple(operand for operand in op.data if 2 * math.prod(operand.shape) > size) or op.data


def is_normalizer(op: Op) -> bool:
    """Whether an operation divides data by a size of that data: a norm, whole or its last step written by hand."""
    if op.name in NORMS:
        return True
    if op.name not in ("Mul", "Div") or len(op.data) != 2:
        return False
    sources = ((transparent_source(operand), operand) for operand in op.data)
    return any(source.name in SIZES and (1,) in (source.shape[-1:], operand.shape[-1:]) for source, operand in sources)
