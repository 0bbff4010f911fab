"""Find where pre-activations and attention logits can be read: torch functions that take or return them.

On the way back from what the last matrix of a branch reads lie the nonlinearity, which may be a formula of several steps,
and the product of a gated perceptron; before these, what is linear in what the matrices before make, which is where
pre-activations are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from mlu_lightning.discovery.branch_roles import BranchRoles
from mlu_lightning.discovery.graph import LINEAR, NONLINEAR, NORMS, PERMUTATIONS, RESHAPES, Graph, Op, Value
from mlu_lightning.discovery.structure import Tap
from mlu_lightning.discovery.trace import FunctionCall, Trace, TracedTensor
from mlu_lightning.discovery.traversal import between, origin
from mlu_lightning.utilities.function_calls import ATTENTION_CALL

_ORDERED = RESHAPES - PERMUTATIONS - {"AsStrided", "Expand", "NativeDropout", "FusedDropout"}


@dataclass(frozen=True)
class FeatureTaps:
    """Taps of pre-activations and logits in a traced module."""

    trace: Trace
    graph: Graph

    def branches(self, branches: Iterable[Iterable[BranchRoles]]) -> tuple[Tap, ...]:
        """Taps of branches; of several calls of one, the first that can be read, which need not come first in the graph."""
        found = (next(filter(None, (self._tap(i, call) for call in calls)), None) for i, calls in enumerate(branches))
        return tuple(tap for tap in found if tap is not None)

    def _tap(self, number: int, branch: BranchRoles) -> Tap | None:
        """Where a call of a branch can be read, None if no function is given or returns its features."""
        position = branch.region.position
        if branch.attention is not None:
            attention = self._attention(branch.attention.path[0]) if branch.attention.path else None
            if attention is None:
                return None
            module, function, before = attention.place
            return Tap("logits", number, position, module, "input", before, -1, function)
        value = _pre_activations(branch)
        candidates = () if value is None else self._candidates.get(_unarranged(value), ())
        best = min(candidates, key=lambda candidate: candidate.rank, default=None)
        if best is None:
            return None
        module, function, before = best.call.place
        axis = 1 if branch.kind == "convolution" else -1
        return Tap("units", number, position, module, best.where, before, axis, function)

    def _attention(self, entering: Op) -> FunctionCall | None:
        """The attention that is an operation, or whose softmax takes what that makes."""
        return self._attentions.get(entering) or next(
            (self._attentions[user] for user in self.graph.users[entering] if user in self._attentions), None
        )

    @cached_property
    def _attentions(self) -> dict[Op, FunctionCall]:
        """Calls of attentions by their operations, of several the first."""
        by_number = {op.node._sequence_nr(): op for op in self.graph.ops}
        calls = [call for call in reversed(self.trace.functions) if call.place.function == ATTENTION_CALL]
        return {by_number[call.sequence]: call for call in calls if call.sequence in by_number}

    @cached_property
    def _candidates(self) -> dict[Value, list[_Candidate]]:
        """Calls of functions by the value that they are given first, and by that which they return."""
        candidates: dict[Value, list[_Candidate]] = defaultdict(list)
        for call in self.trace.functions:
            if call.place.function == ATTENTION_CALL:
                continue
            given, made = self._first(call.inputs), self._first(call.outputs)
            if given is not None:
                direct = made is not None and made[0].name in NONLINEAR
                candidates[_unarranged(given)].append(_Candidate(call, "input", direct))
            if made is not None:
                direct = made[0].name in NORMS or self.graph.is_matrix(made[0])
                candidates[_unarranged(made)].append(_Candidate(call, "output", direct))
        return candidates

    def _first(self, tensors: tuple[TracedTensor, ...]) -> Value | None:
        """The value of the first tensor, None if it has no part in the loss."""
        return next((value for index, value in self.graph.values(tensors) if index == 0), None)


@dataclass(frozen=True)
class _Candidate:
    """A call of a function, what of it is read, and whether it is the nonlinearity, matrix or norm itself."""

    call: FunctionCall
    where: Literal["output", "input"]
    direct: bool

    @property
    def rank(self) -> tuple[object, ...]:
        """Prefers what another pass does in the same way: arithmetic and views are what hooks and modes differ in."""
        module, function, number = self.call.place
        return not self.direct, self.where == "output", number, len(module), module, function


def _pre_activations(branch: BranchRoles) -> Value | None:
    """Find what enters the nonlinearity of a branch without attention, or what its first matrix makes if it has none.

    Of gated perceptrons it is the half that enters the nonlinearity, the larger value if there is none.
    """
    if not branch.matrices:
        return None
    if branch.experts is not None:
        return None  # tokens change their places from step to step
    ends = branch.writers[-1].data if branch.writers else (branch.region.end,)
    inside = set(branch.region.ops)
    formula, before = between(ends, lambda op: op not in inside or branch.graph.is_matrix(op))
    linear, sizes = _linear_part(formula, before, branch.graph.users)
    entering = linear | before
    users: dict[Value, dict[Value, list[Op]]] = defaultdict(lambda: defaultdict(list))
    for op in formula:
        if op not in linear and op not in sizes:
            for value in op.values:
                if value[0] in entering:
                    users[origin(value, lambda o: o.is_transparent)][_unarranged(value)].append(op)

    def rank(source: Value) -> tuple[bool, int]:
        nonlinear = any(op.name in NONLINEAR for ops in users[source].values() for op in ops)
        return not nonlinear, -math.prod(source[0].shapes[source[1]])

    if not users:
        return (branch.matrices[0], 0) if branch.matrices else None
    source = min(users, key=rank)
    # x and x/2 in a formula of several steps are both made of x, which is the pre-activation then
    return next(iter(users[source])) if len(users[source]) == 1 else source


def _unarranged(value: Value) -> Value:
    """Walk back over operations that keep all entries in their order."""
    return origin(value, lambda op: op.name in _ORDERED and len(op.data) == 1)


def _linear_part(formula: tuple[Op, ...], before: set[Op], users: dict[Op, list[Op]]) -> tuple[set[Op], set[Op]]:
    """Operations that are linear in what comes before, or norms of that; and those that compute the size in a norm."""
    linear, sizes = set[Op](), set[Op]()
    for op in formula:
        known = [operand in linear or operand in before for operand in op.data]
        if (all(known) and _is_linear(op)) or (any(known) and op.is_normalizer):  # written by hand, the size is not
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
