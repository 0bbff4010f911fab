"""Sizes of entries: what operations make of entries of order one, and by which numbers they multiply."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from mlu_lightning.discovery.graph import JOINS, NORMS, PARTS, RESHAPES, Graph, Op
from mlu_lightning.discovery.traversal import between

SAME_SIZE = (RESHAPES | PARTS | JOINS | {"Add", "Sub", "Clamp", "ClampMax", "ClampMin", "Std"}) - {"Sum"}
_POWERS = {"Sqrt": 0.5, "Rsqrt": -0.5, "Reciprocal": -1.0, "Var": 2.0}


def normed_size(op: Op, graph: Graph) -> float:
    """Size of the entries that a norm makes: 1, or 1/sqrt(D) where it makes vectors of length one by hand."""
    if op.name in NORMS:
        return 1.0
    normed = max(op.data, key=lambda operand: math.prod(operand.shape)).source
    sizes: dict[Op, float | None] = {normed: 1.0}
    ops, _ = between([op], lambda other: other.index <= normed.index)
    for step in ops:
        sizes[step] = entry_size(step, sizes, graph)
    return sizes[op] or 1.0


def entry_size(op: Op, sizes: Mapping[Op, float | None], graph: Graph) -> float | None:
    """Size of an operation's entries if those of the stream and of projections are 1."""
    if graph.is_matrix(op) or op.name in NORMS or not op.data:
        return 1.0
    if op.name in ("Mul", "Div"):
        return product_size(op, sizes)
    if op.name == "CopySlices" and op.operands[1:] in ((), (None,)):
        return None  # a part of it was changed in place by a number, not filled with other data
    operands = [sizes.get(operand, 1.0) for operand in op.data]
    first = operands[0]
    if first is None or any(size is None or not math.isclose(size, first, rel_tol=1e-6) for size in operands):
        return None
    summed = math.prod(op.data[0].shape) / max(math.prod(op.shape), 1)
    if op.name in SAME_SIZE:
        return first
    exponent = getattr(op.node, "_saved_exponent", None) if op.name == "Pow" else _POWERS.get(op.name)
    if isinstance(exponent, (int, float)):
        return math.pow(first, exponent)
    if op.name == "Sum":
        return first * summed  # of squares, in a norm that is written by hand
    if op.name == "LinalgVectorNorm" and getattr(op.node, "_saved_ord", None) == 2:
        return first * math.sqrt(summed)
    return None


def product_size(op: Op, sizes: Mapping[Op, float | None]) -> float | None:
    """Size of a product or a quotient."""
    operands = (*op.operands, None)[:2]  # a product with a number may have one operand
    first, second = (
        sizes.get(operand[0], 1.0) if operand is not None else _constant(op.saved(name))
        for name, operand in zip(("self", "other"), operands, strict=True)
    )
    if first is None or not second:
        return None
    return first * second if op.name == "Mul" else first / second


def _constant(value: object) -> float | None:
    """A number; 1 for what differs between coordinates or keys, as the rotations of positions and masks do."""
    if isinstance(value, Tensor) and value.numel() != 1:
        return 1.0 if value.shape[-1] > 1 else None
    return number(value)


def number(value: object) -> float | None:
    """A number, or the only entry of a tensor; None if there is no such thing, or it is not known."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, Tensor) or value.numel() != 1:
        return None
    known = value.constant if isinstance(value, FakeTensor) else value
    if known is None:
        return None
    return abs(known.item()) if known.is_complex() else float(known)
