"""Recurrence in time, by what is computed: layers that feed back into themselves, scans of a state, decays in chunks."""

from __future__ import annotations

from itertools import permutations

from mlu_lightning.discovery.graph import PARTS, RESHAPES, Graph, Op
from mlu_lightning.discovery.traversal import Ancestry, descendants

_ELEMENTWISE = frozenset("Sub Add Mul Neg MaskedFill Where ConstantPadNd Tril Triu".split())
_STEPS = 3  # steps that tell a recurrence from a sum of products


def feeds_back(graph: Graph, ops: tuple[Op, ...]) -> frozenset[str]:
    """Parameters of recurrent layers, and matrices that are applied to their own output, as those of cells in a loop."""
    layers = {use.parameter for op in ops if op.is_recurrent_layer for use in graph.matrices(op)}
    of = {op: frozenset(use.parameter for use in graph.matrices(op)) for op in ops if graph.is_matrix(op)}
    names = [name for parameters in of.values() for name in parameters]
    if len(names) == len(set(names)):
        return frozenset(layers)
    matrices = Ancestry(graph, ops)
    again = ({n for m in matrices.of(op) for n in of[m]} & parameters for op, parameters in of.items())
    return frozenset(layers.union(*again))


def is_recurrent(graph: Graph, ops: tuple[Op, ...]) -> bool:
    """Whether a branch computes a state from token to token."""
    return bool(feeds_back(graph, ops)) or _is_scan(graph, ops) or _is_cumulative_decay(ops)


def _is_scan(graph: Graph, ops: tuple[Op, ...]) -> bool:
    """Whether sums are multiplied and added to again and again: s ← a s + b, with another a or a number, but no matrix."""
    matrices = Ancestry(graph, ops)
    multipliers: dict[Op, frozenset[Op]] = {}
    for op in ops:
        if op.name != "Add":
            continue
        steps = [frozenset[Op]()]
        for operand in op.data:
            product = operand.source
            factors = [factor.source for factor in product.data] if product.name == "Mul" else [product, operand]
            for state, multiplier in permutations(factors, 2):
                decays = product.name == "Mul" or is_multiplied(operand, product)
                same = state in multipliers and state.shape == op.shape
                if decays and same and matrices.of(state) == matrices.of(op):
                    steps.append(multipliers[state] | {multiplier})
        multipliers[op] = max(steps, key=len)
    return max(map(len, multipliers.values()), default=0) >= _STEPS


def is_multiplied(op: Op, source: Op) -> bool:
    """Whether it is made of another operation's output by a multiplication with a number, among what only arranges it."""
    while op is not source:
        if op.name in ("Mul", "Div"):
            return True
        op = op.data[0]
    return False


def _is_cumulative_decay(ops: tuple[Op, ...]) -> bool:
    """Whether data is summed up along an axis and exponentiated, or multiplied up, as in a scan over chunks."""
    elementwise = (op for op in ops if op.name in RESHAPES | PARTS | _ELEMENTWISE)
    summed = descendants(elementwise, [op for op in ops if op.name == "Cumsum"])
    exponents = (operand for op in ops if op.name == "Exp" for operand in op.data)
    return any(op.name in ("Cumprod", "Logcumsumexp") for op in ops) or not summed.isdisjoint(exponents)
