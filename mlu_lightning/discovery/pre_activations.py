"""What enters the nonlinearity of a branch, found in the graph of a forward pass: pre-activations of its hidden units.

Hidden units are what the last matrix of a branch reads. On the way back from there to the matrices before lie their
nonlinearity, which may be a formula of several steps, and the product with the other half of a gated perceptron; before
these what is linear in what the matrices make, biases and norms. Where that ends are the pre-activations.
"""

from __future__ import annotations

import math
from collections import defaultdict

from mlu_lightning.discovery.branch_roles import BranchRoles
from mlu_lightning.discovery.graph import Op, Value
from mlu_lightning.discovery.operations import LINEAR, NONLINEAR, NORMS, PERMUTATIONS, RESHAPES
from mlu_lightning.discovery.traversal import between, is_normalizer, is_transparent, origin

__all__ = ["pre_activations", "unarranged"]

_ORDERED = RESHAPES - PERMUTATIONS - {"AsStrided", "Expand", "NativeDropout", "FusedDropout"}


def pre_activations(branch: BranchRoles) -> Value | None:
    """Find what enters the nonlinearity of the hidden units of a branch without attention.

    The pre-activations of gated perceptrons are those of the half that enters the nonlinearity, the larger value if there
    is none, and of a branch whose units are linear what its first matrix makes. None for experts, whose tokens change
    their places from step to step, and in a branch without matrices.
    """
    if branch.experts is not None:
        return None
    ends = branch.writers[-1].data if branch.writers else (branch.region.end,)
    inside = set(branch.region.ops)
    formula, before = between(ends, lambda op: op not in inside or branch.graph.is_matrix(op))
    linear, sizes = _linear_part(formula, before, branch.graph.users)
    entering = linear | before
    users: dict[Value, dict[Value, list[Op]]] = defaultdict(lambda: defaultdict(list))
    for op in formula:
        if op not in linear and op not in sizes:
            for operand in op.operands:
                if operand is not None and operand[0] in entering:
                    users[origin(operand, is_transparent)][unarranged(operand)].append(op)

    def rank(source: Value) -> tuple[bool, int]:
        nonlinear = any(op.name in NONLINEAR for ops in users[source].values() for op in ops)
        return not nonlinear, -math.prod(source[0].shapes[source[1]])

    if not users:
        return (branch.matrices[0], 0) if branch.matrices else None
    source = min(users, key=rank)
    # x and x/2 in a formula of several steps are both made of x, which is the pre-activation then
    return next(iter(users[source])) if len(users[source]) == 1 else source


def unarranged(value: Value) -> Value:
    """Walk back over operations that keep all entries in their order."""
    return origin(value, lambda op: op.name in _ORDERED and len(op.data) == 1)


def _linear_part(formula: tuple[Op, ...], before: set[Op], users: dict[Op, list[Op]]) -> tuple[set[Op], set[Op]]:
    """Operations that are linear in what comes before, or norms of that; and those that compute the size in a norm."""
    linear: set[Op] = set()
    sizes: set[Op] = set()
    for op in formula:
        known = [operand in linear or operand in before for operand in op.data]
        if (all(known) and _is_linear(op)) or (any(known) and is_normalizer(op)):  # written by hand, the size is not
            linear.add(op)
    members = set(formula)
    for op in reversed(formula):
        inner = members.intersection(users[op])
        if op not in linear and inner and inner <= linear | sizes:
            sizes.add(op)
    return linear, sizes


def _is_linear(op: Op) -> bool:
    if op.name in ("Mul", "Div"):
        return len(op.data) == 1 and op.operands[0] is not None and (op.name == "Mul" or op.operands[0][0].from_data)
    return op.name in LINEAR | NORMS
