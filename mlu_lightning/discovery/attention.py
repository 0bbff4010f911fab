"""What an attention itself multiplies its logits by, read from the graph of a forward pass.

Logits are c · Σ q_i k_i over the head_dim coordinates of a query and a key. Modules put c into ``scale=`` of a fused
attention, before the softmax, or on queries or keys; norms to length one (cosine attention) are 1/sqrt(head_dim), too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from mlu_lightning.discovery.constants import number
from mlu_lightning.discovery.graph import ATTENTION, JOINS, NORMS, PARTS, RESHAPES, Graph, Op

__all__ = ["Attention", "find_attention", "own_scale"]

_SAME_SIZE = (RESHAPES | PARTS | JOINS | {"Add", "Sub", "Clamp", "ClampMax", "ClampMin", "Std"}) - {"Sum"}
_POWERS = {"Sqrt": 0.5, "Rsqrt": -0.5, "Reciprocal": -1.0, "Var": 2.0}
_SOFTMAXES = ("Softmax", "SafeSoftmax")


@dataclass(frozen=True)
class Attention:
    """The attention of a branch."""

    queries: Op
    keys: Op
    values: Op  # what the attention weights multiply
    path: tuple[Op, ...]  # from the softmax's input back to the product of queries and keys, or a fused attention
    key_dim: int  # of queries and keys per head, d_k
    value_dim: int  # of values per head, d_v


def find_attention(ops: Iterable[Op], graph: Graph) -> Attention | None:
    """Find the first attention among operations: one that is fused, or a product, a softmax and another product."""
    for op in ops:
        if op.name.startswith(ATTENTION):
            queries, keys, values = (operand[0] for operand in op.operands[:3] if operand is not None)
            return Attention(queries, keys, values, (op,), queries.shape[-1], op.shape[-1])
        if op.name == "Bmm" and len(op.data) == 2 and not graph.is_matrix(op):
            path = _path_to_product(op.data[0])
            if path is not None:
                queries, keys = path[-1].data[-2:]
                return Attention(queries, keys, op.data[1], path, queries.shape[-1], op.shape[-1])
    return None


def own_scale(attention: Attention, ops: Iterable[Op], graph: Graph) -> float | None:
    """Read c for projections and norms that make coordinates of order one; None if something on the way hides it.

    Parameters on the way, such as the gain of a query-key norm, count as 1: they are at the base what they are here.
    """
    path = attention.path[::-1]
    product = path[0]
    sizes: dict[Op, float | None] = {}
    for op in (op for op in ops if op.index < product.index):
        sizes[op] = _size(op, sizes, graph)
    factors = [sizes.get(attention.queries, 1.0), sizes.get(attention.keys, 1.0)]
    if product.name.startswith(ATTENTION):
        scale = getattr(product.node, "_saved_scale", None)
        factors.append(attention.key_dim**-0.5 if scale is None else float(scale))
    else:
        factors.append(float(getattr(product.node, "_saved_alpha", 1.0)))
    factors += [_slope(op, before) for before, op in pairwise(path)]
    known = [factor for factor in factors if factor is not None]
    return math.prod(known) if len(known) == len(factors) else None


def _path_to_product(weights: Op) -> tuple[Op, ...] | None:
    """From the input of the softmax that makes attention weights back to a product of queries and keys."""
    while weights.name not in _SOFTMAXES:
        # arranged, dropped out, or without the weight of a sink, which is another logit of the softmax
        if weights.name not in RESHAPES | {"Mul", "Div", "Slice"} or len(weights.data) != 1:
            return None
        weights = weights.data[0]
    visited, path = set[Op](), weights.data[:1]
    while path and not (path[-1].name in ("Bmm", "Baddbmm") and len(path[-1].data) > 1):
        visited.add(path[-1])
        further = [operand for operand in path[-1].data if operand not in visited]
        path = (*path, further[0]) if further else path[:-1]
    return path or None


def _size(op: Op, sizes: Mapping[Op, float | None], graph: Graph) -> float | None:
    """Size of an operation's entries if those of the stream and of projections are 1."""
    if graph.is_matrix(op) or op.name in NORMS or not op.data:
        return 1.0
    if op.name in ("Mul", "Div"):
        return _product(op, sizes)
    if op.name == "CopySlices" and op.operands[1:] in ((), (None,)):
        return None  # a part of it was changed in place by a number, not filled with other data
    operands = [sizes.get(operand, 1.0) for operand in op.data]
    first = operands[0]
    if first is None or any(size is None or not math.isclose(size, first, rel_tol=1e-6) for size in operands):
        return None
    summed = math.prod(op.data[0].shape) / max(math.prod(op.shape), 1)
    if op.name in _SAME_SIZE:
        return first
    exponent = getattr(op.node, "_saved_exponent", None) if op.name == "Pow" else _POWERS.get(op.name)
    if isinstance(exponent, (int, float)):
        return math.pow(first, exponent)
    if op.name == "Sum":
        return first * summed  # of squares, in a norm that is written by hand
    if op.name == "LinalgVectorNorm" and getattr(op.node, "_saved_ord", None) == 2:
        return first * math.sqrt(summed)
    return None


def _slope(op: Op, before: Op) -> float | None:
    """Factor of an operation on logits; c · tanh(logits/c), which caps them, keeps them where they are small."""
    if op.name in ("Mul", "Div") and op.data == (before,):
        return _product(op, {before: 1.0})
    return 1.0 if op.name in _SAME_SIZE | {"Tanh"} else None


def _product(op: Op, sizes: Mapping[Op, float | None]) -> float | None:
    """Size of a product or a quotient."""
    operands = (*op.operands, None)[:2]  # a product with a number may have one operand
    first, second = (
        sizes.get(operand[0], 1.0) if operand is not None else _constant(getattr(op.node, attribute))
        for attribute, operand in zip(("_saved_self", "_saved_other"), operands, strict=True)
    )
    if first is None or not second:
        return None
    return first * second if op.name == "Mul" else first / second


def _constant(value: object) -> float | None:
    """A number; 1 for what differs between coordinates or keys, as the rotations of positions and masks do."""
    if isinstance(value, Tensor) and value.numel() != 1:
        return 1.0 if value.shape[-1] > 1 else None
    return number(value)
