"""The role of a parameter, from where in a branch, a stem, a stream or a head it is used."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from mlu_lightning.discovery.attention import Attention, find_attention
from mlu_lightning.discovery.experts import Experts, find_experts
from mlu_lightning.discovery.graph import (
    ATTENTION,
    CONVOLUTIONS,
    NONLINEAR,
    Graph,
    Op,
    Use,
    full_factors,
    is_normalizer,
    transparent_source,
)
from mlu_lightning.discovery.residual import BranchRegion
from mlu_lightning.discovery.structure import BranchKind
from mlu_lightning.table import Role, Variant

__all__ = ["BranchPlacement", "HeadPlacement", "StemPlacement", "TrunkPlacement", "fans"]

_BIAS_ROLES = {
    Role.BRANCH_IN: Role.BRANCH_IN_BIAS,
    Role.BRANCH_HIDDEN: Role.BRANCH_IN_BIAS,
    Role.BRANCH_OUT: Role.BRANCH_OUT_BIAS,
    Role.BRANCH_BOUNDED_MATRIX: Role.BRANCH_BOUNDED,
    Role.EMBEDDING: Role.EMBEDDING,
    Role.STREAM_MATRIX: Role.STREAM_NORM,
    Role.READOUT: Role.READOUT_BIAS,
}
"""Role of the bias that belongs to a matrix."""


@dataclass(frozen=True)
class BranchPlacement:
    """Roles inside one residual branch.

    Args:
        graph: of the forward pass.
        region: the branch.
    """

    graph: Graph
    region: BranchRegion

    def role(self, use: Use) -> Role | str:
        """Role of a parameter at one use, or why it has none."""
        op = use.op
        if use.kind == "matrix":
            return self._matrix_role(op)
        if use.kind == "bias":
            return _BIAS_ROLES[self._matrix_role(op)]
        if use.kind == "lookup":
            return self._table_role(use)
        size, attention = math.prod(use.taken), self.attention
        if use.kind == "add" and op in self._biased:
            return _BIAS_ROLES[self._matrix_role(self._biased[op])]
        if size != max(use.taken, default=1) and not self._is_per_head(use):
            return f"it enters {op.name} with shape {list(use.shape)}"
        # at D = 1 the gain of a norm has one entry, too
        if size == 1 and not (use.shape and self._embedding == 1 and not self._upstream[op]):
            return Role.BRANCH_BOUNDED
        if op in self._writing_path:
            return Role.BRANCH_OUT_BIAS if use.kind == "add" else Role.BRANCH_NORM
        if not self._upstream[op]:
            return Role.BRANCH_NORM
        source = transparent_source(op.data[0]) if op.data else op
        if use.kind == "add" and self.graph.is_matrix(source):
            return _BIAS_ROLES[self._matrix_role(source)]
        if attention is not None:
            if size == self.hidden and use.shape[-1] == 1:
                return Role.BRANCH_IN_BIAS  # a number for each head
            if size == attention.key_dim and self._is_in_heads(op):
                return Role.BRANCH_BOUNDED
            if size % attention.key_dim == 0:
                return Role.BRANCH_IN_BIAS
        if size in self._sizes:
            return Role.BRANCH_IN_BIAS
        return f"it is a vector of {size} entries between matrices of a branch, none of which has as many units"

    def variant(self, use: Use, role: Role) -> Variant | None:
        """What about the place of a use changes the row of its role."""
        return Variant.BEFORE_NORM if role is Role.BRANCH_OUT and self.ends_in_norm else None

    @cached_property
    def matrices(self) -> tuple[Op, ...]:
        """Operations with a parameter matrix, in order."""
        return tuple(op for op in self.region.ops if self.graph.is_matrix(op))

    @property
    def matrix_names(self) -> tuple[str, ...]:
        """Names of the parameters that are matrices, in order of use."""
        return tuple(use.parameter for op in self.matrices for use in self.graph.matrices(op))

    @cached_property
    def writers(self) -> tuple[Op, ...]:
        """Matrices that write to the addition: nothing but linear operations and norms lies between."""
        return tuple(op for op in self.matrices if op in self._writing_path)

    @cached_property
    def ends_in_norm(self) -> bool:
        """Whether a norm comes after the matrices that write."""
        return any(is_normalizer(op) for op in self._writing_path)

    @cached_property
    def attention(self) -> Attention | None:
        """The attention in the branch, if there is any."""
        return find_attention(self.region.ops, self.graph)

    @cached_property
    def kind(self) -> BranchKind:
        """What kind of block the branch is."""
        if self.attention is not None:
            return "attention"
        spatial = (
            op.name in CONVOLUTIONS and math.prod(self.graph.matrices(op)[0].shape[2:]) > 1 for op in self.matrices
        )
        return "convolution" if any(spatial) else "mlp"

    @cached_property
    def hidden(self) -> int:
        """Hidden width M: inputs of the matrix that writes, in heads for attention."""
        last = self.writers or self.matrices
        inputs = fans(self.graph.matrices(last[-1])[0])[0] * (self.active if self.is_expert(last[-1]) else 1)
        return inputs // self.attention.value_dim if self.attention is not None and self.writers else inputs

    @cached_property
    def experts(self) -> Experts | None:
        """The experts in the branch, if it is a mixture of experts."""
        return find_experts(self.graph, self.region.ops)

    @property
    def active(self) -> int:
        """Number of experts that a token is sent to; 1 if there are none, or it cannot be read."""
        return 1 if self.experts is None else self.experts.active or 1

    @property
    def is_selection_hidden(self) -> bool:
        """Whether it is a mixture of experts, and how many of them a token is sent to cannot be read."""
        return self.experts is not None and self.experts.active is None

    def is_expert(self, op: Op) -> bool:
        """Whether an operation is a matrix of an expert, or looks up its bias."""
        if self.experts is None:
            return False
        return op in self.experts.ops or self._biased.get(op) in self.experts.ops

    def _matrix_role(self, op: Op) -> Role:
        router = None if self.experts is None else self.experts.router
        if op is router:
            return Role.BRANCH_BOUNDED_MATRIX
        if op in self.writers:
            return Role.BRANCH_OUT
        if self._upstream[op] - {router}:
            return Role.BRANCH_HIDDEN
        feeds = any(op in self._upstream[other] for other in self.matrices)
        return Role.BRANCH_IN if feeds else Role.BRANCH_BOUNDED_MATRIX

    def _table_role(self, use: Use) -> Role | str:
        """Role of a table that is looked up."""
        attention, matrix = self.attention, self._biased.get(use.op)
        if matrix is not None:
            return _BIAS_ROLES[self._matrix_role(matrix)]
        if attention is not None and use.shape[-1] == self.hidden:
            return Role.BRANCH_IN_BIAS  # one logit per head, as in relative position biases
        if attention is not None and use.shape[-1] == attention.key_dim:
            return Role.BRANCH_BOUNDED
        return "it is a table that is looked up inside a branch"

    def _is_per_head(self, use: Use) -> bool:
        """Whether a parameter is [heads, head_dim]."""
        attention = self.attention
        entries = [size for size in use.taken if size > 1]
        return attention is not None and len(entries) == 2 and entries[1] in (attention.key_dim, attention.value_dim)

    def _is_in_heads(self, op: Op) -> bool:
        """Whether units have been split into heads, which one head alone does not show in the size of the last axis."""
        assert self.attention is not None
        key_dim, way = self.attention.key_dim, [op]
        while way[-1].data and not self.graph.is_matrix(way[-1]):
            way.append(way[-1].data[0])
        tokens = math.prod(way[-1].shape[:-1])
        return any(
            o.shape[-1:] == (key_dim,) and (math.prod(o.shape[:-1]) > tokens or o.shape[-2] == 1) for o in way[:-1]
        )

    @cached_property
    def _biased(self) -> dict[Op, Op]:
        """The matrix of experts to whose output biases of experts are added, by the lookup of these or the addition."""
        found: dict[Op, Op] = {}
        for op in self.region.ops if self.experts is not None else ():
            sources = [transparent_source(operand) for operand in op.data]
            matrices = [source for source in sources if self.experts is not None and source in self.experts.ops]
            if op.name == "Add" and len(matrices) == 1:
                tables = [source for source in sources if _is_lookup(self.graph, source)]
                found |= dict.fromkeys(tables or [op], matrices[0])
        return found

    @cached_property
    def _upstream(self) -> dict[Op, frozenset[Op]]:
        return _upstream(self.graph, self.region.ops)

    @cached_property
    def _writing_path(self) -> frozenset[Op]:
        """Operations from the last matrices on, those included."""
        members = set(self.region.ops)
        seen: set[Op] = set()
        stack = [self.region.end]
        while stack:
            op = stack.pop()
            if op in seen or op not in members or op.name in NONLINEAR:
                continue
            seen.add(op)
            if op.name.startswith(ATTENTION):
                stack.extend(operand[0] for operand in op.operands[2:3] if operand is not None)
            elif not self.graph.is_matrix(op):
                stack.extend(full_factors(op) if op.name == "Mul" else op.data)
        return frozenset(seen)

    @cached_property
    def _embedding(self) -> int | None:
        """Dimension of the stream, D: outputs of the matrix that writes."""
        return fans(self.graph.matrices(self.writers[-1])[0])[1] if self.writers else None

    @cached_property
    def _sizes(self) -> frozenset[int]:
        return frozenset(size for op in self.matrices for use in self.graph.matrices(op) for size in fans(use))


@dataclass(frozen=True)
class StemPlacement:
    """Roles between the data and the first addition of a stream, or a branch that reads something else."""

    graph: Graph
    ops: tuple[Op, ...]

    def role(self, use: Use) -> Role | str:
        """Role of a parameter at one use, or why it has none."""
        if use.kind == "lookup":
            return Role.EMBEDDING
        if use.kind in ("matrix", "bias"):
            role = Role.STREAM_MATRIX if self._upstream[use.op] else Role.EMBEDDING
            return role if use.kind == "matrix" else _BIAS_ROLES[role]
        if use.kind == "other" and math.prod(use.shape) != max(use.shape, default=1):
            return f"it enters {use.op.name} with shape {list(use.shape)}"
        return Role.EMBEDDING if use.kind == "add" else Role.STREAM_NORM

    def variant(self, use: Use, role: Role) -> None:
        """Nothing here changes the row of a role."""

    @cached_property
    def _upstream(self) -> dict[Op, frozenset[Op]]:
        return _upstream(self.graph, self.ops)


@dataclass(frozen=True)
class TrunkPlacement:
    """Roles on a stream between its additions."""

    post_norm: bool

    def role(self, use: Use) -> Role | str:
        """Role of a parameter at one use, or why it has none."""
        if use.kind == "matrix":
            return Role.STREAM_MATRIX
        if use.kind == "lookup" or (use.kind == "add" and len(use.stored) > 1):
            return Role.EMBEDDING  # a table that is added, as at the beginning
        if math.prod(use.shape) != max(use.shape, default=1):
            return f"it enters {use.op.name} with shape {list(use.shape)} on the stream, between two additions"
        return Role.STREAM_NORM

    def variant(self, use: Use, role: Role) -> Variant | None:
        """What about the place of a use changes the row of its role."""
        is_norm = role is Role.STREAM_NORM and use.kind in ("norm", "mul")
        return Variant.POST_NORM if self.post_norm and is_norm else None


@dataclass(frozen=True)
class HeadPlacement:
    """Roles between the last addition and the output.

    Args:
        graph: of the forward pass.
        ops: of the head.
        post_norm: whether the stream has a norm after every addition; the one after the last is in the head.
    """

    graph: Graph
    ops: tuple[Op, ...]
    post_norm: bool

    def role(self, use: Use) -> Role | str:
        """Role of a parameter at one use, or why it has none."""
        if use.kind in ("matrix", "bias"):
            role = Role.READOUT if use.op in self.readouts else Role.STREAM_MATRIX
            return role if use.kind == "matrix" else _BIAS_ROLES[role]
        if use.kind == "lookup":
            return "it is a table that is looked up after the last addition"
        if math.prod(use.shape) != max(use.shape, default=1):
            return f"it enters {use.op.name} with shape {list(use.shape)} after the last addition"
        if self._upstream[use.op] & self.readouts:
            return Role.READOUT_BIAS
        return Role.STREAM_NORM

    def variant(self, use: Use, role: Role) -> Variant | None:
        """What about the place of a use changes the row of its role."""
        if role is Role.STREAM_MATRIX:
            return Variant.IN_HEAD
        is_post_norm = role is Role.STREAM_NORM and self.post_norm and use.op in self._first_norms
        return Variant.POST_NORM if is_post_norm else None

    @cached_property
    def _first_norms(self) -> frozenset[Op]:
        """Norms that no other norm of the head comes before: one for each forward pass."""
        after: set[Op] = set()
        first: set[Op] = set()
        for op in self.ops:
            is_norm = any(use.kind in ("norm", "mul") for use in self.graph.uses.get(op.index, ()))
            if any(operand in after or operand in first for operand in op.data):
                after.add(op)
            elif is_norm:
                first.add(op)
        return frozenset(first)

    @cached_property
    def readouts(self) -> frozenset[Op]:
        """The last matrices: no other one comes after them."""
        matrices = [op for op in self.ops if self.graph.is_matrix(op)]
        feeding = frozenset(upstream for op in matrices for upstream in self._upstream[op])
        return frozenset(op for op in matrices if op not in feeding and not self._is_pooler(op))

    def _is_pooler(self, op: Op) -> bool:
        """A square matrix with an activation, such as BERT's pooler, is a transform of the stream."""
        inputs, outputs = fans(self.graph.matrices(op)[0])
        activated = any(
            user.name in ("Tanh", "Gelu", "Relu", "Silu") and transparent_source(user.data[0]) is op
            for user in self.ops
        )
        return inputs == outputs and activated

    @cached_property
    def _upstream(self) -> dict[Op, frozenset[Op]]:
        return _upstream(self.graph, self.ops)


def fans(use: Use) -> tuple[int, int]:
    """Inputs and outputs of a parameter at one use; vectors have one input, tables that are looked up too.

    Args:
        use: of a parameter.
    """
    if use.kind == "lookup":
        return 1, use.shape[-1]
    if use.kind != "matrix":
        # a table of positions that is added whole is [positions, D]
        return 1, use.shape[-1] if sum(size > 1 for size in use.shape) > 1 else math.prod(use.shape)
    if use.op.name in CONVOLUTIONS:
        first, second = use.shape[:2]
        if getattr(use.op.node, "_saved_transposed", False):
            groups: int = getattr(use.op.node, "_saved_groups", 1)
            return first // groups, second * groups
        return second, first
    first, second = use.shape[-2:] if len(use.shape) > 1 else (1, use.shape[-1])
    inputs, outputs = (first, second) if use.inputs_first else (second, first)
    return inputs, math.prod(use.stored) // inputs if use.is_section else outputs


def _upstream(graph: Graph, ops: Iterable[Op]) -> dict[Op, frozenset[Op]]:
    """Matrices and lookups among ``ops`` that come before each of them."""
    found: dict[Op, frozenset[Op]] = {}
    for op in ops:
        before: frozenset[Op] = frozenset()
        for operand in op.data:
            before |= found.get(operand, frozenset())
            if operand in found and (graph.is_matrix(operand) or _is_lookup(graph, operand)):
                before |= {operand}
        found[op] = before
    return found


def _is_lookup(graph: Graph, op: Op) -> bool:
    return any(use.kind == "lookup" for use in graph.uses.get(op.index, ()))
