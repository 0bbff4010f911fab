"""Find where data meets data: products of two operands that both depend on data, summed over units."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlu_lightning.discovery.axes import Axis, kept_axes, reached_from
from mlu_lightning.discovery.graph import Graph, Op


@dataclass(frozen=True)
class Comparison:
    """A product of two operands, both from data, that is summed over units: queries and keys, or what acts on a state."""

    op: Op
    axes: tuple[Axis, Axis]  # that are summed over, of both operands

    @property
    def size(self) -> int:
        """How many units are summed over."""
        (op, output), axis = self.axes[0]
        return op.shapes[output][axis]


def is_product(op: Op, graph: Graph) -> bool:
    """Whether an operation is a matrix product of two operands from data."""
    return op.name in ("Bmm", "Baddbmm", "Mm") and len(op.data) > 1 and not graph.is_matrix(op)


def comparisons(graph: Graph, ops: Sequence[Op], weights: frozenset[Op] = frozenset()) -> list[Comparison]:
    """Products over units among operations, which are in order, but for those that sum over experts with ``weights``."""
    alike: dict[tuple[object, ...], list[Comparison]] = defaultdict(list)  # a loop over tokens has many of one form
    for op in ops:
        for axes in _summed(graph, op) if weights.isdisjoint(op.data) else ():
            alike[_form(op)].append(Comparison(op, axes))
    groups = alike.values()
    of_units = (found for found in groups if any(reached_from(graph, ops, [axis]).rows for axis in found[0].axes))
    return [comparison for found in of_units for comparison in found]


def _form(op: Op, steps: int = 4) -> tuple[object, ...]:
    """What an operation is, and what it is made of, some steps back."""
    return op.name, op.shapes, *(_form(operand, steps - 1) for operand in op.data if steps)


def _summed(graph: Graph, op: Op) -> Iterator[tuple[Axis, Axis]]:
    """Axes of both operands that a product is summed over, also of one that is written as a product and a sum."""
    if is_product(op, graph):
        first, second = op.values[-2:]
        rank = len(op.shape)
        yield (first, rank - 1), (second, rank - 2)
    elif op.name in ("Cdist", "EuclideanDist") and len(op.values) == 2:
        yield (op.values[0], len(op.shape) - 1), (op.values[1], len(op.shape) - 1)
    elif op.name in ("Sum", "Mean") and op.data:
        summed = op.data[0].source
        # squared distances are sums of powers of differences
        factors = summed.data[0] if summed.name in ("Pow", "Abs") and summed.data else summed
        shape = summed.shape
        full = [v for v in factors.values if len(v[0].shapes[v[1]]) == len(shape)]
        gone = [i for i in range(len(shape)) if i not in kept_axes(op, len(shape))]
        named = factors.name == ("Mul" if factors is summed else "Sub")
        if named and len(full) == 2 and len(gone) == 1 and full[0] != full[1] and not _is_center(graph, op, summed):
            axis = gone[0]
            if all(v[0].shapes[v[1]][axis] == shape[axis] > 1 for v in full):
                yield (full[0], axis), (full[1], axis)


def _is_center(graph: Graph, op: Op, summed: Op) -> bool:
    """Whether what was summed is centered or divided by the sum, as a norm that is written by hand does."""
    users = [*graph.users[op], *(o for user in graph.users[op] if user.source is op for o in graph.users[user])]
    return any(user.name in ("Sub", "Div") and any(o.source is summed for o in user.data) for user in users)
