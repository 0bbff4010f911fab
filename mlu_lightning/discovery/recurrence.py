"""Recurrent branches, which the theory does not cover: units that feed back into themselves from token to token."""

from __future__ import annotations

from itertools import permutations

from mlu_lightning.discovery.graph import Graph, Op
from mlu_lightning.discovery.operations import PARTS, RESHAPES
from mlu_lightning.discovery.traversal import Ancestry, transparent_source

__all__ = ["find_recurrence"]

_FUSED = ("Rnn", "Lstm", "Gru", "Scan")
_ELEMENTWISE = frozenset("Sub Add Mul Neg MaskedFill Where ConstantPadNd Tril Triu".split())
_STEPS = 3
"""Steps that tell a recurrence from a sum of products."""


def find_recurrence(graph: Graph, ops: tuple[Op, ...]) -> str | None:
    """Say in what way a branch is recurrent, None if it is not."""
    fused = next((op.name for op in ops if any(part in op.name for part in _FUSED)), None)
    if fused is not None:
        return f"it calls {fused}"
    matrices = Ancestry(graph, ops, filter(graph.is_matrix, ops))
    again = _applied_again(graph, ops, matrices)
    if again is not None:
        return f"{again} is applied to its own output"
    if _is_scan(ops, matrices):
        return "a state is multiplied and added to step by step"
    if _is_cumulative_decay(ops):
        return "a state decays by the exponential of a cumulative sum"
    return None


def _applied_again(graph: Graph, ops: tuple[Op, ...], matrices: Ancestry) -> str | None:
    """A matrix that is applied to what it made itself, as in a recurrent cell that is called for every token."""
    for op in filter(graph.is_matrix, ops):
        before = {use.parameter for matrix in matrices.of(op) for use in graph.matrices(matrix)}
        again = before & {use.parameter for use in graph.matrices(op)}
        if again:
            return min(again)
    return None


def _is_scan(ops: tuple[Op, ...], matrices: Ancestry) -> bool:
    """Whether sums are multiplied and added to again and again: s ← a s + b, with another a but no further matrix."""
    multipliers: dict[Op, frozenset[Op]] = {}
    for op in ops:
        if op.name != "Add":
            continue
        steps = [frozenset[Op]()]
        for product in map(transparent_source, op.data):
            factors = [transparent_source(factor) for factor in product.data] if product.name == "Mul" else []
            for state, multiplier in permutations(factors, 2):
                used = multipliers.get(state, frozenset())
                if state in multipliers and state.shape == op.shape and matrices.of(state) == matrices.of(op):
                    steps.append(used | {multiplier})
        multipliers[op] = max(steps, key=len)
    return max(map(len, multipliers.values()), default=0) >= _STEPS


def _is_cumulative_decay(ops: tuple[Op, ...]) -> bool:
    """Whether data is summed up along an axis and exponentiated, or multiplied up, as in a scan over chunks."""
    summed: set[Op] = set()
    for op in ops:
        if op.name in ("Cumprod", "Logcumsumexp"):
            return True
        if op.name == "Cumsum":
            summed.add(op)
        elif any(operand in summed for operand in op.data):
            if op.name == "Exp":
                return True
            if op.name in RESHAPES | PARTS | _ELEMENTWISE:
                summed.add(op)
    return False
