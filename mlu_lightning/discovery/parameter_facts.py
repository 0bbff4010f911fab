"""Every use of a parameter: its region, its role there, and what that says about the parameter."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from mlu_lightning.discovery.branch_roles import BranchRoles
from mlu_lightning.discovery.graph import Graph, Op, Use
from mlu_lightning.discovery.outer_roles import HeadRoles, Placed, StemRoles, TrunkRoles, Unplaced
from mlu_lightning.discovery.residual import Partition
from mlu_lightning.discovery.structure import ParameterFacts
from mlu_lightning.discovery.traversal import in_order
from mlu_lightning.table import Role, Variant

__all__ = ["PlacedUse", "Region", "Uses", "find_regions", "parameter_facts", "place_uses"]

_Roles = BranchRoles | StemRoles | TrunkRoles | HeadRoles


@dataclass(frozen=True, eq=False)
class Region:
    """A region of the graph and the rules for roles in it."""

    ops: tuple[Op, ...]  # in order
    roles: _Roles
    stream: int
    number: int | None = None  # of its branch, None outside of branches
    position: int | None = None  # of the branch along its stream

    @property
    def branch(self) -> BranchRoles | None:
        """The branch that it is, None outside of branches."""
        return self.roles if isinstance(self.roles, BranchRoles) else None


@dataclass(frozen=True)
class PlacedUse:
    """One use of a parameter, its region, and its role there or why it has none."""

    use: Use
    region: Region
    found: Placed | Unplaced


Uses = dict[str, list[PlacedUse]]
"""Uses of parameters by name."""


def find_regions(graph: Graph, partition: Partition) -> tuple[list[Region], list[int]]:
    """Regions in the order in which they are looked at, and the depth of every stream.

    A branch that is called again, in a second forward pass or at another depth, is one branch, and the streams of
    several forward passes are one stream.
    """
    branches = [BranchRoles(graph, region) for region in partition.branches]
    groups: dict[tuple[str, ...], int] = {}
    numbers = [groups.setdefault(branch.matrix_names, len(groups)) for branch in branches]
    stream_of_group: dict[int, int] = {}
    merged: dict[int, int] = {}
    for number, branch in zip(numbers, partition.branches, strict=True):
        merged.setdefault(branch.stream, stream_of_group.setdefault(number, branch.stream))
    kept = sorted(set(merged.values()))
    streams = {old: kept.index(new) for old, new in merged.items()}

    regions = [
        Region(branch.region.ops, branch, streams[branch.region.stream], number, branch.region.position)
        for number, branch in zip(numbers, branches, strict=True)
    ]
    head = in_order(op for stream in partition.streams for op in stream.head)
    for number, stream in enumerate(partition.streams):
        # post-norm streams have a norm after every addition; a few, where stages meet, do not compound
        norms = sum(_is_norm(graph, segment) for segment in stream.trunk)
        post_norm = norms > 0 and 2 * norms >= stream.depth - 1
        parts: list[tuple[tuple[Op, ...], _Roles]] = [
            (stream.stem, StemRoles(graph, stream.stem)),
            *((segment, TrunkRoles(post_norm)) for segment in stream.trunk),
            (stream.shortcuts, TrunkRoles(post_norm=False)),
            (stream.link, TrunkRoles(post_norm)),
            (stream.head, HeadRoles(graph, head, post_norm)),
        ]
        regions += [Region(ops, roles, streams[number]) for ops, roles in parts if ops]
    return regions, [partition.streams[old].depth for old in kept]


def place_uses(graph: Graph, regions: list[Region]) -> defaultdict[str, list[PlacedUse]]:
    """All uses of every parameter with their roles."""
    placed: defaultdict[str, list[PlacedUse]] = defaultdict(list)
    for region in regions:
        for op in region.ops:
            for use in graph.uses.get(op, ()):
                found = region.roles.place(use)
                if use.kind == "matrix" and use.shared:
                    found = Unplaced("it is combined with other parameters before it meets data")
                placed[use.parameter].append(PlacedUse(use, region, found))
    return placed


def parameter_facts(name: str, shape: tuple[int, ...], uses: list[PlacedUse]) -> ParameterFacts:
    """Say where a parameter sits, from all its uses, of which there are none if it took no part."""
    roles = {placed.found.role for placed in uses}
    tied = roles == {Role.EMBEDDING, Role.READOUT}
    norms = {placed.found.variant is Variant.POST_NORM for placed in uses}
    if (len(roles) != 1 and not tied) or len(norms) > 1:
        return ParameterFacts(name, None, shape, *_plain_fans(shape))
    placed = next(u for u in uses if not tied or u.found.role is Role.EMBEDDING)
    use, region, role, branch = placed.use, placed.region, placed.found.role, placed.region.branch
    fan_in, fan_out = use.fans
    head_dim = active = 1
    if branch is not None:
        if use.kind in ("add", "mul", "norm") or (use.kind == "bias" and use.is_section):
            fan_out = use.selected[-1] if branch.is_expert(use.op) else math.prod(use.selected)
        if branch.is_expert(use.op):
            if use.kind == "matrix" and branch.experts is not None and use.selected[0] == branch.experts.number:
                fan_out = math.prod(use.selected[1:]) // fan_in  # of one expert, also where all are one operand
            fan_in, fan_out, active = _of_experts(branch, role, fan_in, fan_out)
        if branch.attention is not None:
            if role is Role.BRANCH_OUT:
                head_dim = branch.attention.value_dim
            elif role is Role.BRANCH_IN or (role is Role.BRANCH_IN_BIAS and fan_out != branch.hidden):
                head_dim = branch.attention.key_dim
    return ParameterFacts(
        name=name,
        role=role,
        shape=shape,
        fan_in=fan_in,
        fan_out=fan_out,
        branch=region.number,
        stream=region.stream,
        transposed=use.stored_inputs_first if use.kind == "matrix" else len(shape) > 1,
        head_dim=head_dim,
        tied=tied,
        active=active,
        variant=placed.found.variant,
    )


def _is_norm(graph: Graph, segment: tuple[Op, ...]) -> bool:
    """Whether a norm with a gain, and no matrix, lies between two additions."""
    kinds = {use.kind for op in segment for use in graph.uses.get(op, ())}
    return bool(kinds & {"norm", "mul"}) and "matrix" not in kinds


def _of_experts(branch: BranchRoles, role: Role | None, fan_in: int, fan_out: int) -> tuple[int, int, int]:
    """Fans of an expert's parameter, and number of experts over which the mixture averages.

    Where outputs of experts are summed, the units of all of them are one hidden layer. Where they are averaged, a matrix
    sums over the units of its own expert alone.
    """
    assert branch.experts is not None
    active = branch.active
    if branch.experts.averaged:
        return fan_in, fan_out, active
    from_units = role in (Role.BRANCH_HIDDEN, Role.BRANCH_OUT)
    to_units = role in (Role.BRANCH_IN, Role.BRANCH_IN_BIAS, Role.BRANCH_HIDDEN)
    return fan_in * (active if from_units else 1), fan_out * (active if to_units else 1), 1


def _plain_fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Inputs and outputs of a parameter about which only its shape is known, stored as ``nn.Linear`` does."""
    return (shape[1], shape[0]) if len(shape) > 1 else (1, math.prod(shape))
