"""Find the constants that a module puts on what its parameters make, such as sqrt(D) on embeddings or 1/L on branches.

They are numbers, and tensors of one entry that no loss changes: buffers, frozen parameters, what is computed from these.
On the meta device such tensors are NaN, and what is multiplied by them is not known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property

from torch import Tensor

from mlu_lightning.discovery.entry_sizes import normed_size, number
from mlu_lightning.discovery.graph import ATTENTION, JOINS, PARTS, RESHAPES, Graph, Op, Use
from mlu_lightning.discovery.residual import BranchRegion

_ARRANGES = RESHAPES | PARTS
_PASSES = _ARRANGES | JOINS | {"Add", "Sub", "Rsub", "Mul", "Div"}
_HIDDEN, _USED, _ADDED = range(3)
"""Where a constant leads to: the logits of an attention, which have a rule of their own; something else; an addition."""


class Constants:
    """Factors between what parameters make and the next thing that is not proportional to it: a norm, a nonlinearity,
    another matrix, a residual addition, the output. Those on a branch as a whole are the branch's."""

    def __init__(self, graph: Graph, branches: Iterable[BranchRegion]) -> None:
        self._graph = graph
        self._regions = tuple(branches)
        self._additions = {region.addition for region in self._regions}
        self._counted: set[Op] = set()  # what branches and streams are multiplied by
        self._of_branches = {region.end: self._of_branch(region) for region in self._regions}

    def of_branch(self, ends: Iterable[Op]) -> float | None:
        """What the branch with these ends is multiplied by, next to its stream; None if calls of it differ."""
        return _common(self._of_branches[end] for end in ends)

    def of_parameter(self, uses: Iterable[Use]) -> float | None:
        """What all uses of a parameter are multiplied by, and what matrices read; None if uses differ."""
        return _common(map(self._of_use, uses))

    def after(self, op: Op) -> tuple[float, ...]:
        """What an operation's output is multiplied by; nothing if uses of it differ, or the number is not known."""
        factor = self._onward[op][0]
        return () if math.isnan(factor) or math.isclose(factor, 1.0, rel_tol=1e-6) else (factor,)

    @property
    def of_streams(self) -> float:
        """What a stream is multiplied by from one addition to the next; 1 where it is not, or normalized there."""
        ways = (self._behind(region.before) for region in self._regions)
        found = (math.prod(map(self.factor, ops)) for ops, source in ways if source in self._additions)
        known = (factor for factor in found if not math.isnan(factor))
        return next((factor for factor in known if not math.isclose(factor, 1.0, rel_tol=1e-6)), 1.0)

    @property
    def has_unknown(self) -> bool:
        """Whether anything is multiplied by a number that is on the meta device, without a value."""
        return any(math.isnan(self.factor(op)) for op in self._graph.ops)

    def _of_branch(self, region: BranchRegion) -> float:
        forward, op = [region.end], region.end
        while len(self._graph.users[op]) == 1 and (op := self._graph.users[op][0]) is not region.addition:
            if op.name not in _PASSES:
                break
            forward.append(op)
        behind = self._behind(region.end)[0]
        stream, source = self._behind(region.before)
        if not source.is_normalizer:
            read = (op is region.root or len(self._graph.users[op]) > 1 for op in stream)
            stream = stream[: next((number for number, too in enumerate(read) if too), None)]  # by the branch, too
        on_branch, on_stream = {*forward, *behind}, set(stream)
        found = [_alpha(region.addition, op) for op in (forward[-1], region.before)]
        found = [one * math.prod(map(self.factor, ops)) for one, ops in zip(found, (on_branch, on_stream), strict=True)]
        self._counted |= on_branch | on_stream
        return found[0] / found[1]

    def _of_use(self, use: Use) -> float | None:
        op = use.op
        found, leads_to = self._onward[op]
        if leads_to == _HIDDEN:
            return None
        # what a function of weights makes of them is measured
        made = 1.0 if use.function is not None else math.prod(map(self.factor, use.path))
        if use.kind in ("matrix", "gain"):
            constants, source = self._behind(op.data[0]) if op.data else ((), op)
            if not self._is_made_by_a_map(source):  # what lies between two maps is counted for the first one
                made *= math.prod(self.factor(one) for one in constants if one not in self._counted)
            made *= getattr(op.node, "_saved_alpha", 1.0) if op.name in ("Addmm", "Baddbmm") else 1.0
        elif use.kind in ("norm", "mul", "add") and self._feeds_matrix[op] and not self._is_made_by_a_map(op):
            return made  # and what lies between a norm and a matrix, for the matrix
        elif use.kind == "mul" and op.data:
            constants, source = self._behind(op.data[0])
            if source.is_normalizer:  # which nothing before it makes up for
                made *= math.prod(self.factor(one) for one in constants if one not in self._counted)
        return made * found

    @cached_property
    def _onward(self) -> dict[Op, tuple[float, int]]:
        """Factor from the output of each operation on, and where that leads to."""
        found: dict[Op, tuple[float, int]] = {}
        for op in reversed(self._graph.ops):
            ways = [self._way(op, user, found[user]) for user in self._graph.users[op]] or [(1.0, _USED)]
            farthest = max(leads_to for _, leads_to in ways)
            factor = _common(factor for factor, leads_to in ways if leads_to == farthest)
            found[op] = (1.0, _HIDDEN) if factor is None else (factor, farthest)
        return found

    def _way(self, op: Op, user: Op, onward: tuple[float, int]) -> tuple[float, int]:
        factor, leads_to = onward
        if user in self._additions:
            return 1.0, _ADDED
        if user.name == "Tanh" and self._is_cap(user):
            return onward
        if self._graph.is_matrix(user) or not self._is_proportional(user, op):
            hidden = user.name == "Bmm" or user.name.startswith(ATTENTION)
            return 1.0, _HIDDEN if hidden and not self._graph.is_matrix(user) else _USED
        own = 1.0 if user in self._counted else self.factor(user)
        return factor * own * _alpha(user, op), leads_to

    def _is_cap(self, tanh: Op) -> bool:
        """Whether it is that of c · tanh(x/c), which keeps what is small."""
        users = self._graph.users[tanh]
        return len(users) == 1 and math.isclose(self.factor(tanh.data[0]) * self.factor(users[0]), 1.0, rel_tol=1e-6)

    @cached_property
    def _feeds_matrix(self) -> dict[Op, bool]:
        found: dict[Op, bool] = {}
        for op in reversed(self._graph.ops):
            found[op] = any(
                self._graph.is_matrix(user)
                or (found[user] and user not in self._additions and self._is_proportional(user, op))
                for user in self._graph.users[op]
            )
        return found

    def _behind(self, op: Op) -> tuple[list[Op], Op]:
        """Operations on the way back that arrange, multiply by constants or gains, or norm, and what these are made from."""
        found: list[Op] = []
        while op not in self._additions:
            if op.is_normalizer:
                found.append(op)
                break
            is_gain = op.name == "Mul" and self._graph.kinds(op) == {"mul"}
            if len(op.data) != 1 or (self._graph.uses.get(op) and not is_gain):
                break
            if op.name not in _ARRANGES | {"Mul", "Div"} or not self._is_proportional(op, op.data[0]):
                break
            found.append(op)
            op = op.data[0]
        return found, op

    def _is_made_by_a_map(self, op: Op) -> bool:
        """Whether an operation is a matrix or a lookup, or the bias of one is added there."""
        source = op.data[0].source if op.name == "Add" and len(op.data) == 1 else op
        return bool(self._graph.kinds(source) & {"matrix", "lookup"})

    @staticmethod
    def _is_proportional(op: Op, to: Op) -> bool:
        if op.is_normalizer or op.name not in _PASSES:
            return False
        numerator = op.operands[0]
        return op.name != "Div" or (numerator is not None and numerator[0] is to)

    def factor(self, op: Op) -> float:
        """Number that an operation multiplies its only operand by, or size of a norm; 1 if there is none, and for masks."""
        if op.is_normalizer:
            return normed_size(op, self._graph)
        if op.name not in ("Mul", "Div"):
            return 1.0
        operands = (*op.operands, None)[:2]
        if sum(operand is not None for operand in operands) != 1:
            return 1.0
        found = number(op.saved("self" if operands[0] is None else "other"))
        if not found:
            return 1.0
        factor = abs(found if op.name == "Mul" else 1 / found)
        # what stochastic depth leaves is divided by its probability
        inverse = factor > 1 and any(map(_is_mask, (*op.data, *self._graph.users.get(op, ()))))
        return 1.0 if inverse else factor


def _alpha(op: Op, operand: Op) -> float:
    """What ``torch.add(a, b, alpha=...)`` multiplies its second operand by."""
    second = op.operands[1] if op.name in ("Add", "Sub") and len(op.operands) > 1 else None
    alpha = number(op.saved("alpha")) if second is not None and second[0] is operand else None
    return abs(alpha) if alpha else 1.0


def _is_mask(op: Op) -> bool:
    """Whether an operation multiplies each sample by a number that is not known."""
    alone = op.name == "Mul" and sum(operand is not None for operand in op.operands) == 1
    other = op.saved("other") if alone else None
    per_sample = isinstance(other, Tensor) and other.ndim > 1 and math.prod(other.shape[1:]) == 1
    return per_sample and number(other) is None


def _common(factors: Iterable[float | None]) -> float | None:
    """The factor that all are, None if they differ."""
    found = [*factors]
    if not found or found[0] is None:
        return None
    alike = all(factor is not None and math.isclose(factor, found[0], rel_tol=1e-6) for factor in found)
    return found[0] if alike else None
