"""Find where streams and outputs can be read: submodules that take or return them."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast

from mlu_lightning.discovery.branch_roles import BranchRoles
from mlu_lightning.discovery.constants import Constants
from mlu_lightning.discovery.graph import CONVOLUTIONS, PERMUTATIONS, RESHAPES, VIEWS, Graph, Op, Value
from mlu_lightning.discovery.structure import Site, Tap
from mlu_lightning.discovery.trace import Trace
from mlu_lightning.discovery.traversal import between, descendants, origin

_Key = tuple[Literal["stream", "branch", "readout"], int, int]  # what a tap reads, its number and position


@dataclass(frozen=True)
class StreamTaps:
    """Taps of streams and readouts in a traced module, at first calls of submodules, which are those read later."""

    trace: Trace
    graph: Graph
    streams: Mapping[Op, Op]  # operand of every residual addition that is the stream
    roots: frozenset[Op]  # what branches read
    multiplied: frozenset[Site]  # sites of multipliers; what one of these has changed is not read
    factors: Constants

    def stream(self, number: int, branches: Iterable[BranchRoles]) -> list[Tap]:
        """Taps of a stream, by position; where several forward passes run along it, of that with the most of them."""
        passes: dict[int, list[BranchRoles]] = defaultdict(list)
        for branch in branches:
            passes[branch.region.stream].append(branch)
        return max((list(self._along(number, of_pass)) for of_pass in passes.values()), key=len)

    def readout(self, number: int, matrices: Iterable[Op], biases: set[Op]) -> Tap | None:
        """Tap of a readout's output, of all operations with its matrix; ``biases`` are the additions of its bias."""
        for op in (op for matrix in matrices for op in self._outputs(matrix, biases)):
            tap = self._tap(("readout", number, 0), (op, 0), self._axes.get(op))
            if tap is not None:
                return replace(tap, constants=self.factors.after(op))
        return None

    def dimension(self, branches: list[BranchRoles]) -> int:
        """Dimension of a stream after its last branch."""
        last = branches[-1].region.addition
        axis = self._axis(last, branches[-1])
        if axis is None and branches[-1].embedding is not None:
            return branches[-1].embedding  # of a stream that is kept in parts, such as heads
        return last.shape[-1 if axis is None else axis]

    @cached_property
    def _axes(self) -> dict[Op, int]:
        return _coordinate_axes(self.graph, self.streams, self.roots)

    def _along(self, number: int, branches: list[BranchRoles]) -> Iterator[Tap]:
        at: dict[int, list[BranchRoles]] = defaultdict(list)
        for branch in branches:
            at[branch.region.position].append(branch)
        steps = [at[position] for position in range(len(at))]
        # branches that are added in turn but read one root are one addition, whose last sum is the stream
        sums = [max((b.region.addition for b in step), key=lambda op: op.index) for step in steps]
        roots = [step[0].region.root for step in steps]
        axes = [self._axis(addition, step[0]) for addition, step in zip(sums, steps, strict=True)]
        first = min((b.region.addition for b in steps[0]), key=lambda op: op.index)
        # what goes into it as the stream; what its branch reads, where a shortcut changes the shape
        begin = next((value for value in first.values if value[0].source is roots[0]), (roots[0], 0))
        # where a pooling comes before, the first branch reads another shape
        axis = axes[0] if len(begin[0].shape) == len(sums[0].shape) else self._axes.get(begin[0])
        values: list[tuple[list[Value], int | None]] = [([begin], axis)]
        for addition, root, axis in zip(sums, roots[1:], axes, strict=False):
            values.append(([(op, 0) for op in (addition, *_read_next(self.graph, addition, root))], axis))
        values.append(([(op, 0) for op in (sums[-1], *self._read_last(sums, roots))], axes[-1]))
        before: Value | None = None
        for position, (choices, axis) in enumerate(values):
            taps = ((value, self._tap(("stream", number, position), value, axis)) for value in choices)
            value, tap = next((found for found in taps if found[1] is not None), (choices[0], None))
            found = [] if tap is None else [tap]
            if tap is None and before is not None:
                ends = [branch.region.end for branch in steps[position - 1]]
                found = self._branches_added(number, position - 1, sums[position - 1], before, ends, axis)
            yield from found
            before = self._canonical(value) if found else None

    def _branches_added(
        self, number: int, position: int, addition: Op, before: Value, branches: Sequence[Op], axis: int | None
    ) -> list[Tap]:
        """Taps of branches that add up, with the stream before, to the stream after; none if others are added too."""
        ends = [self._canonical((end, 0)) for end in branches]
        summands, stack = Counter[Value](), [self._canonical((addition, 0))]
        while stack:
            value = stack.pop()
            op, node = value[0], cast(Any, value[0].node)
            if value == before or value in ends or op.name != "Add" or len(op.data) < 2 or node._saved_alpha != 1:
                summands[value] += 1
            else:
                stack.extend(self._canonical(operand) for operand in op.operands if operand is not None)
        taps = [tap for end in ends if (tap := self._tap(("branch", number, position), end, axis)) is not None]
        broadcast = any(math.prod(op.shape) != math.prod(addition.shape) for op, _ in summands)
        plain = summands == Counter([before, *ends]) and not broadcast and len(taps) == len(ends)
        return taps if plain else []

    def _read_last(self, sums: Sequence[Op], roots: Sequence[Op]) -> list[Op]:
        """What is read of the last addition, if what follows the one before it follows it too."""
        if len(sums) < 2:
            return []
        op, found = sums[-1], list[Op]()
        for before in reversed(_read_next(self.graph, sums[-2], roots[-1])):
            users = self.graph.users[op]
            if [user.name for user in users] != [before.name] or users[0].shape != op.shape:
                return []
            op = users[0]
            found.append(op)
        return found[::-1]

    def _outputs(self, matrix: Op, biases: set[Op]) -> list[Op]:
        """A readout's matrix and its arrangements; only those with the bias if one is added on its own."""
        plain, biased = [matrix], list[Op]()
        for ops in (plain, biased):
            for op in ops:  # which grows
                for user in self.graph.users[op]:
                    if user in biases:
                        biased.append(user)
                    elif user.name in RESHAPES and len(user.data) == 1:
                        ops.append(user)
        return biased or plain

    def _tap(self, key: _Key, value: Value, axis: int | None) -> Tap | None:
        """The best tap of a value, None if there is none; a branch is read as it is added, multiplied."""
        last = len(value[0].shape) - 1
        value = self._canonical(value)
        changed = self._changed.get(value, math.inf)
        multiplied = key[0] == "branch" and value in self._changed
        candidates = [found for found in self._candidates.get(value, ()) if (found.time >= changed) == multiplied]
        if not candidates or axis is None:
            return None
        best = min(candidates, key=lambda found: found.rank(inner=key[0] == "readout"))
        return Tap(*key, best.module, best.where, best.index, -1 if axis == last else axis)

    def _axis(self, addition: Op, branch: BranchRoles) -> int | None:
        if addition in self._axes:
            return self._axes[addition]
        # an operation that cannot be followed lies in between: the size of the axis gives it away
        if not branch.matrices:
            return None
        writer = (branch.writers or branch.matrices)[-1]
        dimension = self.graph.matrices(writer)[0].fans[1]
        return max((axis for axis, size in enumerate(addition.shape) if size == dimension), default=None)

    def _canonical(self, value: Value) -> Value:
        """Walk back over operations that keep every entry in its place, and coordinates in the last axis."""
        return origin(value, self._keeps_entries)

    def _keeps_entries(self, op: Op) -> bool:
        if len(op.data) != 1:
            return False
        ((operand, output),) = op.values
        in_last = all(self._axes.get(o) == len(o.shape) - 1 for o in (op, operand))  # others may be split or joined
        same = operand.shapes[output] == op.shape or (in_last and op.shape[-1] == operand.shape[-1])
        return (op.name in RESHAPES - PERMUTATIONS - {"AsStrided"} and same) or _is_dropout(op)

    @cached_property
    def _candidates(self) -> dict[Value, list[_Candidate]]:
        """First calls of submodules by every value that they are given or return."""
        counts = Counter(call.module for call in self.trace.calls)
        candidates: dict[Value, list[_Candidate]] = defaultdict(list)
        for call in {call.module: call for call in reversed(self.trace.calls)}.values():
            for index, value in self.graph.values(call.inputs):
                candidate = _Candidate(call.module, "input", index, counts[call.module], call.begin)
                candidates[self._canonical(value)].append(candidate)
            for index, value in self.graph.values(call.outputs):
                candidate = _Candidate(call.module, "output", index, counts[call.module], call.end)
                candidates[self._canonical(value)].append(candidate)
        return candidates

    @cached_property
    def _changed(self) -> dict[Value, int]:
        """When a multiplier changes a value that a submodule returns."""
        sites = {(site.module, site.index) for site in self.multiplied if site.where == "output"}
        changed: dict[Value, int] = {}
        for call in self.trace.calls:
            for index, value in self.graph.values(call.outputs):
                if (call.module, index) in sites:
                    changed.setdefault(self._canonical(value), call.end)
        return changed


@dataclass(frozen=True)
class _Candidate:
    """What the first of all calls of a submodule is given or returns, and when."""

    module: str
    where: Literal["output", "input"]
    index: int | None
    calls: int
    time: int

    def rank(self, inner: bool) -> tuple[object, ...]:
        """Prefers what another pass does in the same way, then inner modules, which return first, or outer ones."""
        doubts = self.calls > 1, self.where == "input", self.where == "output" and self.index is not None
        # outer modules have short names; the module itself comes last, because steps may not call it
        preferred = (self.time,) if inner else (not self.module, len(self.module), self.module)
        return *doubts, *preferred, self.index or 0


def _read_next(graph: Graph, addition: Op, root: Op) -> list[Op]:
    """What may stand for an addition: what the next branches read of it, ``root``, then what comes in between, backwards."""
    ops, met = between([root], lambda op: op.index <= addition.index or graph.is_matrix(op) or not op.data)
    if met - {addition}:
        return []
    # inside of a norm that is written by hand are squares and sizes, which do not stand for the stream
    chain = all(len(op.data) == 1 for op in ops)
    return [op for op in reversed(ops) if op.shape == addition.shape and (chain or op is root)]


def _is_dropout(op: Op) -> bool:
    """Whether data is multiplied with a constant for each of its entries, as dropout on a CPU does."""
    if op.name != "Mul" or op.operands[1] is not None or op.shape == ():
        return False
    noise = cast(Any, op.node)._saved_other
    return tuple(noise.shape) == op.shape and 0 not in noise.stride()  # a mask for all coordinates is expanded


def _coordinate_axes(graph: Graph, streams: Mapping[Op, Op], roots: frozenset[Op]) -> dict[Op, int]:
    """Follow the axis of what the last matrix made, on a stream of what made the stream: a branch may mix tokens instead.

    A matrix on the stream may mix something else, too, as where several streams are kept along an axis.
    """
    axes: dict[Op, int] = {}
    last = max(streams, key=lambda op: op.index, default=None)
    made = descendants(graph.ops, roots)
    for op in graph.ops:
        if graph.is_matrix(op):
            along = (
                last is not None
                and op.index < last.index
                and op.name not in CONVOLUTIONS
                and not made.isdisjoint(op.data)
            )
            (operand, *_) = op.data or (op,)
            if not along or axes.get(operand) == _summed_axis(op, operand):
                axes[op] = _written_axis(graph, op)
            elif operand in axes:
                axes[op] = axes[operand]
        elif "lookup" in graph.kinds(op):
            axes[op] = len(op.shape) - 1
        else:
            operands = (streams[op], *op.data) if op in streams else op.data
            moved = (_moved(op, operand, axes[operand]) for operand in operands if operand in axes)
            axis = next((axis for axis in moved if axis is not None), None)
            if axis is not None:
                axes[op] = axis
    return axes


def _summed_axis(op: Op, operand: Op) -> int:
    """Axis of its operand that a matrix product sums over."""
    second = op.name != "Linear" and op.operands[-1] is not None and op.operands[-1][0] is operand
    return len(operand.shape) - (2 if second else 1)


def _written_axis(graph: Graph, op: Op) -> int:
    if op.name in CONVOLUTIONS:
        return 1
    matrix_first = op.name in ("Mm", "Bmm", "Addmm", "Baddbmm") and not graph.matrices(op)[0].inputs_first
    return len(op.shape) - (2 if matrix_first else 1)


def _moved(op: Op, operand: Op, axis: int) -> int | None:
    """Where an operation puts an axis of its operand, None if that cannot be told."""
    before, after = operand.shape, op.shape
    if op.name in PERMUTATIONS:
        return _order(op, len(before)).index(axis)
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
    order = list(range(dimensions))
    if op.name == "Permute":
        return [order[_signed(axis)] for axis in node._saved_dims]
    first, second = (_signed(node._saved_dim0), _signed(node._saved_dim1)) if op.name == "Transpose" else (0, -1)
    order[first], order[second] = order[second], order[first]
    return order


def _signed(axis: int) -> int:
    return axis - 2**64 if axis >= 2**63 else axis
