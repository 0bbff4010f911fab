"""The role of a parameter outside of branches: before, along and after a stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from mlu_lightning.discovery.graph import Graph, Op, Use
from mlu_lightning.discovery.recurrence import is_multiplied
from mlu_lightning.discovery.structure import Along
from mlu_lightning.discovery.traversal import Ancestry
from mlu_lightning.discovery.units import Units
from mlu_lightning.table import Role, Variant

BIAS_ROLES = {
    Role.BRANCH_IN: Role.BRANCH_IN_BIAS,
    Role.BRANCH_HIDDEN: Role.BRANCH_IN_BIAS,
    Role.BRANCH_OUT: Role.BRANCH_OUT_BIAS,
    Role.BRANCH_BOUNDED_MATRIX: Role.BRANCH_BOUNDED,
    Role.EMBEDDING: Role.EMBEDDING,
    Role.STREAM_MATRIX: Role.STREAM_NORM,
    Role.READOUT: Role.READOUT_BIAS,
}
"""Role of the bias that belongs to a matrix."""


_INPUT_ROLES = {
    Role.BRANCH_IN: Role.BRANCH_NORM,
    Role.BRANCH_HIDDEN: Role.BRANCH_IN_BIAS,
    Role.BRANCH_OUT: Role.BRANCH_IN_BIAS,
    Role.BRANCH_BOUNDED_MATRIX: Role.BRANCH_NORM,
    Role.STREAM_MATRIX: Role.STREAM_NORM,
}
"""Role of a gain on what a matrix reads."""


@dataclass(frozen=True)
class Placed:
    """The role of a parameter at one use, and what about its place changes the row of that role."""

    role: Role
    variant: Variant | None = None
    outputs: int | None = None  # entries over units or coordinates, where there are others, such as time steps
    on_data: bool = False  # whether it acts on data before any map
    repeats: int | None = None  # how many of its kind a stream goes through, or are summed
    places: int | None = None  # sums that it is in, if it is in any
    apart: bool = False  # whether it acts on data that no stream reads


@dataclass(frozen=True)
class Unplaced:
    """Why the role of a parameter at one use cannot be told."""

    reason: str
    role: None = None
    variant: None = None
    apart: bool = False


def place_gain(matrix: Placed | Unplaced, along: Along) -> Placed | Unplaced:
    """Role of a gain on outputs, inputs or other parts of a matrix."""
    if matrix.role is None:
        return matrix
    role = {"outputs": BIAS_ROLES, "inputs": _INPUT_ROLES}.get(along, {}).get(matrix.role)
    if along == "bounded" and matrix.role.in_branch:
        role = Role.BRANCH_BOUNDED
    return (
        Unplaced(f"it multiplies parts of {matrix.role} weights other than their outputs")
        if role is None
        else Placed(role)
    )


def place_in_stem(use: Use, maps_before: Ancestry, apart: frozenset[Op]) -> Placed | Unplaced:
    """Role between the data and the first addition of a stream, a branch that reads something else, or a loss (apart)."""
    if use.op in apart:
        return replace(place_in_stem(use, maps_before, frozenset()), apart=True)
    if use.kind == "lookup":
        return Placed(Role.EMBEDDING)
    if use.kind in ("matrix", "bias"):
        role = Role.STREAM_MATRIX if maps_before.of(use.op) else Role.EMBEDDING
        return Placed(role if use.kind == "matrix" else BIAS_ROLES[role])
    if use.kind == "other" and not use.is_vector:
        return Unplaced(f"it enters {use.op.name} with shape {list(use.shape)}")
    role = Role.EMBEDDING if use.kind == "add" else Role.STREAM_NORM
    return Placed(role, on_data=not maps_before.of(use.op))


def place_for_blocks(place: Callable[[Use], Placed | Unplaced], repeats: int, use: Use) -> Placed | Unplaced:
    """Role in what is made of data for a few blocks alone, of which there are ``repeats`` along the stream."""
    found = place(use)
    return found if found.role is None else replace(found, variant=Variant.OF_BLOCK, repeats=repeats)


@dataclass(frozen=True)
class TrunkRoles:
    """Roles on a stream between its additions, beside branches, or on the way to another stream."""

    embeddings: frozenset[int]  # dimensions of streams
    norms: frozenset[Op] = frozenset()  # operations of norms that compound, as those after every addition do
    repeats: int = 0  # how many norms, or gains and matrices beside branches, the stream goes through
    beside: bool = False  # whether it is beside branches, in every block
    matrices: int = 0  # how many matrices that keep its dimension the stream goes through
    units: Units | None = None  # heads of an attention that the stream goes through

    def place(self, use: Use) -> Placed | Unplaced:
        """Role of a parameter at one use."""
        every = Variant.EVERY_BLOCK if self.beside and self.repeats else None
        if use.kind == "matrix":
            every = Variant.EVERY_BLOCK if self.matrices and keeps_dimension(use) else None
            return Placed(Role.STREAM_MATRIX, every, repeats=self.matrices if every else None)
        if self.units is not None and self.units.makes_logits(use.op):
            return Placed(Role.EMBEDDING, outputs=self.units.own(use) or 1)  # a bias of logits, for each head
        if use.kind == "lookup" or (use.kind == "add" and (len(use.stored) > 1 or not use.is_vector)):
            return Placed(Role.EMBEDDING)  # a table that is added, as at the beginning
        coordinates = _coordinates(use, self.embeddings)
        if not use.is_vector and coordinates is None:
            return Unplaced(
                f"it enters {use.op.name} with shape {list(use.shape)} on the stream, between two additions"
            )
        return _compounding(use, coordinates, self.norms, self.repeats, every)


def keeps_dimension(use: Use) -> bool:
    """Whether a matrix makes as many tokens of a stream's dimension as it reads, maybe joined with something else."""
    (inputs, outputs), read = use.fans, use.op.data[0].source
    if math.prod(use.op.shape) * inputs != math.prod(use.op.data[0].shape) * outputs:
        return False
    return inputs == outputs or (read.name == "Cat" and any(outputs in operand.shape for operand in read.data))


def _compounding(
    use: Use, coordinates: int | None, norms: frozenset[Op], repeats: int, other: Variant | None = None
) -> Placed:
    """Place a gain or bias on a stream, which may be one of several that compound."""
    variant = Variant.POST_NORM if use.op in norms else other
    variant = variant if use.kind in ("norm", "mul") else None
    return Placed(Role.STREAM_NORM, variant, coordinates, repeats=repeats)


def first_norms(graph: Graph, ops: tuple[Op, ...]) -> frozenset[Op]:
    """Norms that no other one of these operations comes before: one for each forward pass."""
    norms = [op for op in ops if graph.kinds(op) & {"norm", "mul"}]
    before = Ancestry(graph, ops, norms)
    return frozenset(op for op in norms if not before.of(op))


def _coordinates(use: Use, embeddings: frozenset[int]) -> int | None:
    """Entries over coordinates of a gain that has others for several time steps or positions."""
    axes = (size for size in use.shape[::-1] if size > 1 and size in embeddings)
    return None if use.is_vector else next(axes, None)


@dataclass(frozen=True)
class HeadRoles:
    """Roles between the last addition and the output."""

    graph: Graph
    ops: tuple[Op, ...]
    embeddings: frozenset[int]  # dimensions of streams
    norms: frozenset[Op] = frozenset()  # norms after the last addition, if those on the stream compound
    repeats: int = 0  # how many norms the stream goes through

    def place(self, use: Use) -> Placed | Unplaced:
        """Role of a parameter at one use."""
        if use.kind in ("matrix", "bias"):
            role = Role.READOUT if use.op in self._readouts else Role.STREAM_MATRIX
            if use.kind == "bias":
                return Placed(BIAS_ROLES[role])
            return Placed(role, Variant.IN_HEAD if role is Role.STREAM_MATRIX else None)
        if use.kind == "lookup":
            return Unplaced("it is a table that is looked up after the last addition")
        coordinates = _coordinates(use, self.embeddings)
        if not use.is_vector and coordinates is None:
            return Unplaced(f"it enters {use.op.name} with shape {list(use.shape)} after the last addition")
        if self._matrices_before.of(use.op) & self._readouts:
            return Placed(Role.READOUT_BIAS)
        return _compounding(use, coordinates, self.norms, self.repeats)

    @cached_property
    def _readouts(self) -> frozenset[Op]:
        matrices = [op for op in self.ops if self.graph.is_matrix(op)]
        feeding = frozenset[Op]().union(*map(self._matrices_before.of, matrices))
        return frozenset(op for op in matrices if op not in feeding and not self._is_pooler(op))

    def _is_pooler(self, op: Op) -> bool:
        """Whether it is a square matrix with an activation, which transforms the stream, as BERT's pooler does.

        A cap on logits, c·tanh(x/c), is none.
        """
        inputs, outputs = self.graph.matrices(op)[0].fans
        activations = (o for o in self.ops if o.name in ("Tanh", "Gelu", "Relu", "Silu"))
        reading = (o.data[0] for o in activations if o.data[0].source is op)
        return inputs == outputs and any(not is_multiplied(operand, op) for operand in reading)

    @cached_property
    def _matrices_before(self) -> Ancestry:
        return Ancestry(self.graph, self.ops)
