"""Mixtures of experts: which operations are those of experts, how many a token is sent to, and how they are summed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from mlu_lightning.discovery.graph import CONVOLUTIONS, Graph, Op, Use, full_factors, is_normalizer, transparent_source

__all__ = ["Experts", "find_experts"]

_SELECTIONS = frozenset({"Topk", "Gather", "Cat", "Stack", "Index"})
"""Operations that leave the weights of a few experts; a top-k without a gradient is seen where they are gathered."""
_MASKS = frozenset({"Where", "MaskedFill", "MaskedScatter", "Scatter", "ScatterAdd", "IndexPut", "CopySlices"})


@dataclass(frozen=True)
class Experts:
    """Experts of a branch, between which a router chooses for every token.

    Args:
        graph: of the forward pass.
        router: matrix whose outputs are weights of experts.
        ops: matrices of experts.
        number: of experts.
        weights: operations from the router to where experts are multiplied, in order.
    """

    graph: Graph
    router: Op
    ops: frozenset[Op]
    number: int
    weights: tuple[Op, ...]

    @cached_property
    def active(self) -> int | None:
        """Number of experts that a token is sent to; all if none are selected, None if it cannot be read."""
        selected = [op.shape[-1] for op in self._selections]
        if any(op.name in ("Max", "Amax") and math.prod(op.shape) == self._tokens for op in self.weights):
            selected.append(1)
        if selected:
            return max(selected)
        hidden = any(op.name in _MASKS | {"Topk", "Sort"} or _is_masked(op) for op in self.weights)
        return None if hidden else self.number

    @cached_property
    def averaged(self) -> bool:
        """Whether the weights of the experts that a token is sent to add up to one."""
        starts = [op for op in self._selections if op.shape[-1] == self.active] or [self.router]
        after = set(starts)
        for op in self.weights:
            if op not in after and any(operand in after for operand in op.data):
                after.add(op)
        sizes = {op.shape[-1] for op in starts}
        return any(
            (op.name == "Softmax" and op.shape[-1] in sizes)
            or (op.name in ("Div", "Mul") and op.shape[-1] in sizes and self._is_share(op, after))
            for op in self.weights
            if op in after and op not in starts
        )

    @property
    def _tokens(self) -> int:
        return math.prod(self.router.shape) // self.number

    @cached_property
    def _selections(self) -> list[Op]:
        return [
            op
            for op in self.weights
            if op.name in _SELECTIONS
            and op.shape
            and math.prod(op.shape[:-1]) == self._tokens
            and (op.shape[-1] < self.number or op.name == "Topk")
        ]

    def _is_share(self, op: Op, after: set[Op]) -> bool:
        """Whether an operation divides weights by their sum."""
        if len(op.data) != 2 or not all(operand in after for operand in op.data):
            return False
        return any(operand.shape[-1:] == (1,) and self._is_sum(operand) for operand in op.data)

    def _is_sum(self, op: Op) -> bool:
        while op.name not in ("Sum", "LinalgVectorNorm"):
            if op.name not in ("Add", "ClampMin", "Clamp", "Reciprocal", "ToCopy", "Unsqueeze", "Expand", "Mul"):
                return False
            if len(op.data) != 1:
                return False
            op = op.data[0]
        return True


def find_experts(graph: Graph, ops: Iterable[Op]) -> Experts | None:
    """Find the experts of a branch: as many matrices in one parameter, or as many modules, as a router has outputs.

    A router is a matrix whose outputs multiply something larger, one number for all of its last dimension, or are
    multiplied and summed with what the matrices of one parameter make.

    Args:
        graph: of the forward pass.
        ops: of a branch, in order.
    """
    members = tuple(ops)
    matrices = [op for op in members if graph.is_matrix(op)]
    gates: dict[Op, list[tuple[Op, Op]]] = {}  # by router: a weight, and the product that it goes into
    ways: dict[Op, dict[Op, None]] = {}
    for op in members:
        if op.name not in ("Mul", "Bmm") or len(op.data) != 2 or is_normalizer(op):
            continue
        for weight in op.data:
            whole = op.name == "Mul" and (2 * math.prod(weight.shape) > math.prod(op.shape) or weight.shape[-1] != 1)
            if whole or (op.name == "Bmm" and graph.is_matrix(op)):
                continue
            way, sources = _back(graph, weight, frozenset(members))
            if len(sources) == 1:
                gates.setdefault(sources[0], []).append((weight, op))
                ways.setdefault(sources[0], {}).update(dict.fromkeys(way))
    for router, found in gates.items():
        number = _outputs(graph.matrices(router)[0])
        stacked = {op for op in matrices if op is not router and _is_stacked(graph.matrices(op), number)}
        own = stacked
        outputs = _each([(weight, product) for weight, product in found if product.name == "Mul"], number)
        if not stacked and 1 < len(outputs) <= number:  # those that no token was sent to may be missing
            own = _own_matrices(outputs, matrices, router)
        if number > 1 and own and (stacked or len(own) >= len(outputs)):
            weights = tuple(sorted(ways[router], key=lambda op: op.index))
            return Experts(graph, router, frozenset(own), number, weights)
    return None


def _back(graph: Graph, start: Op, members: frozenset[Op]) -> tuple[list[Op], list[Op]]:
    """Operations from one back to the matrices before it, and these."""
    way: list[Op] = []
    sources: list[Op] = []
    stack, seen = [start], {start}
    while stack:
        op = stack.pop()
        if op not in members:
            continue
        if graph.is_matrix(op):
            sources.append(op)
            continue
        way.append(op)
        stack.extend(operand for operand in op.data if operand not in seen)
        seen.update(op.data)
    return way, sources


def _each(gates: list[tuple[Op, Op]], number: int) -> list[Op]:
    """What each expert makes, where weights multiply one after the other, or all of them stacked."""
    if len(gates) != 1:
        return [product for _, product in gates]
    weight, product = gates[0]
    stack = next((op for op in map(transparent_source, full_factors(product)) if op.name in ("Stack", "Cat")), None)
    return stack.data if stack is not None and weight.shape[-2:] == (number, 1) else []


def _own_matrices(products: list[Op], matrices: list[Op], router: Op) -> set[Op]:
    """Matrices behind one of the products of experts and weights, but not behind all of them."""
    behind = [
        {op for op in matrices if op is not router and op in ancestors} for ancestors in map(_ancestors, products)
    ]
    shared = {op for op in matrices if all(op in own for own in behind)}
    return set().union(*behind) - shared


def _ancestors(op: Op) -> set[Op]:
    """Operations that one comes from, that included."""
    found = {op}
    stack = [op]
    while stack:
        for operand in stack.pop().data:
            if operand not in found:
                found.add(operand)
                stack.append(operand)
    return found


def _is_stacked(uses: tuple[Use, ...], number: int) -> bool:
    """Whether a parameter holds a matrix for each of so many experts: inputs are not in its first dimension."""
    return any(
        use.op.name not in CONVOLUTIONS
        and len(use.stored) > 2
        and use.stored[0] == number
        and use.shape[-2 if use.inputs_first else -1] in use.stored[1:]
        for use in uses
    )


def _outputs(use: Use) -> int:
    return use.shape[-1] if use.inputs_first else use.shape[0]


def _is_masked(op: Op) -> bool:
    """Whether weights are multiplied with a tensor that holds a number for each of them."""
    if op.name != "Mul" or len(op.data) != 1:
        return False
    other = getattr(op.node, "_saved_other", None)
    return isinstance(other, Tensor) and tuple(other.shape) == op.shape and other.numel() > 1
