"""Where pre-activations and attention logits can be read: torch functions that are given them or return them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from mlu_lightning.discovery.graph import NONLINEAR, NORMS, Graph, Op
from mlu_lightning.discovery.placement import BranchPlacement
from mlu_lightning.discovery.pre_activations import Value, in_order, pre_activations
from mlu_lightning.discovery.structure import Tap
from mlu_lightning.discovery.trace import FunctionCall, Passed, Rehearsal
from mlu_lightning.utilities.function_calls import ATTENTION_CALL

__all__ = ["FeatureTaps"]


@dataclass(frozen=True)
class FeatureTaps:
    """Places to read pre-activations and logits from in one rehearsed module.

    Args:
        rehearsal: a forward pass.
        graph: its graph.
    """

    rehearsal: Rehearsal
    graph: Graph

    def branch(self, number: int, placement: BranchPlacement) -> Tap | None:
        """Where the features of a branch can be read, None if there is no place for them in a submodule's first call.

        Args:
            number: of the branch.
            placement: of one of its calls.
        """
        if placement.attention is not None:
            call = self._attention(placement.attention.way[0])
            return None if call is None else _tap("logits", number, placement, call, "input", -1)
        value = pre_activations(placement)
        found = () if value is None else self._places.get(in_order(*value), ())
        place = min(found, key=lambda place: place.rank, default=None)
        axis = 1 if placement.kind == "convolution" else -1
        return None if place is None else _tap("units", number, placement, place.call, place.where, axis)

    def _attention(self, entering: Op) -> FunctionCall | None:
        """The attention that is an operation, or whose softmax takes what that makes."""
        return next((call for op, call in self._attentions if op is entering or entering in op.data), None)

    @cached_property
    def _attentions(self) -> list[tuple[Op, FunctionCall]]:
        """Attentions with their operations."""
        by_number = {op.node._sequence_nr(): op for op in self.graph.ops}
        calls = (call for call in self.rehearsal.functions if call.place.function == ATTENTION_CALL)
        return [(by_number[call.sequence], call) for call in calls if call.sequence in by_number]

    @cached_property
    def _places(self) -> dict[Value, list[_Place]]:
        """Calls of functions by the value that they are given first, and by that which they return."""
        places: dict[Value, list[_Place]] = defaultdict(list)
        for call in self.rehearsal.functions:
            if call.place.function == ATTENTION_CALL:
                continue
            given, made = self._first(call.inputs), self._first(call.outputs)
            if given is not None:
                plain = made is not None and made[0].name in NONLINEAR
                places[in_order(*given)].append(_Place(call, "input", plain))
            if made is not None:
                plain = made[0].name in NORMS or self.graph.is_matrix(made[0])
                places[in_order(*made)].append(_Place(call, "output", plain))
        return places

    def _first(self, tensors: Iterable[Passed]) -> Value | None:
        """The value that is the first tensor, if it has a part in the loss."""
        for tensor in tensors:
            if tensor.index == 0 and tensor.node in self.graph.by_node:
                return self.graph.by_node[tensor.node], tensor.output
        return None


@dataclass(frozen=True)
class _Place:
    """A call of a function, what of it is read, and whether it is the nonlinearity, matrix or norm itself."""

    call: FunctionCall
    where: Literal["output", "input"]
    plain: bool

    @property
    def rank(self) -> tuple[object, ...]:
        """Prefers what another pass does in the same way: arithmetic and views are what hooks and modes differ in."""
        module, function, number = self.call.place
        return not self.plain, self.where == "output", number, len(module), module, function


def _tap(
    reads: Literal["units", "logits"],
    number: int,
    placement: BranchPlacement,
    call: FunctionCall,
    where: Literal["output", "input"],
    axis: int,
) -> Tap:
    module, function, before = call.place
    return Tap(reads, number, placement.region.position, module, where, before, axis, function)
