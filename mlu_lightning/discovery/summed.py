"""Sums beside branches: what is added to a stream in block after block, and what is read at several depths and summed.

Without a factor such sums grow with the number of summands, and so do their steps: they need 1/n as branches need 1/l.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch.autograd.graph import Node

from mlu_lightning.discovery.constants import Constants
from mlu_lightning.discovery.graph import LINEAR, NORMS, Graph, Op, Use
from mlu_lightning.discovery.residual import Partition
from mlu_lightning.table import Variant
from mlu_lightning.utilities.names import name_pattern_of_parts


class Mark(NamedTuple):
    """What sums say about one use of a parameter."""

    variant: Variant
    repeats: int  # n, the number of summands of its kind
    places: int = 1  # sums that what it makes is in


@dataclass(frozen=True)
class Summed:
    """Uses of parameters in summands, and summands that no parameter multiplies alone."""

    marks: dict[Use, Mark] = field(default_factory=dict)
    bare: float = 0.0  # their number, each with the module's own constant


class _Summand(NamedTuple):
    """One thing that is summed."""

    end: Op  # its operation, or the addition itself if it is a parameter
    total: Op  # the addition
    is_parameter: bool
    of_places: bool  # whether all summands are of the same standing, as readouts at several depths are


def find_sums(graph: Graph, partition: Partition, constants: Constants, constant_additions: Iterable[Node]) -> Summed:
    """Look through everything outside of branches; ``constant_additions`` add what needs no gradient."""
    return _Sums(graph, partition, constants, constant_additions).found()


class _Sums:
    def __init__(self, graph: Graph, partition: Partition, constants: Constants, added: Iterable[Node]) -> None:
        self.graph, self.constants = graph, constants
        self.fixed = {graph.by_node.get(node) for node in added}
        self.additions = {branch.addition for branch in partition.branches}
        streams = partition.streams
        self.head = {op for stream in streams for op in stream.head}
        parts = [part for s in streams for part in (*s.trunk, s.stem, s.shortcuts, s.link, s.head)]
        outside = {op for part in parts for op in part} - self.additions
        self.latest: dict[Op, int] = {}  # the last residual addition that an operation comes after
        line = set[Op]()  # what is a stream, or made of one alone, and not a comparison of tokens
        for op in graph.ops:
            before = max((self.latest[operand] for operand in op.data), default=-1)
            self.latest[op] = op.index if op in self.additions else before
            linear = len(op.data) < 2 or op.name in LINEAR or op.is_normalizer or graph.is_matrix(op)
            if op in self.additions or (linear and not op.name.endswith("Softmax") and not line.isdisjoint(op.data)):
                line.add(op)
        line |= {op for op in outside if self.latest[op] < 0 or op in self.head}
        line -= {op for s in streams for op in s.link if graph.uses.get(op)}  # of keys, to which no more is added
        self.sums = [op for op in graph.ops if op in outside & line and op.name in ("Add", "Sub") and op.shape != ()]
        self.summands = [summand for op in self._totals() for summand in self._summands(op)]
        self.alone = self._alone()

    def _totals(self) -> list[Op]:
        """Sums that are no parts of others."""
        of = set(self.sums)
        partial = {o.source for op in self.sums for o in self._others(op) if self._is_partial(o.source, of)}
        return [op for op in self.sums if op not in partial and self.latest[op] >= 0]

    def _is_partial(self, op: Op, sums: set[Op]) -> bool:
        return op in sums and len(op.data) > 1 and len(self.graph.users[op]) == 1

    def _others(self, op: Op) -> list[Op]:
        """Operands of a sum but the one that comes last along the stream; none if that is not one."""
        last = max(self.latest[operand] for operand in op.data) if op.data else -1
        later = [operand for operand in op.data if self.latest[operand] == last]
        return [operand for operand in op.data if operand is not later[0]] if len(later) == 1 else []

    def _summands(self, total: Op) -> list[_Summand]:
        of, found = set(self.sums), list[_Summand]()
        rest = self._others(total)
        leaves: list[Op] = []
        while rest:
            op = rest.pop()
            if self._is_partial(op.source, of):
                rest += op.source.data
            else:
                leaves.append(op)
        is_bias = bool(total.data) and self.graph.is_matrix(total.data[0].source)
        if any(use.kind == "add" for use in self.graph.uses.get(total, ())) and not is_bias:
            found.append(_Summand(total, total, is_parameter=True, of_places=False))
        places = total in self.head and any(self.latest[leaf] >= 0 for leaf in leaves)
        if places:
            leaves += [operand for operand in total.data if operand not in self._others(total)]
        return found + [_Summand(leaf, total, is_parameter=False, of_places=places) for leaf in leaves]

    def _alone(self) -> set[Op]:
        """Operations that nothing but summands are made of."""
        ends = defaultdict[Op, set[Op]](set)
        for summand in self.summands:
            ends[summand.end].add(summand.total)
        in_sum = {op for op in self.sums if self._is_partial(op, set(self.sums))}
        found: set[Op] = set()
        for op in reversed(self.graph.ops):
            users = self.graph.users[op]
            begins = [u for u in users if u in self.sums and self.latest[u] < 0 and len({*u.data}) > 1]
            own = (u in found or u in ends.get(op, ()) or (op in ends and (u in in_sum or u in begins)) for u in users)
            if op not in self.additions and users and len(begins) < len(users) and all(own):
                found.add(op)
        return found

    def _carrier(self, summand: _Summand) -> tuple[list[Use], bool]:
        """Uses of parameters that a summand is proportional to, together; whether weights that add up to one weigh it."""
        if summand.is_parameter:
            return [use for use in self.graph.uses[summand.total] if use.kind == "add"], False
        carrier, biases, op = list[Use](), list[Use](), summand.end
        while op in self.alone:
            uses = [*self.graph.uses.get(op, ())]
            kinds = {use.kind for use in uses}
            if any(step.name.endswith("Softmax") for use in uses for step in use.path):
                return [], True
            if kinds & {"matrix", "lookup"} or op.name in NORMS:
                return uses + biases, False
            if kinds == {"mul"} and len(op.data) == 1:
                carrier, biases = [use for use in uses if use.homogeneous], []
            elif kinds == {"add"} and len(op.data) == 1:
                biases += uses
            elif not op.is_transparent:
                break
            op = op.data[0]
        return carrier, False

    def _read(self, total: Op) -> list[Use] | None:
        """Uses of parameters that multiply a sum as a whole; None if none does and no norm makes that needless."""
        op = total
        while True:
            users = self.graph.users[op]
            if any(user.is_normalizer for user in users):
                return []
            uses = [u for u in self.graph.uses.get(users[0], ()) if u.kind in ("mul", "matrix")] if users else []
            if len(users) != 1 or uses or not users[0].is_transparent:
                return uses or None
            op = users[0]

    def found(self) -> Summed:
        """Group summands by the parameters that carry them, or by what they are."""
        groups = defaultdict[tuple[str, ...], list[tuple[_Summand, list[Use]]]](list)
        bare, weighed = list[_Summand](), list[_Summand]()
        for summand in self.summands:
            carrier, normalized = self._carrier(summand)
            if normalized:
                weighed.append(summand)
            elif carrier:
                key = tuple(sorted({name_pattern_of_parts(use.parameter) for use in carrier}))
                groups[key].append((summand, carrier))
            else:
                bare.append(summand)
        marks: dict[Use, Mark] = {}
        for key, group in groups.items():
            begin = self._at_begin(key, group)
            places = Counter([*begin, *(use for _, carrier in group for use in carrier)])
            ends = [summand.end for summand, _ in group] + [*dict.fromkeys(use.op for use in begin)]
            if len(ends) > 1:
                self._mark_inner(marks, ends)
                marks |= {use: Mark(Variant.SUMMED, len(ends), times) for use, times in places.items()}
        self._mark_inner(marks, [summand.end for summand in weighed])
        totals = {summand.total: [s for s in bare if s.total is summand.total] for summand in bare}
        left: list[Op] = []
        for total, summands in totals.items():
            read = self._read(total) if all(summand.of_places for summand in summands) else None
            if summands[0].of_places and len(summands) == 1:
                pass  # the stream itself
            elif read is None:
                left += [summand.end for summand in summands]
            else:
                marks |= {use: Mark(Variant.SUMMED, len(summands)) for use in read}
        sources = {end.source for end in left}
        begins = [[o for o in op.data if o.source in sources] for op in self.sums if self.latest[op] < 0]
        number = sum(map(self._constant, left)) + sum(min(map(self._constant, found)) for found in begins if found)
        fixed = [op for op in self.sums if op in self.fixed]
        if any(op.data[0].source in self.additions for op in fixed):
            number += sum(self.latest[op] < 0 or op.data[0].source in self.additions for op in fixed)
        return Summed(marks, number)

    def _constant(self, op: Op) -> float:
        return math.prod(map(self.constants.factor, self._behind(op)))

    def _behind(self, op: Op) -> Iterable[Op]:
        while op.is_transparent and op not in self.additions:
            yield op
            op = op.data[0]

    def _at_begin(self, key: tuple[str, ...], group: list[tuple[_Summand, list[Use]]]) -> list[Use]:
        """Uses of the same kind in the sum that the stream begins with, which is that of the first block."""
        names = {use.parameter for _, carrier in group for use in carrier}
        parts = {use.part for _, carrier in group for use in carrier}
        found: list[Use] = []
        for op in self.sums:
            if self.latest[op] < 0:
                own = [use for use in self.graph.uses.get(op, ()) if use.kind == "add"]
                made = [o.source for o in op.data]
                made = [o.data[0].source if o.name == "Add" and len(o.data) == 1 else o for o in made]
                own += [use for o in made for use in self.graph.uses.get(o, ())]
                alike = [use for use in own if name_pattern_of_parts(use.parameter) in key]
                alike = [use for use in alike if use.parameter in names or use.part in parts]
                found += [use for use in alike if use.op is alike[-1].op]
        return found

    def _mark_inner(self, marks: dict[Use, Mark], ends: list[Op]) -> None:
        """Mark what lies in one of several summands alone: its gradients are those of one."""
        seen = Counter[Op]()
        for end in ends:
            met = dict.fromkeys([end] if end in self.alone else ())
            stack = [*met]
            while stack:
                found = [op for op in stack.pop().data if op in self.alone and op not in met]
                met |= dict.fromkeys(found)
                stack += found
            seen.update([*met])
        alone = (op for op, times in seen.items() if times == 1 < len(ends))
        marks |= {use: Mark(Variant.OF_BLOCK, len(ends)) for op in alone for use in self.graph.uses.get(op, ())}
