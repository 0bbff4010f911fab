"""Every use of a parameter: where it is, the role that it has there, and what that says about the parameter."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from mlu_lightning.discovery.graph import Graph, Op, Use
from mlu_lightning.discovery.placement import BranchPlacement, HeadPlacement, StemPlacement, TrunkPlacement, fans
from mlu_lightning.discovery.residual import Regions
from mlu_lightning.discovery.structure import ParameterFacts
from mlu_lightning.table import Role, Variant, row_name

__all__ = ["PlacedUse", "Spot", "find_spots", "parameter_facts", "place_uses", "why_unassigned"]

_Placement = BranchPlacement | StemPlacement | TrunkPlacement | HeadPlacement


@dataclass(frozen=True, eq=False)
class Spot:
    """A region of the graph and the rules for roles in it.

    Args:
        ops: operations of the region, in order.
        placement: the rules.
        stream: index of its stream.
        branch: number of its branch, None outside branches.
        position: place of the branch along its stream.
    """

    ops: tuple[Op, ...]
    placement: _Placement
    stream: int
    branch: int | None = None
    position: int | None = None


@dataclass(frozen=True)
class PlacedUse:
    """One use of a parameter, where it is, and its role there or why it has none.

    Args:
        use: of a parameter.
        spot: where it is.
        role: what it is there, None if that cannot be told.
        reason: why it cannot.
        variant: what about the place changes the row of the role.
    """

    use: Use
    spot: Spot
    role: Role | None
    reason: str = ""
    variant: Variant | None = None


def find_spots(graph: Graph, regions: Regions) -> tuple[list[Spot], list[int]]:
    """Regions in the order in which they are looked at, and the depth of every stream.

    A branch that is called again, in a second forward pass or at another depth, is one branch, and the streams of
    several forward passes are one stream.

    Args:
        graph: of the forward pass.
        regions: in it.
    """
    placements = [BranchPlacement(graph, region) for region in regions.branches]
    groups: dict[tuple[str, ...], int] = {}
    numbers = [groups.setdefault(placement.matrix_names, len(groups)) for placement in placements]
    stream_of_group: dict[int, int] = {}
    merged: dict[int, int] = {}
    for number, region in zip(numbers, regions.branches, strict=True):
        merged.setdefault(region.stream, stream_of_group.setdefault(number, region.stream))
    kept = sorted(set(merged.values()))
    streams = {old: kept.index(new) for old, new in merged.items()}

    spots = [
        Spot(region.ops, placement, streams[region.stream], number, region.position)
        for number, region, placement in zip(numbers, regions.branches, placements, strict=True)
    ]
    head = tuple(sorted((op for part in regions.heads for op in part), key=lambda op: op.index))
    for stream, segments in enumerate(regions.trunks):
        # post-norm streams have a norm after every addition; a few, where stages meet, do not compound
        norms = sum(_is_norm(graph, segment) for segment in segments)
        post_norm = norms > 0 and 2 * norms >= regions.depths[stream] - 1
        parts: list[tuple[tuple[Op, ...], _Placement]] = [
            (regions.stems[stream], StemPlacement(graph, regions.stems[stream])),
            *((segment, TrunkPlacement(post_norm)) for segment in segments),
            (regions.shortcuts[stream], TrunkPlacement(post_norm=False)),
            (regions.links[stream], TrunkPlacement(post_norm)),
            (regions.heads[stream], HeadPlacement(graph, head, post_norm)),
        ]
        spots += [Spot(ops, placement, streams[stream]) for ops, placement in parts if ops]
    return spots, [regions.depths[old] for old in kept]


def _is_norm(graph: Graph, segment: tuple[Op, ...]) -> bool:
    """Whether a norm with a gain, and no matrix, lies between two additions."""
    kinds = {use.kind for op in segment for use in graph.uses.get(op.index, ())}
    return bool(kinds & {"norm", "mul"}) and "matrix" not in kinds


def place_uses(graph: Graph, spots: list[Spot]) -> defaultdict[str, list[PlacedUse]]:
    """All uses of every parameter with their roles.

    Args:
        graph: of the forward pass.
        spots: regions in it.
    """
    placed: defaultdict[str, list[PlacedUse]] = defaultdict(list)
    for spot in spots:
        for op in spot.ops:
            for use in graph.uses.get(op.index, ()):
                found = spot.placement.role(use)
                if use.kind == "matrix" and use.shared:
                    found = "it is combined with other parameters before it meets data"
                if isinstance(found, Role):
                    placed[use.parameter].append(
                        PlacedUse(use, spot, found, variant=spot.placement.variant(use, found))
                    )
                else:
                    placed[use.parameter].append(PlacedUse(use, spot, None, found))
    return placed


def parameter_facts(name: str, shape: tuple[int, ...], uses: list[PlacedUse]) -> ParameterFacts:
    """Where a parameter sits, from all its uses.

    Args:
        name: of the parameter.
        shape: of it.
        uses: none if it took no part.
    """
    roles = {placed.role for placed in uses}
    tied = roles == {Role.EMBEDDING, Role.READOUT}
    norms = {placed.variant is Variant.POST_NORM for placed in uses}
    if (len(roles) != 1 and not tied) or len(norms) > 1:
        return ParameterFacts(name, None, shape, *_plain_fans(shape))
    placed = next(u for u in uses if not tied or u.role is Role.EMBEDDING)
    use, spot, role = placed.use, placed.spot, placed.role
    fan_in, fan_out = fans(use)
    head_dim = active = 1
    placement = spot.placement
    if isinstance(placement, BranchPlacement):
        if use.kind in ("add", "mul", "norm") or (use.kind == "bias" and use.is_section):
            fan_out = use.taken[-1] if placement.is_expert(use.op) else math.prod(use.taken)
        if placement.is_expert(use.op):
            if use.kind == "matrix" and placement.experts is not None and use.taken[0] == placement.experts.number:
                fan_out = math.prod(use.taken[1:]) // fan_in  # of one expert, also where all are one operand
            fan_in, fan_out, active = _of_experts(placement, role, fan_in, fan_out)
    if isinstance(placement, BranchPlacement) and placement.attention is not None:
        attention = placement.attention
        if role is Role.BRANCH_OUT:
            head_dim = attention.value_dim
        elif role is Role.BRANCH_IN or (role is Role.BRANCH_IN_BIAS and fan_out != placement.hidden):
            head_dim = attention.key_dim
    return ParameterFacts(
        name=name,
        role=role,
        shape=shape,
        fan_in=fan_in,
        fan_out=fan_out,
        branch=spot.branch,
        stream=spot.stream,
        transposed=use.stored_inputs_first if use.kind == "matrix" else len(shape) > 1,
        head_dim=head_dim,
        tied=tied,
        active=active,
        variant=placed.variant,
    )


def _of_experts(placement: BranchPlacement, role: Role | None, fan_in: int, fan_out: int) -> tuple[int, int, int]:
    """Fans of an expert's parameter, and number of experts over which the mixture averages.

    Where outputs of experts are summed, the units of all of them are one hidden layer. Where they are averaged, a matrix
    sums over the units of its own expert alone.
    """
    assert placement.experts is not None
    active = placement.active
    if placement.experts.averaged:
        return fan_in, fan_out, active
    from_units = role in (Role.BRANCH_HIDDEN, Role.BRANCH_OUT)
    to_units = role in (Role.BRANCH_IN, Role.BRANCH_IN_BIAS, Role.BRANCH_HIDDEN)
    return fan_in * (active if from_units else 1), fan_out * (active if to_units else 1), 1


def _plain_fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Inputs and outputs of a parameter about which only its shape is known, stored as ``nn.Linear`` does."""
    return (shape[1], shape[0]) if len(shape) > 1 else (1, math.prod(shape))


def why_unassigned(uses: list[PlacedUse]) -> str:
    """What was found around a parameter that could not be placed.

    Args:
        uses: of it.
    """
    if not uses:
        return "it took no part in the forward pass of the example"
    reasons = list(dict.fromkeys(u.reason for u in uses if u.role is None))
    if reasons:
        return "; ".join(reasons)
    names = (row_name(u.role, u.variant) for u in uses if u.role is not None)
    return "it is used as " + " and as ".join(dict.fromkeys(names))
