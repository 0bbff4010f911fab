"""Find mixtures of experts: which operations are experts, how many a token is sent to, and how they are summed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from mlu_lightning.discovery.graph import CONVOLUTIONS, Graph, Op, Use
from mlu_lightning.discovery.traversal import between, descendants, in_order, origin, walk_back

_SELECTIONS = frozenset({"Topk", "Gather", "Cat", "Stack", "Index"})
"""Operations that leave the weights of a few experts; a top-k without a gradient is seen where they are gathered."""
_MASKS = frozenset({"Where", "MaskedFill", "MaskedScatter", "Scatter", "ScatterAdd", "IndexPut", "CopySlices"})
_AFTER_SUMS = frozenset("Add ClampMin Clamp Reciprocal ToCopy Unsqueeze Expand Mul".split())
"""What a sum goes through before weights are divided by it."""
_SUMS = ("Sum", "LinalgVectorNorm")


@dataclass(frozen=True)
class Experts:
    """Experts of a branch, between which a router chooses for every token."""

    router: Op  # matrix whose outputs are weights of experts
    ops: frozenset[Op]  # matrices of experts
    number: int
    weights: tuple[Op, ...]  # from the router to where experts are multiplied

    @cached_property
    def active(self) -> int | None:
        """Number of experts that a token is sent to; all if none are selected, None if it cannot be read."""
        selected = [op.shape[-1] for op in self._selections]
        if any(op.name in ("Max", "Amax") and math.prod(op.shape) == self._tokens for op in self.weights):
            selected.append(1)
        if selected:
            return max(selected)
        unread = any(op.name in _MASKS | {"Topk", "Sort"} or _is_masked(op) for op in self.weights)
        return None if unread else self.number

    @cached_property
    def averaged(self) -> bool:
        """Whether the weights of the experts that a token is sent to add up to one."""
        starts = [op for op in self._selections if op.shape[-1] == self.active] or [self.router]
        after = descendants(self.weights, starts)
        sizes = {op.shape[-1] for op in starts}
        return any(
            (op.name == "Softmax" and op.shape[-1] in sizes)
            or (_is_share(op) and op.shape[-1] in sizes and after.issuperset(op.data))
            for op in self.weights
            if op in after and op not in starts
        )

    @property
    def _tokens(self) -> int:
        return math.prod(self.router.shape) // self.number

    @cached_property
    def _selections(self) -> list[Op]:
        selections = (op for op in self.weights if op.name in _SELECTIONS and op.shape)
        of_tokens = (op for op in selections if math.prod(op.shape[:-1]) == self._tokens)
        return [op for op in of_tokens if op.shape[-1] < self.number or op.name == "Topk"]


def find_experts(graph: Graph, ops: tuple[Op, ...]) -> Experts | None:
    """Find the experts of a branch: as many matrices in one parameter, or as many modules, as a router has outputs.

    A router is a matrix whose outputs multiply something larger, one number for all of its last dimension, or are
    multiplied and summed with what the matrices of one parameter make.
    """
    members = frozenset(ops)
    matrices = [op for op in ops if graph.is_matrix(op)]
    products: dict[Op, list[tuple[Op, Op]]] = {}  # by router: a weight, and the product that it goes into
    weighting: dict[Op, set[Op]] = {}
    for op in ops:
        is_product = op.name == "Mul" or (op.name == "Bmm" and not graph.is_matrix(op))
        if not is_product or len(op.data) != 2 or op.is_normalizer:
            continue
        for weight in op.data:
            if op.name == "Mul" and (2 * math.prod(weight.shape) > math.prod(op.shape) or weight.shape[-1] != 1):
                continue
            path, met = between([weight], lambda o: o not in members or graph.is_matrix(o))
            if len(met & members) == 1:
                (router,) = met & members
                products.setdefault(router, []).append((weight, op))
                weighting.setdefault(router, set()).update(path)
    for router, found in products.items():
        gate = graph.matrices(router)[0]
        number = gate.shape[-1] if gate.inputs_first else gate.shape[0]
        own = stacked = {op for op in matrices if op is not router and _is_stacked(graph.matrices(op), number)}
        outputs = _each([(weight, product) for weight, product in found if product.name == "Mul"], number)
        if not stacked and 1 < len(outputs) <= number:  # those that no token was sent to may be missing
            behind = [set(walk_back([product])).intersection(matrices) - {router} for product in outputs]
            own = set().union(*behind).difference(set(matrices).intersection(*behind))  # what all share is none's
        if number > 1 and own and (stacked or len(own) >= len(outputs)):
            return Experts(router, frozenset(own), number, in_order(weighting[router]))
    return None


def _each(products: list[tuple[Op, Op]], number: int) -> list[Op]:
    """What each expert makes, where weights multiply one after the other, or all of them stacked."""
    if len(products) != 1:
        return [product for _, product in products]
    weight, product = products[0]
    stack = next((op for op in (factor.source for factor in product.full_factors) if op.name in ("Stack", "Cat")), None)
    return list(stack.data) if stack is not None and weight.shape[-2:] == (number, 1) else []


def _is_stacked(uses: tuple[Use, ...], number: int) -> bool:
    """Whether a parameter holds a matrix for each expert: inputs are not in its first dimension."""
    return any(
        use.op.name not in CONVOLUTIONS
        and len(use.stored) > 2
        and use.stored[0] == number
        and use.shape[-2 if use.inputs_first else -1] in use.stored[1:]
        for use in uses
    )


def _is_share(op: Op) -> bool:
    divisors = (operand for operand in op.data if operand.shape[-1:] == (1,))
    sources = (origin((o, 0), lambda o: o.name in _AFTER_SUMS and len(o.data) == 1)[0] for o in divisors)
    return op.name in ("Div", "Mul") and len(op.data) == 2 and any(s.name in _SUMS for s in sources)


def _is_masked(op: Op) -> bool:
    """Whether weights are multiplied with a tensor that holds a number for each of them."""
    if op.name != "Mul" or len(op.data) != 1:
        return False
    other = op.saved("other")
    return isinstance(other, Tensor) and tuple(other.shape) == op.shape and other.numel() > 1
