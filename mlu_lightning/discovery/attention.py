"""Find the attention of a branch, and read the factor that it puts on its own logits.

Logits are c · Σ q_i k_i over the head_dim coordinates of a query and a key. Modules put c into ``scale=`` of a fused
attention, before the softmax, or on queries or keys; norms to length one (cosine attention) are 1/sqrt(head_dim), too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch.autograd.function import BackwardCFunction

from mlu_lightning.discovery.axes import reached_from
from mlu_lightning.discovery.comparisons import comparisons, is_product
from mlu_lightning.discovery.entry_sizes import SAME_SIZE, entry_size, product_size
from mlu_lightning.discovery.graph import ATTENTION, NONLINEAR, Graph, Op

_SOFTMAXES = ("Softmax", "SafeSoftmax")


@dataclass(frozen=True)
class Attention:
    """The attention of a branch."""

    queries: Op
    keys: Op
    values: Op  # what the attention weights multiply
    output: Op
    # from the logits, which a softmax takes, back to the product of queries and keys, or a fused attention; else empty
    path: tuple[Op, ...]
    key_dim: int  # of queries and keys per head, d_k; where channels are compared with each other, those of a head
    value_dim: int  # of values per head, d_v
    over_tokens: bool = False  # whether logits are sums over tokens, one for each pair of channels


def find_attention(ops: Sequence[Op], graph: Graph, of_experts: frozenset[Op] = frozenset()) -> Attention | None:
    """Find the first attention among operations: what compares queries with keys, and weighs values by the result.

    It is a fused one, or a product over units, mostly a softmax, and another product; or a product over units alone.
    Weights of experts, ``of_experts``, are multiplied with what these make, and compare nothing.
    """
    members, products = frozenset(ops), [op for op in ops if is_product(op, graph)]
    for op in ops:
        if op.name.startswith(ATTENTION) or _is_hidden_attention(op):
            if len(op.data) < 3:
                raise ValueError(
                    "The queries, keys or values of an attention do not depend on the example, or lose their gradients in a "
                    "cache. Train without a cache (use_cache=False), and let keys and values be projections of data."
                )
            queries, keys, values = op.data[:3]
            fused = (op,) if op.name.startswith(ATTENTION) else ()
            return Attention(queries, keys, values, op, fused, queries.shape[-1], op.shape[-1])
        for weights in op.data[-2:] if op in products else ():
            softmax = _softmax_behind(weights, members)
            path = () if softmax is None else _path(softmax.data[0], members, frozenset(products))
            if path:
                return _with_weights(op, weights, path, ops, graph)
    compared = comparisons(graph, ops, of_experts)
    between_units = frozenset(comparison.op for comparison in compared)
    unmixed = members.difference(op for op in ops if graph.is_matrix(op))
    # distances, and products that are written as a product and a sum, have factors that cannot be read
    for op in products if between_units.issubset(products) else ():
        for weights in op.data[-2:] if op not in between_units else ():
            path = _path(weights, unmixed, between_units)
            if path:
                last = next((i for i, step in enumerate(path) if step.name in NONLINEAR), -1)
                return _with_weights(op, weights, path[last + 1 :] or path[-1:], ops, graph)
    if not compared:
        return None
    (queries, _), (keys, _) = (value for value, _ in compared[0].axes)
    output = compared[0].op
    return Attention(queries, keys, output, output, (), compared[0].size, output.shape[-1])


def _with_weights(op: Op, weights: Op, path: tuple[Op, ...], ops: Sequence[Op], graph: Graph) -> Attention:
    """The attention whose weights and values a product multiplies."""
    product = path[-1]
    queries, keys = product.data[-2:]
    first = weights is op.data[-2]
    values = op.data[-1] if first else op.data[-2]
    rank = len(product.shape)
    operands = product.values[-2:]
    summed = reached_from(graph, ops, ((operands[0], rank - 1), (operands[1], rank - 2))).rows
    over_tokens = not summed and bool(reached_from(graph, ops, [((product, 0), rank - 1)]).rows)
    # channels of what is made: those of the values, or of queries where these are channels
    axis = -1 if first != over_tokens else -2
    dim = product.shape[-1] if over_tokens else queries.shape[-1]
    return Attention(queries, keys, values, op, path, dim, op.shape[axis], over_tokens)


def own_scale(attention: Attention, ops: Iterable[Op], graph: Graph) -> float | None:
    """Read c for projections and norms that make coordinates of order one; None if something on the way hides it.

    Parameters on the way, such as the gain of a query-key norm, count as 1: they are at the base what they are here.
    """
    if not attention.path or attention.over_tokens:
        return None
    path = attention.path[::-1]
    product = path[0]
    sizes: dict[Op, float | None] = {}
    for op in (op for op in ops if op.index < product.index):
        sizes[op] = entry_size(op, sizes, graph)
    factors = [sizes.get(attention.queries, 1.0), sizes.get(attention.keys, 1.0)]
    if product.name.startswith(ATTENTION):
        scale = getattr(product.node, "_saved_scale", None)
        factors.append(attention.key_dim**-0.5 if scale is None else float(scale))
    else:
        factors.append(float(getattr(product.node, "_saved_alpha", 1.0)))
    factors += [_slope(op, before) for before, op in pairwise(path)]
    known = [factor for factor in factors if factor is not None]
    return math.prod(known) if len(known) == len(factors) else None


def _is_hidden_attention(op: Op) -> bool:
    """Whether it is a function that autograd does not see into, of what has the shapes of queries, keys and values."""
    node: Any = op.node
    if not (isinstance(node, BackwardCFunction) or op.name == "Generated") or len(op.values) < 3:
        return False
    queries, keys, values = (operand.shapes[output] for operand, output in op.values[:3])
    same = len(queries) == len(keys) == len(values) > 2 and queries[-1:] == keys[-1:]
    return same and (*queries[:-1], values[-1]) == op.shape


def _softmax_behind(weights: Op, members: frozenset[Op]) -> Op | None:
    """The softmax that makes weights, which may be dropped out, cut (a sink has one more) or mixed between heads."""
    while weights.name not in _SOFTMAXES:
        if len(weights.data) != 1 or weights not in members:
            return None
        weights = weights.data[0]
    return weights


def _path(start: Op, members: frozenset[Op], products: frozenset[Op]) -> tuple[Op, ...]:
    """A way back from an operation to the first of some products that is found; empty if there is none."""
    visited = set[Op]()
    path: tuple[Op, ...] = (start,)
    while path and path[-1] not in products:
        visited.add(path[-1])
        further = [operand for operand in path[-1].data if operand in members and operand not in visited]
        path = (*path, further[0]) if further else path[:-1]
    return path


def _slope(op: Op, before: Op) -> float | None:
    """Factor of an operation on logits; c · tanh(logits/c), which caps them, keeps them where they are small."""
    if op.name in ("Mul", "Div") and op.data == (before,):
        return product_size(op, {before: 1.0})
    return 1.0 if op.name in SAME_SIZE | {"Tanh"} else None
