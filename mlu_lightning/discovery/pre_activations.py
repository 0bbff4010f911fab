"""What enters the nonlinearity of a branch, found in the graph of a forward pass: pre-activations of its hidden units.

Hidden units are what the last matrix of a branch reads. On the way back from there to the matrices before lie their
nonlinearity, which may be a formula of several steps, and the product with the other half of a gated perceptron; before
these what is linear in what the matrices make, biases and norms. Where that ends are the pre-activations.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

from mlu_lightning.discovery.coordinate_axes import PERMUTING
from mlu_lightning.discovery.graph import ARITHMETIC, JOINS, NONLINEAR, NORMS, PARTS, RESHAPES, Op, is_normalizer
from mlu_lightning.discovery.placement import BranchPlacement

__all__ = ["Value", "in_order", "pre_activations"]

Value = tuple[Op, int]
"""An operation and the number of its output."""


def pre_activations(placement: BranchPlacement) -> Value | None:
    """Find what enters the nonlinearity of a branch's hidden units.

    Args:
        placement: of a branch without attention.

    Returns:
        The value that is the pre-activations: of gated perceptrons those of the half that enters the nonlinearity, the
        larger value if there is none; what the first matrix makes in a branch whose units are linear. None for experts,
        whose tokens change their places from step to step, and in a branch without matrices.
    """
    if placement.experts is not None:
        return None
    between, before = _formula(placement)
    linear, sizes = _linear_part(between, before)
    readers: dict[Value, dict[Value, list[Op]]] = defaultdict(lambda: defaultdict(list))
    for op in between:
        if op not in linear and op not in sizes:
            for operand in op.operands:
                if operand is not None and operand[0] in linear | before:
                    readers[_behind(operand, _is_scaled)][in_order(*operand)].append(op)

    def rank(source: Value) -> tuple[bool, int]:
        nonlinear = any(op.name in NONLINEAR for ops in readers[source].values() for op in ops)
        return not nonlinear, -math.prod(source[0].shapes[source[1]])

    if not readers:
        return (placement.matrices[0], 0) if placement.matrices else None
    source = min(readers, key=rank)
    # x and x/2 in a formula of several steps are both made of x, which is the pre-activation then
    return next(iter(readers[source])) if len(readers[source]) == 1 else source


def in_order(op: Op, output: int) -> Value:
    """Walk back over operations that keep all entries in their order.

    Args:
        op: that made a value.
        output: which of its outputs the value is.
    """
    return _behind((op, output), _keeps_order)


def _formula(placement: BranchPlacement) -> tuple[list[Op], set[Op]]:
    """Operations between the last matrix of a branch and what comes before: matrices, or what the branch reads."""
    inside = set(placement.region.ops)
    stack = list(placement.writers[-1].data) if placement.writers else [placement.region.end]
    between: set[Op] = set()
    before: set[Op] = set()
    while stack:
        op = stack.pop()
        if op not in inside or placement.graph.is_matrix(op):
            before.add(op)
        elif op not in between:
            between.add(op)
            stack.extend(op.data)
    return sorted(between, key=lambda op: op.index), before


def _linear_part(between: list[Op], before: set[Op]) -> tuple[set[Op], set[Op]]:
    """Operations that are linear in what comes before, or norms of that; and those that compute the size in a norm."""
    linear: set[Op] = set()
    sizes: set[Op] = set()
    readers: dict[Op, list[Op]] = defaultdict(list)
    for op in between:
        known = [operand in linear or operand in before for operand in op.data]
        if (all(known) and _is_linear(op)) or (any(known) and is_normalizer(op)):  # written by hand, the size is not
            linear.add(op)
        for operand in op.data:
            readers[operand].append(op)
    for op in reversed(between):
        if op not in linear and readers[op] and all(reader in linear or reader in sizes for reader in readers[op]):
            sizes.add(op)
    return linear, sizes


def _is_linear(op: Op) -> bool:
    if op.name in ("Mul", "Div"):
        return len(op.data) == 1 and op.operands[0] is not None and (op.name == "Mul" or op.operands[0][0].from_data)
    return op.name in RESHAPES | PARTS | JOINS | NORMS | ARITHMETIC


def _behind(value: Value, passes: Callable[[Op], bool]) -> Value:
    """Walk back over operations."""
    while passes(value[0]):
        value = next(operand for operand in value[0].operands if operand is not None and operand[0].from_data)
    return value


def _keeps_order(op: Op) -> bool:
    return op.name in _ORDERED and len(op.data) == 1


def _is_scaled(op: Op) -> bool:
    """Whether an operation arranges data or changes them by a number."""
    single = len(op.data) == 1 and sum(operand is not None for operand in op.operands) == 1
    return single and op.name in RESHAPES | ARITHMETIC | {"Neg"}


_ORDERED = RESHAPES - PERMUTING - {"AsStrided", "Expand", "NativeDropout", "FusedDropout"}
