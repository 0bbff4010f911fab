"""Walk the graph of a forward pass: back to its origins, between two points, and by order of ancestry."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

from mlu_lightning.discovery.graph import Graph, Op, Value


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
    ends: Iterable[Op], stops: Callable[[Op], bool], operands: Callable[[Op], Iterable[Op]] = lambda op: op.data
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
    """Which of some marked operations, by default those with a matrix, come before each operation of a region, as bits."""

    def __init__(self, graph: Graph, ops: Iterable[Op], marked: Iterable[Op] | None = None) -> None:
        self._graph, self._ops = graph, tuple(ops)
        self._marked = in_order(filter(graph.is_matrix, self._ops) if marked is None else marked)
        self._bit = {op: 1 << i for i, op in enumerate(self._marked)}

    def of(self, op: Op) -> frozenset[Op]:
        """Marked operations that come before one."""
        before = self._bits_before(op)
        return frozenset(other for other in self._marked if before & self._bit[other]) if before else frozenset()

    def precedes(self, op: Op, other: Op) -> bool:
        """Whether a marked operation comes before another one."""
        return bool(self._bits_before(other) & self._bit[op])

    def feeds_matrix_before(self, op: Op, other: Op) -> bool:
        """Whether a parameter matrix lies on a way from a marked operation to another one, or is that other one."""
        return bool(self._through_matrix.get(other, 0) & self._bit[op])

    def _bits_before(self, op: Op) -> int:
        return self._until.get(op, 0) & ~self._bit.get(op, 0)

    @cached_property
    def _until(self) -> dict[Op, int]:
        return self._accumulated(lambda op: self._bit.get(op, 0))

    @cached_property
    def _through_matrix(self) -> dict[Op, int]:
        return self._accumulated(lambda op: self._bits_before(op) if self._graph.is_matrix(op) else 0)

    def _accumulated(self, own: Callable[[Op], int]) -> dict[Op, int]:
        """Bits of each operation and of all that come before it."""
        bits: dict[Op, int] = {}
        for op in self._ops:
            bits[op] = own(op)
            for operand in op.data:
                bits[op] |= bits.get(operand, 0)
        return bits


def origin(value: Value, passes: Callable[[Op], bool]) -> Value:
    """Walk back over operations that ``passes`` lets through, by the first operand that data enters."""
    while passes(value[0]):
        value = value[0].values[0]
    return value
