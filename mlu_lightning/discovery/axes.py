"""Follow axes through a forward pass: from an axis of a result back to the units of matrices that it runs along."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from mlu_lightning.discovery.graph import CONVOLUTIONS, JOINED, JOINS, PARTS, VIEWS, Graph, Op, Value

Axis = tuple[Value, int]  # an axis of an operation's output
_SPLITS = ("Split", "SplitWithSizes", "UnsafeSplit", "UnsafeSplitWithSizes")
_REARRANGED = VIEWS | {"Squeeze", "Unsqueeze"}

_RESIZED = JOINS | PARTS | CONVOLUTIONS | {*_SPLITS, "Repeat"}
"""Operations along the axes of which there are other numbers of entries before."""


class _Part(NamedTuple):
    """A part of an axis: entries from ``start`` on, told apart by their number // stride % size."""

    value: Value
    axis: int
    stride: int
    size: int
    start: int
    stop: int
    of: tuple[int, int]  # stride and size on the axis that the walk began with


@dataclass(frozen=True)
class Reached:
    """What a walk back along axes has come to."""

    # axes of the outputs of operations, with the strides and sizes of what they run along on the axis at the beginning
    axes: dict[Op, dict[int, set[tuple[int, int]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(set))
    )
    # rows of matrices, first and last (exclusive), by operation, with strides and sizes by which the axes tell them apart
    rows: dict[Op, dict[tuple[int, int], set[tuple[int, int]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(set))
    )

    def groups(self, op: Op, rows: tuple[int, int], size: int = 1) -> int:
        """How many groups of some rows of a matrix, for so many entries each, the axes tell apart."""
        number, end = 1, size
        for stride, length in sorted(self.rows[op][rows]):
            start, end = max(stride, end), max(stride * length, end)
            number *= max(end // start, 1)
        return number


def unit_axis(op: Op) -> int:
    """Axis of a matrix operation's output that its units are on."""
    return 1 if op.name in CONVOLUTIONS else len(op.shape) - 1


def is_depthwise(graph: Graph, op: Op) -> bool:
    """Whether an operation is a convolution of every channel by itself."""
    return op.name in CONVOLUTIONS and all(use.fans[0] == 1 for use in graph.matrices(op)) and op.shape[1] > 1


def reached_from(graph: Graph, ops: Iterable[Op], starts: Iterable[Axis]) -> Reached:
    """Walk back along axes as far as matrices, whose rows are what the axes run along."""
    reached, members = Reached(), frozenset(ops)
    visited: set[_Part] = set()
    sizes = ((value, axis, value[0].shapes[value[1]][axis]) for value, axis in starts)
    stack = [_Part(value, axis, 1, size, 0, size, (1, size)) for value, axis, size in sizes]
    while stack:
        part = stack.pop()
        op = part.value[0]
        if part in visited or op not in members:
            continue
        visited.add(part)
        reached.axes[op][part.axis].add(part.of)
        is_matrix = graph.is_matrix(op)
        if is_matrix and part.axis == unit_axis(op):
            reached.rows[op][part.start, part.stop].add((part.stride, part.size))
        if not is_matrix or is_depthwise(graph, op):
            stack.extend(_before(part))
    return reached


def varies(value: Value, axis: int) -> bool:
    """Whether parameters that a value is made of, without data, have entries of their own along one of its axes."""
    length = value[0].shapes[value[1]][axis]
    stack = [_Part(value, axis, 1, length, 0, length, (1, length))]
    while stack:
        part = stack.pop()
        if not part.value[0].operands:
            return part.size > 1
        stack.extend(_before(part, data=False))
    return False


def joined_along(value: Value, axis: int) -> tuple[Value, ...]:
    """Values that have been joined to be the entries of an axis, one each; none if that is not so."""
    length = value[0].shapes[value[1]][axis]
    part = _Part(value, axis, 1, length, 0, length, (1, length))
    while True:
        op, size = part.value[0], part.size
        if op.name in JOINED and part.axis == _dimension(op, "_saved_dim", len(op.shape)):
            stacked = op.name == "Stack"
            of_data = all(operand is None or operand[0].from_data for operand in op.operands)
            single = part.stride == 1 if stacked else all(o.shapes[i][part.axis] == part.stride for o, i in op.values)
            return op.values if of_data and single and size == len(op.operands) else ()
        before = [*_before(part)] if op.is_transparent else []
        if len(before) != 1:
            return ()
        part = before[0]


def _before(part: _Part, data: bool = True) -> Iterator[_Part]:
    """Parts of the axes of operands, which data enters or not, that a part of an axis of an output is made of."""
    (op, output), axis, stride, size, start, stop, of = part
    shape = op.shapes[output]
    shift = _entries_before(part.value, axis)
    joined = op.name == "Cat" and axis == _dimension(op, "_saved_dim", len(shape))
    for operand in op.operands:
        if operand is None:
            continue
        source = operand[0].shapes[operand[1]] if operand[1] < len(operand[0].shapes) else operand[0].shape
        if operand[0].from_data is not data:
            pass
        elif op.name in _REARRANGED:
            yield from _rearranged(part, operand)
        else:
            for other in _along(op, shape, operand, axis):
                length = source[other]
                if joined:
                    first, last = max(start, 0), min(stop, length)
                    if first < last:
                        yield _Part(operand, other, stride, min(size, length), first, last, of)
                elif length == shape[axis]:
                    yield _Part(operand, other, stride, size, start, stop, of)
                elif op.name in (*_SPLITS, "Slice"):
                    yield _Part(operand, other, stride, size, start + shift, stop + shift, of)
                else:
                    yield _Part(operand, other, 1, length, 0, length, of)
        if joined:
            start, stop = start - source[axis], stop - source[axis]


def _rearranged(part: _Part, operand: Value) -> Iterator[_Part]:
    """Parts of the axes of a view's operand that have the entries of a part of one of its axes."""
    (op, output), axis, stride, size, start, stop, of = part
    shape, source = op.shapes[output], operand[0].shapes[operand[1]]
    entries = math.prod(shape[axis + 1 :])
    inner = entries * stride
    for other, length in enumerate(source):
        step = math.prod(source[other + 1 :])
        first, last = max(inner, step), min(inner * size, step * length)
        if first < last:
            # an axis that is the outer one of those that another one was split into keeps its place there
            outer = entries * shape[axis] == step * length and entries >= step
            kept = (start * entries // step, stop * entries // step) if outer else (0, length)
            within = of[0] * (first // inner), max(last // first, 1)
            yield _Part(operand, other, max(first // step, 1), max(last // first, 1), *kept, within)


def _along(op: Op, shape: tuple[int, ...], operand: Value, axis: int) -> Iterable[int]:
    """Axes of one operand that an axis of the output runs along."""
    source, name = operand[0].shapes[operand[1]], op.name
    if name in ("Bmm", "Baddbmm"):
        first, second = op.operands[-2:]
        matches = {first: (0, 1, None), second: (0, None, 2)}.get(operand, (0, 1, 2))
        return [] if matches[axis] is None else [axis]
    if name == "Transpose":
        swapped = [_dimension(op, key, len(shape)) for key in ("_saved_dim0", "_saved_dim1")]
        return [swapped[1 - swapped.index(axis)] if axis in swapped else axis]
    if name == "T":
        return [len(shape) - 1 - axis]
    if name == "Permute":
        return [_index(getattr(op.node, "_saved_dims", ())[axis], len(shape))]
    if name in ("Select", "Unbind"):
        return [axis + (axis >= _dimension(op, "_saved_dim", len(source)))]
    if name == "Stack":
        dimension = _dimension(op, "_saved_dim", len(shape))
        return [] if axis == dimension else [axis - (axis > dimension)]
    if name in ("ViewAsReal", "ViewAsComplex"):
        return [axis] if axis < len(source) else []
    if name == "CopySlices" and len(source) < len(shape):
        return [i for i, other in enumerate(_written(source, shape)) if other == axis]
    if len(shape) < len(source):
        kept = kept_axes(op, len(source))
        return [kept[axis]] if len(kept) == len(shape) else []
    aligned = axis - (len(shape) - len(source))
    if name == "LinalgSolveTriangular" and operand == op.operands[0] and aligned >= len(source) - 2:
        return []  # its two last axes are those of a matrix that is inverted
    if aligned < 0 or (source[aligned] != shape[axis] and (source[aligned] == 1 or name not in _RESIZED)):
        return []
    return [aligned]


def _written(source: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[int]:
    """Axes of a tensor that those of what is written to a part of it lie along, of which autograd keeps sizes alone."""
    after = 0
    for left, size in zip(range(len(source) - 1, -1, -1), source, strict=True):
        free = range(after, len(shape) - left)
        axis = next((i for i in free if shape[i] == size), free[0])
        yield axis
        after = axis + 1


def kept_axes(op: Op, axes: int) -> list[int]:
    """Axes of its operand that a sum is not over."""
    summed = getattr(op.node, "_saved_dim", None)
    gone = {_index(d, axes) for d in ([summed] if isinstance(summed, int) else summed or ())}
    return [i for i in range(axes) if i not in gone]


def _entries_before(value: Value, axis: int) -> int:
    """How many entries of its operand's axis come before those of a part of it."""
    op = value[0]
    if op.name in _SPLITS and axis == _dimension(op, "_saved_dim", len(op.shape)):
        return sum(shape[axis] for shape in op.shapes[: value[1]])
    if op.name == "Slice" and op.data and axis == _dimension(op, "_saved_dim", len(op.shape)):
        start: int = getattr(op.node, "_saved_start", 0)
        return start if start < 2**63 else start - 2**64 + op.data[0].shape[axis]
    return 0


def _dimension(op: Op, key: str, axes: int) -> int:
    return _index(getattr(op.node, key, 0), axes)


def _index(number: int, axes: int) -> int:
    return (number - 2**64 if number >= 2**63 else number) % max(axes, 1)
