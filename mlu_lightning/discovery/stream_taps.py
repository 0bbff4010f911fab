"""Where streams and outputs can be read: the submodules that are given them or return them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

from mlu_lightning.discovery.coordinate_axes import PERMUTING, coordinate_axes
from mlu_lightning.discovery.graph import RESHAPES, Graph, Op, transparent_source
from mlu_lightning.discovery.placement import BranchPlacement, fans
from mlu_lightning.discovery.structure import Site, Tap
from mlu_lightning.discovery.trace import Passed, Rehearsal

__all__ = ["Taps"]

_Value = tuple[Op, int]


@dataclass(frozen=True)
class Taps:
    """Places to read from in one rehearsed module.

    Only the first call of a submodule counts, because that is the one that is read later.

    Args:
        rehearsal: a forward pass.
        graph: its graph.
        streams: what of every residual addition is the stream.
        multiplied: where multipliers can be attached; what one of these has changed is not read.
    """

    rehearsal: Rehearsal
    graph: Graph
    streams: Mapping[Op, Op]
    multiplied: frozenset[Site]

    def stream(self, number: int, placements: Iterable[BranchPlacement]) -> list[Tap]:
        """Where a stream can be read, by position.

        Args:
            number: of the stream.
            placements: its branches; where several forward passes run along it, the one that can be read best counts.
        """
        passes: dict[int, list[BranchPlacement]] = defaultdict(list)
        for placement in placements:
            passes[placement.region.stream].append(placement)
        return max((list(self._along(number, of_pass)) for of_pass in passes.values()), key=len)

    def readout(self, number: int, matrices: Iterable[Op], biases: set[Op]) -> Tap | None:
        """Where the output of a readout can be read.

        Args:
            number: of the readout.
            matrices: every operation with its matrix.
            biases: operations that add a readout's bias.
        """
        for matrix in matrices:
            for op in self._outputs(matrix, biases):
                tap = self._tap("readout", number, 0, (op, 0), self._axes.get(op))
                if tap is not None:
                    return tap
        return None

    def _along(self, number: int, placements: list[BranchPlacement]) -> Iterator[Tap]:
        """Taps of a stream in one forward pass."""
        at: dict[int, list[BranchPlacement]] = defaultdict(list)
        for placement in placements:
            at[placement.region.position].append(placement)
        steps = [at[position] for position in range(len(at))]
        # branches that are added in turn but read one root are one addition, whose last sum is the stream
        sums = [max((p.region.addition for p in step), key=lambda op: op.index) for step in steps]
        roots = [step[0].region.root for step in steps]
        axes = [self._axis(addition, step[0]) for addition, step in zip(sums, steps, strict=True)]
        begin = _added(min((p.region.addition for p in steps[0]), key=lambda op: op.index), roots[0])
        values: list[tuple[list[_Value], int | None]] = [([begin], self._axis_before(begin[0], sums[0], axes[0]))]
        for addition, root, axis in zip(sums, roots[1:], axes, strict=False):
            values.append(([(op, 0) for op in (addition, *_read_next(self.graph, addition, root))], axis))
        values.append(([(op, 0) for op in (sums[-1], *self._read_last(sums, roots))], axes[-1]))
        before: _Value | None = None
        for position, (choices, axis) in enumerate(values):
            taps = ((value, self._tap("stream", number, position, value, axis)) for value in choices)
            value, tap = next((found for found in taps if found[1] is not None), (choices[0], None))
            if tap is not None:
                yield tap
            elif position > 0 and before is not None:
                branches = [placement.region.end for placement in steps[position - 1]]
                added = self._branches_added(number, position - 1, sums[position - 1], before, branches, axis)
                yield from added
                tap = added[0] if added else None
            before = None if tap is None else self._canonical(*value)

    def _branches_added(
        self, number: int, position: int, addition: Op, before: _Value, branches: Sequence[Op], axis: int | None
    ) -> list[Tap]:
        """Taps of branches that add up, with the stream before, to the stream after; none if others are added too.

        Args:
            number: of the stream.
            position: of the addition.
            addition: its last sum.
            before: the stream that can be read before.
            branches: their last operations.
            axis: of the coordinates.
        """
        ends = [self._canonical(end, 0) for end in branches]
        summands, stack = Counter[_Value](), [self._canonical(addition, 0)]
        while stack:
            value = stack.pop()
            op, node = value[0], cast(Any, value[0].node)
            if value == before or value in ends or op.name != "Add" or len(op.data) < 2 or node._saved_alpha != 1:
                summands[value] += 1
            else:
                stack.extend(self._canonical(*operand) for operand in op.operands if operand is not None)
        taps = [self._tap("branch", number, position, end, axis) for end in ends]
        plain = summands == Counter([before, *ends]) and all(
            math.prod(op.shape) == math.prod(addition.shape) for op, _ in summands
        )
        return [tap for tap in taps if tap is not None] if plain and None not in taps else []

    def _read_last(self, sums: Sequence[Op], roots: Sequence[Op]) -> list[Op]:
        """What is read of the last addition, if what follows the one before it follows it too."""
        if len(sums) < 2:
            return []
        op, found = sums[-1], list[Op]()
        for before in reversed(_read_next(self.graph, sums[-2], roots[-1])):
            readers = self._readers[op]
            if [reader.name for reader in readers] != [before.name] or readers[0].shape != op.shape:
                return []
            op = readers[0]
            found.append(op)
        return found[::-1]

    def _outputs(self, matrix: Op, biases: set[Op]) -> list[Op]:
        """A readout's matrix and its arrangements; only those with the bias if one is added on its own."""
        plain, biased = [matrix], list[Op]()
        for ops in (plain, biased):
            for op in ops:  # which grows
                for reader in self._readers[op]:
                    if reader in biases:
                        biased.append(reader)
                    elif reader.name in RESHAPES and len(reader.data) == 1:
                        ops.append(reader)
        return biased or plain

    def _tap(
        self,
        reads: Literal["stream", "branch", "readout"],
        number: int,
        position: int,
        value: _Value,
        axis: int | None,
    ) -> Tap | None:
        """The best place for a value, None if there is none; a branch is read as it is added, multiplied."""
        last = len(value[0].shape) - 1
        value = self._canonical(*value)
        changed = self._changed.get(value, math.inf)
        multiplied = reads == "branch" and value in self._changed
        places = [place for place in self._places.get(value, ()) if (place.time >= changed) == multiplied]
        if not places or axis is None:
            return None
        place = min(places, key=lambda place: place.inner_rank if reads == "readout" else place.rank)
        return Tap(reads, number, position, place.module, place.where, place.index, -1 if axis == last else axis)

    def _axis(self, addition: Op, placement: BranchPlacement) -> int | None:
        """Axis of the stream's coordinates in what an addition makes."""
        if addition in self._axes:
            return self._axes[addition]
        # an operation that cannot be followed lies in between: the size of the axis gives it away
        writer = (placement.writers or placement.matrices)[-1]
        dimension = fans(self.graph.matrices(writer)[0])[1]
        return max((axis for axis, size in enumerate(addition.shape) if size == dimension), default=None)

    def _axis_before(self, begin: Op, addition: Op, axis: int | None) -> int | None:
        """Axis of the coordinates in what the first branch reads, where a pooling may come before."""
        return axis if len(begin.shape) == len(addition.shape) else self._axes.get(begin)

    def _canonical(self, op: Op, output: int) -> _Value:
        """Walk back over operations that keep every entry in its place, and coordinates in the last axis."""
        while len(op.data) == 1:
            operand = next(o for o in op.operands if o is not None and o[0].from_data)
            same = operand[0].shapes[operand[1]] == op.shape or self._flattens(op, operand[0])
            if not (op.name in RESHAPES - PERMUTING - {"AsStrided"} and same) and not _is_dropout(op):
                break
            op, output = operand
        return op, output

    def _flattens(self, op: Op, operand: Op) -> bool:
        """Whether an operation splits or joins the axes before the last one, in which the coordinates are."""
        return all(self._axes.get(o) == len(o.shape) - 1 for o in (op, operand)) and op.shape[-1] == operand.shape[-1]

    @cached_property
    def _axes(self) -> dict[Op, int]:
        return coordinate_axes(self.graph, self.streams)

    @cached_property
    def _places(self) -> dict[_Value, list[_Place]]:
        """Places of every value that some submodule's first call is given or returns."""
        counts = Counter(call.module for call in self.rehearsal.calls)
        places: dict[_Value, list[_Place]] = defaultdict(list)
        seen: set[str] = set()
        for call in self.rehearsal.calls:
            passed: list[tuple[Literal["input", "output"], int, Passed]]
            passed = [("input", call.begin, tensor) for tensor in call.inputs]
            passed += [("output", call.end, tensor) for tensor in call.outputs]
            for where, time, tensor in passed if call.module not in seen else ():
                if tensor.node in self.graph.by_node:  # else it does not reach the loss
                    value = self._canonical(self.graph.by_node[tensor.node], tensor.output)
                    places[value].append(_Place(call.module, where, tensor.index, counts[call.module], time))
            seen.add(call.module)
        return places

    @cached_property
    def _changed(self) -> dict[_Value, int]:
        """When a multiplier changes a value that a submodule returns."""
        sites = {(site.module, site.index) for site in self.multiplied if site.where == "output"}
        changed: dict[_Value, int] = {}
        for call in self.rehearsal.calls:
            for tensor in call.outputs:
                if (call.module, tensor.index) in sites and tensor.node in self.graph.by_node:
                    changed.setdefault(self._canonical(self.graph.by_node[tensor.node], tensor.output), call.end)
        return changed

    @cached_property
    def _readers(self) -> dict[Op, list[Op]]:
        readers: dict[Op, list[Op]] = defaultdict(list)
        for op in self.graph.ops:
            for operand in dict.fromkeys(op.data):
                readers[operand].append(op)
        return readers


@dataclass(frozen=True)
class _Place:
    """What the first of so many calls of a submodule is given or returns, and when."""

    module: str
    where: Literal["output", "input"]
    index: int | None
    calls: int
    time: int

    @property
    def doubts(self) -> tuple[bool, bool, bool]:
        """What another forward pass may do in another way, the worst first."""
        return self.calls > 1, self.where == "input", self.where == "output" and self.index is not None

    @property
    def rank(self) -> tuple[object, ...]:
        """Prefers outer modules, which have short names, but the module itself last, because steps may not call it."""
        return *self.doubts, not self.module, len(self.module), self.module, self.index or 0

    @property
    def inner_rank(self) -> tuple[object, ...]:
        """Prefers inner modules, which return first."""
        return *self.doubts, self.time, self.index or 0


def _added(addition: Op, root: Op) -> _Value:
    """What goes into an addition as the stream; what its branch reads, where a shortcut changes the shape."""
    operands = (operand for operand in addition.operands if operand is not None and operand[0].from_data)
    return next((operand for operand in operands if transparent_source(operand[0]) is root), (root, 0))


def _read_next(graph: Graph, addition: Op, root: Op) -> list[Op]:
    """What may stand for an addition: what the next branch reads of it, then what comes in between, the last first.

    Args:
        graph: of the forward pass.
        addition: a residual one.
        root: what the branches of the next one read.
    """
    between: set[Op] = set()
    stack = [root]
    while stack:
        op = stack.pop()
        if op is addition or op in between:
            continue
        if op.index < addition.index or graph.is_matrix(op) or not op.data:
            return []
        between.add(op)
        stack.extend(op.data)
    # inside of a norm that is written by hand are squares and sizes, which do not stand for the stream
    chain = all(len(op.data) == 1 for op in between)
    ops = sorted(between, key=lambda op: op.index, reverse=True)
    return [op for op in ops if op.shape == addition.shape and (chain or op is root)]


def _is_dropout(op: Op) -> bool:
    """Whether data is multiplied with a constant for each of its entries, as dropout on a CPU does."""
    if op.name != "Mul" or op.operands[1] is not None or op.shape == ():
        return False
    node: Any = op.node
    noise = node._saved_other
    return tuple(noise.shape) == op.shape and 0 not in noise.stride()  # a mask for all coordinates is expanded
