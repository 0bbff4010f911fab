"""Where pre-activations and attention logits can be read: torch functions that are given them or return them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from mlu_lightning.discovery.branch_roles import BranchRoles
from mlu_lightning.discovery.graph import Graph, Op, Value
from mlu_lightning.discovery.operations import NONLINEAR, NORMS
from mlu_lightning.discovery.pre_activations import pre_activations, unarranged
from mlu_lightning.discovery.structure import Tap
from mlu_lightning.discovery.trace import FunctionCall, Trace, TracedTensor
from mlu_lightning.utilities.function_calls import ATTENTION_CALL

__all__ = ["FeatureTaps"]


@dataclass(frozen=True)
class FeatureTaps:
    """Taps of pre-activations and logits in a traced module."""

    trace: Trace
    graph: Graph

    def branch(self, number: int, branch: BranchRoles) -> Tap | None:
        """Where a call of a branch can be read, None if no submodule is given or returns its features in a first call."""
        position = branch.region.position
        if branch.attention is not None:
            attention = self._attention(branch.attention.path[0])
            return None if attention is None else _tap("logits", number, position, attention, "input", -1)
        value = pre_activations(branch)
        candidates = () if value is None else self._candidates.get(unarranged(value), ())
        best = min(candidates, key=lambda candidate: candidate.rank, default=None)
        axis = 1 if branch.kind == "convolution" else -1
        return None if best is None else _tap("units", number, position, best.call, best.where, axis)

    def _attention(self, entering: Op) -> FunctionCall | None:
        """The attention that is an operation, or whose softmax takes what that makes."""
        return next((call for op, call in self._attentions if op is entering or entering in op.data), None)

    @cached_property
    def _attentions(self) -> list[tuple[Op, FunctionCall]]:
        """Attentions with their operations."""
        by_number = {op.node._sequence_nr(): op for op in self.graph.ops}
        calls = (call for call in self.trace.functions if call.place.function == ATTENTION_CALL)
        return [(by_number[call.sequence], call) for call in calls if call.sequence in by_number]

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
                candidates[unarranged(given)].append(_Candidate(call, "input", direct))
            if made is not None:
                direct = made[0].name in NORMS or self.graph.is_matrix(made[0])
                candidates[unarranged(made)].append(_Candidate(call, "output", direct))
        return candidates

    def _first(self, tensors: tuple[TracedTensor, ...]) -> Value | None:
        """The value of the first tensor, None if it has no part in the loss."""
        values = (self.graph.value(tensor) for tensor in tensors if tensor.index == 0)
        return next((value for value in values if value is not None), None)


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


def _tap(
    reads: Literal["units", "logits"],
    number: int,
    position: int,
    call: FunctionCall,
    where: Literal["output", "input"],
    axis: int,
) -> Tap:
    module, function, before = call.place
    return Tap(reads, number, position, module, where, before, axis, function)
