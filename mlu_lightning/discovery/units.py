"""The hidden units of a branch: entries, or heads of several, that only meet in its last matrices.

A parameter, or some rows of it, are the units' own where the axis that those matrices sum over runs along them. What is
summed over before, as the coordinates of keys, is of bounded size, and so is what all units share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from mlu_lightning.discovery.axes import Axis, Reached, is_depthwise, reached_from, varies
from mlu_lightning.discovery.comparisons import Comparison, comparisons
from mlu_lightning.discovery.graph import ATTENTION, CHANNEL_NORMS, CONVOLUTIONS, LINEAR, PRODUCTS, Graph, Op, Use
from mlu_lightning.discovery.traversal import between


@dataclass(frozen=True)
class Units:
    """Hidden units of one branch."""

    graph: Graph
    ops: tuple[Op, ...]  # in order
    writers: tuple[Op, ...]  # matrices that write to the addition; if there are none, the last operation does
    of_experts: frozenset[Op]  # weights that experts are multiplied with

    @cached_property
    def number(self) -> int:
        """M: of heads where something is one number for each head, or keys are compared head by head; else of entries."""
        entries = self.entries
        own = [size for size in self._own_sizes() if size and entries % size == 0]
        if own and min(own) < entries:
            return min(own)
        compared = ((op, span) for op, spans in self._compared.rows.items() for span in spans)
        reached = self._reached.rows
        heads = [self._reached.groups(op, span) for op, span in compared if op in reached and span in reached[op]]
        return max((size for size in heads if size and entries % size == 0), default=entries)

    @cached_property
    def entries(self) -> int:
        """Entries that the last matrices sum over."""
        return max((value[0].shapes[value[1]][axis] for value, axis in self._ends), default=1)

    @cached_property
    def compared(self) -> int:
        """Entries over which units are compared, as coordinates of keys or of a state; 1 if they are not."""
        return max((comparison.size for comparison in self._comparisons), default=1)

    def rows(self, op: Op, heads: int = 0) -> int:
        """How many rows of a matrix are the units' own, or those of ``heads``; what makes fewer groups is shared."""
        found, number = self._reached.rows.get(op, {}), heads or self.number
        # the entries of one head that all share are as many as those of a head of its own
        size = self.entries // heads if heads else 1
        spans = sorted(span for span in found if self._reached.groups(op, span, size) >= number)
        total = end = 0
        for start, stop in spans:
            total += max(stop - max(start, end), 0)
            end = max(end, stop)
        return total

    def blocks(self, use: Use) -> int:
        """How many blocks for units of their own a matrix has, as a block-diagonal one does; 1 for any other."""
        blocks = use.shape[0] if use.op.name in PRODUCTS and len(use.shape) > 2 else 1
        own = blocks > 1 and 0 in self._reached.axes.get(use.op, {}) and self._varies(use, 0)
        return blocks if own else 1

    def are_compared(self, op: Op) -> bool:
        """Whether units are compared by what rows of a matrix make, and not by what further matrices make of that."""
        return op in self._compared_last.rows

    def makes_logits(self, op: Op) -> bool:
        """Whether what an operation makes is added to what a softmax reads."""
        while (op.name in LINEAR or self.graph.uses.get(op)) and len(self.graph.users[op]) == 1:
            op = self.graph.users[op][0]
        return op in self.ops and (op.name.endswith("Softmax") or op.name.startswith(ATTENTION))

    def own(self, use: Use) -> int:
        """How many entries for units a parameter has that meets them one by one; 0 if all heads share them."""
        op = use.op
        axes = self._reached.axes.get(op, {})
        if use.kind == "lookup":
            own = {axis: op.shape[axis] for axis in axes}
        else:
            first = 1 if op.name in CHANNEL_NORMS else len(op.shape) - len(use.shape)
            inside = range(first, first + len(use.shape))  # a norm of channels has none of the other axes
            own = {a: use.shape[a - first] for a in axes if a in inside and self._varies(use, a - first)}
        # heads come before the entries of a head
        of_heads = any(stride * size >= self.entries for axis in own for stride, size in axes[axis])
        return math.prod(own.values()) if of_heads else 0

    @staticmethod
    def _varies(use: Use, axis: int) -> bool:
        return varies((use.path[-1], 0), axis) if use.path else use.shape[axis] > 1

    def _own_sizes(self) -> Iterator[int]:
        for op, spans in self._reached.rows.items():
            if op.name in ("Bmm", "Baddbmm"):
                continue  # a matrix for each head, whose rows are of one head
            yield from (stop - start for start, stop in spans if (start, stop) not in self._compared.rows.get(op, ()))
        for op in self.ops:
            uses = (use for use in self.graph.uses.get(op, ()) if use.kind in ("add", "mul", "norm", "other"))
            yield from filter(None, map(self.own, uses))

    @cached_property
    def _ends(self) -> list[Axis]:
        if self.writers:
            return [(op.values[0], 1 if op.name in CONVOLUTIONS else len(op.data[0].shape) - 1) for op in self.writers]
        end = self.ops[-1]
        return [((end, 0), len(end.shape) - 1)]

    @cached_property
    def _reached(self) -> Reached:
        return reached_from(self.graph, self.ops, self._ends)

    @cached_property
    def _comparisons(self) -> list[Comparison]:
        return comparisons(self.graph, self.ops, self.of_experts)

    @cached_property
    def _compared_last(self) -> Reached:
        read = [operand for op in self.writers or self.ops[-1:] for operand in op.data]
        ops = set(self.ops)
        last, _ = between(read, lambda o: o not in ops or (self.graph.is_matrix(o) and not is_depthwise(self.graph, o)))
        of_last = [axis for each in self._comparisons if each.op in last for axis in each.axes]
        return reached_from(self.graph, self.ops, of_last)

    @cached_property
    def _compared(self) -> Reached:
        return reached_from(self.graph, self.ops, [axis for each in self._comparisons for axis in each.axes])
