"""Find out what every parameter of a module is for, from the autograd graph of one forward pass."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from mlu_lightning.graph import Graph, Op, Use, build_graph
from mlu_lightning.logits import own_scale
from mlu_lightning.placement import BranchPlacement, HeadPlacement, StemPlacement, TrunkPlacement, fans
from mlu_lightning.regions import Regions, find_regions
from mlu_lightning.rehearsal import rehearse
from mlu_lightning.rules import Role
from mlu_lightning.sites import Sites
from mlu_lightning.structure import Branch, ParameterFacts, Readout, Site, Stream, Structure, Tap
from mlu_lightning.taps import Taps

__all__ = ["discover"]


def discover(module: nn.Module, example: Any = None) -> Structure:
    """Find the residual streams and branches of a module and the role of every parameter.

    One forward pass is run on a copy of the module whose tensors have shapes but no memory; then autograd's graph is
    walked back. Residual additions are those whose one operand goes into the other through a parameter matrix.

    Args:
        module: a LightningModule, or any other module.
        example: what ``training_step`` takes as its batch for a LightningModule; the arguments of ``forward`` (a
            tensor, a tuple, or a mapping of keyword arguments) for any other module. By default the
            ``example_input_array`` of a LightningModule, on which its ``forward`` is run.

    Returns:
        The structure. Parameters that could not be placed are in its ``unassigned``, with what was found around them.

    Raises:
        ValueError: if the module has no residual branches, or there is no example.

    >>> class Residual(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.embed, self.readout = nn.Linear(3, 8), nn.Linear(8, 2)
    ...         self.branch = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    ...     def forward(self, x):
    ...         h = self.embed(x)
    ...         return self.readout(h + self.branch(h))
    >>> import torch
    >>> structure = discover(Residual(), torch.ones(1, 3))
    >>> structure.depth, structure.embedding, structure.branches[0].name, structure.branches[0].hidden
    (1, 8, 'branch', 16)
    >>> structure.roles["branch.0.weight"].value, structure.roles["readout.bias"].value
    ('branch_in', 'readout_bias')
    """
    rehearsal = rehearse(module, example)
    graph = build_graph(rehearsal)
    regions = find_regions(graph)
    if not regions.branches:
        raise ValueError(
            f"{type(module).__name__} has no residual branches: no tensor is added to another one that it was computed "
            "from through a weight matrix. The MLU parameterization is one of residual networks; if the module is one, "
            "check that the example runs its residual blocks."
        )
    spots, depths = _spots(graph, regions)
    uses = _placed_uses(graph, spots)
    parameters = {
        name: _facts(name, tuple(parameter.shape), uses[name]) for name, parameter in module.named_parameters()
    }
    sites = Sites(rehearsal, graph)
    branches = tuple(_branch(named, sites) for named in _named_branches(spots, uses))
    readouts = tuple(_readouts(uses, sites))
    embeddings = [0 for _ in depths]
    for spot in spots:
        if isinstance(spot.placement, BranchPlacement):
            embeddings[spot.stream] = spot.placement.region.addition.shape[-1]
    for facts in parameters.values():
        if facts.role is Role.BRANCH_OUT:
            embeddings[facts.stream] = facts.fan_out  # the channels of a convolution are not its last dimension
    return Structure(
        parameters=parameters,
        branches=branches,
        streams=tuple(map(Stream, depths, embeddings)),
        readouts=readouts,
        taps=tuple(_taps(Taps(rehearsal, graph, _multiplied(branches, readouts)), len(depths), readouts, spots, uses)),
        unassigned={name: _why(uses[name]) for name, facts in parameters.items() if facts.role is None},
        warnings=tuple(_warnings(regions, parameters, uses)),
    )


@dataclass(frozen=True, eq=False)
class _Spot:
    """A region of the graph and the rules for roles in it."""

    ops: tuple[Op, ...]
    placement: BranchPlacement | StemPlacement | TrunkPlacement | HeadPlacement
    stream: int
    branch: int | None = None
    position: int | None = None


@dataclass(frozen=True)
class _PlacedUse:
    """One use of a parameter, where it is, and its role there or why it has none."""

    use: Use
    spot: _Spot
    role: Role | None
    reason: str = ""


def _spots(graph: Graph, regions: Regions) -> tuple[list[_Spot], list[int]]:
    """Regions in the order in which they are looked at, and the depth of every stream.

    A branch that is called again, in a second forward pass or at another depth, is one branch, and the streams of
    several forward passes are one stream.
    """
    placements = [BranchPlacement(graph, region) for region in regions.branches]
    groups: dict[tuple[str, ...], int] = {}
    numbers = [groups.setdefault(_matrix_names(placement), len(groups)) for placement in placements]
    stream_of_group: dict[int, int] = {}
    merged: dict[int, int] = {}
    for number, region in zip(numbers, regions.branches, strict=True):
        merged.setdefault(region.stream, stream_of_group.setdefault(number, region.stream))
    kept = sorted(set(merged.values()))
    streams = {old: kept.index(new) for old, new in merged.items()}

    spots = [
        _Spot(region.ops, placement, streams[region.stream], number, region.position)
        for number, region, placement in zip(numbers, regions.branches, placements, strict=True)
    ]
    post_norms: list[bool] = []
    for stream, (stem, trunk) in enumerate(zip(regions.stems, regions.trunks, strict=True)):
        norms = sum(1 for op in trunk for use in graph.uses.get(op.index, ())[:1] if use.kind in ("norm", "mul"))
        # post-norm streams have a norm after every addition; a few, where stages meet, do not compound
        post_norms.append(norms > 0 and 2 * norms >= regions.depths[stream] - 1)
        spots.append(_Spot(stem, StemPlacement(graph, stem), streams[stream]))
        spots.append(_Spot(trunk, TrunkPlacement(post_norms[stream]), streams[stream]))
        spots.append(_Spot(regions.shortcuts[stream], TrunkPlacement(post_norm=False), streams[stream]))
    spots.append(_Spot(regions.head, HeadPlacement(graph, regions.head, post_norms[0]), 0))
    return spots, [regions.depths[old] for old in kept]


def _placed_uses(graph: Graph, spots: list[_Spot]) -> defaultdict[str, list[_PlacedUse]]:
    """All uses of every parameter with their roles."""
    placed: defaultdict[str, list[_PlacedUse]] = defaultdict(list)
    for spot in spots:
        for op in spot.ops:
            for use in graph.uses.get(op.index, ()):
                found = spot.placement.role(use)
                if use.kind == "matrix" and use.shared:
                    found = "it is combined with other parameters before it meets data"
                if isinstance(found, Role):
                    placed[use.parameter].append(_PlacedUse(use, spot, found))
                else:
                    placed[use.parameter].append(_PlacedUse(use, spot, None, found))
    return placed


def _facts(name: str, shape: tuple[int, ...], uses: list[_PlacedUse]) -> ParameterFacts:
    """Where a parameter sits, from all its uses."""
    roles = {placed.role for placed in uses}
    tied = roles == {Role.EMBEDDING, Role.READOUT}
    if len(roles) != 1 and not tied:
        return ParameterFacts(name, None, shape, *_plain_fans(shape))
    placed = next(u for u in uses if not tied or u.role is Role.EMBEDDING)
    use, spot, role = placed.use, placed.spot, placed.role
    fan_in, fan_out = fans(use)
    head_dim = 1
    if isinstance(spot.placement, BranchPlacement) and spot.placement.attention is not None:
        attention = spot.placement.attention
        if role is Role.BRANCH_OUT:
            head_dim = attention.value_dim
        elif role is Role.BRANCH_IN or (role is Role.BRANCH_IN_BIAS and fan_out != spot.placement.hidden):
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
    )


def _plain_fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Inputs and outputs of a parameter about which only its shape is known, stored as ``nn.Linear`` does."""
    return (shape[1], shape[0]) if len(shape) > 1 else (1, math.prod(shape))


def _why(uses: list[_PlacedUse]) -> str:
    """What was found around a parameter that could not be placed."""
    if not uses:
        return "it took no part in the forward pass of the example"
    reasons = list(dict.fromkeys(u.reason for u in uses if u.role is None))
    if reasons:
        return "; ".join(reasons)
    return "it is used as " + " and as ".join(dict.fromkeys(str(u.role) for u in uses))


@dataclass(frozen=True)
class _NamedBranch:
    """One branch, wherever it is called."""

    name: str
    parameters: tuple[str, ...]
    calls: tuple[_Spot, ...]


def _named_branches(spots: list[_Spot], uses: dict[str, list[_PlacedUse]]) -> list[_NamedBranch]:
    """Every branch with its name and parameters, in order."""
    members: dict[int, list[str]] = defaultdict(list)
    for name, placed in uses.items():
        for branch in dict.fromkeys(u.spot.branch for u in placed):
            if branch is not None:
                members[branch].append(name)
    calls: dict[int, list[_Spot]] = defaultdict(list)
    for spot in spots:
        if spot.branch is not None:
            calls[spot.branch].append(spot)
    named: dict[str, _NamedBranch] = {}
    for branch, of_branch in calls.items():
        placement = of_branch[0].placement
        assert isinstance(placement, BranchPlacement)
        matrices = _matrix_names(placement)
        name = _common_module(matrices)
        if name in named:
            name = matrices[-1].rpartition(".")[0]
        named[name] = _NamedBranch(name, tuple(members[branch]), tuple(of_branch))
    return list(named.values())


def _matrix_names(placement: BranchPlacement) -> tuple[str, ...]:
    return tuple(use.parameter for op in placement.matrices for use in placement.graph.matrices(op))


def _branch(branch: _NamedBranch, sites: Sites) -> Branch:
    spot = branch.calls[0]
    placement = spot.placement
    assert isinstance(placement, BranchPlacement)
    attention = placement.attention
    writers = [use.parameter for op in placement.writers for use in placement.graph.matrices(op)]
    owner = writers[-1].rpartition(".")[0] if writers else branch.name
    ends = [call.placement.region.end for call in branch.calls if isinstance(call.placement, BranchPlacement)]
    return Branch(
        name=branch.name,
        kind=placement.kind,
        hidden=placement.hidden,
        stream=spot.stream,
        position=placement.region.position,
        parameters=branch.parameters,
        site=sites.branch(ends, branch.name, owner),
        folds=sites.folds(ends),
        head_dim=None if attention is None else attention.key_dim,
        logits=None if attention is None else sites.logits(attention, len(ends)),
        logits_scale=None
        if attention is None
        else own_scale(attention, spot.ops, sites.graph, sites.rehearsal.scalars),
    )


def _readouts(uses: dict[str, list[_PlacedUse]], sites: Sites) -> Iterator[Readout]:
    """Every readout matrix, wherever it is used."""
    for name, placed in uses.items():
        reads = [u for u in placed if u.role is Role.READOUT and u.use.kind == "matrix"]
        if reads:
            site = sites.readout([u.use.op for u in reads])
            alone = len(reads) == len(placed) and all(u.use.homogeneous for u in reads)
            yield Readout(name, reads[0].spot.stream, site, (name,) if alone else (), fans(reads[0].use)[0])


def _multiplied(branches: tuple[Branch, ...], readouts: tuple[Readout, ...]) -> frozenset[Site]:
    """Where multipliers may be attached."""
    sites = [branch.site for branch in branches] + [readout.site for readout in readouts]
    sites += [branch.logits.site for branch in branches if branch.logits is not None]
    return frozenset(site for site in sites if site is not None)


def _taps(
    taps: Taps, streams: int, readouts: tuple[Readout, ...], spots: list[_Spot], uses: dict[str, list[_PlacedUse]]
) -> Iterator[Tap]:
    """Where streams, then readouts can be read."""
    for number in range(streams):
        placements = (spot.placement for spot in spots if spot.stream == number)
        yield from taps.stream(number, (p for p in placements if isinstance(p, BranchPlacement)))
    biases = {
        u.use.op for placed in uses.values() for u in placed if u.role is Role.READOUT_BIAS and u.use.kind == "add"
    }
    for number, readout in enumerate(readouts):
        matrices = [u.use.op for u in uses[readout.parameter] if u.role is Role.READOUT and u.use.kind == "matrix"]
        tap = taps.readout(number, matrices, biases)
        if tap is not None:
            yield tap


def _common_module(names: tuple[str, ...]) -> str:
    """Longest module name that parameters share."""
    modules = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for parts in zip(*modules, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _warnings(
    regions: Regions, parameters: dict[str, ParameterFacts], uses: dict[str, list[_PlacedUse]]
) -> Iterator[str]:
    """What the theory does not cover."""
    if any(facts.role is Role.POST_NORM for facts in parameters.values()):
        yield (
            "the stream is normalized after its additions (post-norm), which the theory does not cover: the learning "
            "rates of these norms are divided by the depth ratio, because their effects compound"
        )
    shared = [
        name
        for name, placed in uses.items()
        if len({u.spot.position for u in placed if u.use.kind == "matrix" and u.spot.branch is not None}) > 1
    ]
    if shared:
        yield (
            "weights shared across depth are not covered by the theory, they are planned as if each use were its own: "
            + ", ".join(shared)
        )
    if regions.nested:
        yield f"{regions.nested} residual additions inside other residual branches are taken for parts of these"
