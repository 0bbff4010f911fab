"""Find out what every parameter of a module is for, from the autograd graph of one forward pass."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from mlu_lightning.discovery.attention import own_scale
from mlu_lightning.discovery.coordinate_axes import coordinate_axes
from mlu_lightning.discovery.feature_taps import FeatureTaps
from mlu_lightning.discovery.graph import Graph, Op, build_graph
from mlu_lightning.discovery.multiplier_sites import Sites
from mlu_lightning.discovery.placement import BranchPlacement, fans
from mlu_lightning.discovery.recurrence import find_recurrence
from mlu_lightning.discovery.residual import Regions, find_regions
from mlu_lightning.discovery.roles import PlacedUse, Spot, find_spots, parameter_facts, place_uses, why_unassigned
from mlu_lightning.discovery.stream_taps import Taps
from mlu_lightning.discovery.structure import Branch, ParameterFacts, Readout, Site, Stream, Structure, Tap
from mlu_lightning.discovery.trace import rehearse
from mlu_lightning.table import Role, Variant
from mlu_lightning.utilities.names import planned_parameters

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
        ValueError: if the module has no residual branches, or recurrent ones, or parts that autograd does not show, or
            there is no example.

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
    _require_no_reentrance(module, graph)
    regions = find_regions(graph)
    if not regions.branches:
        raise ValueError(
            f"{type(module).__name__} has no residual branches: no tensor is added to another one that it was computed "
            "from through a weight matrix. The MLU parameterization is one of residual networks; if the module is one, "
            "check that the example runs its residual blocks."
        )
    _require_no_recurrence(module, graph, regions)
    spots, depths = find_spots(graph, regions)
    uses = place_uses(graph, spots)
    shapes = {name: tuple(parameter.shape) for name, parameter in planned_parameters(module).items()}
    idle = _idle_experts(shapes, uses)
    uses |= {name: uses[sibling] for name, sibling in idle.items()}
    parameters = {name: parameter_facts(name, shape, uses[name]) for name, shape in shapes.items()}
    sites = Sites(rehearsal, graph)
    named = _named_branches(spots, uses)
    branches = tuple(_branch(one, sites, idle) for one in named)
    readouts = tuple(_readouts(uses, sites))
    additions = {region.addition: region.before for region in regions.branches}
    axes = coordinate_axes(graph, additions)
    embeddings = [0 for _ in depths]
    for spot in spots:
        if isinstance(spot.placement, BranchPlacement):
            last = spot.placement.region.addition
            embeddings[spot.stream] = last.shape[axes.get(last, -1)]
    taps = Taps(rehearsal, graph, additions, _multiplied(branches, readouts))
    return Structure(
        parameters=parameters,
        branches=branches,
        streams=tuple(map(Stream, depths, embeddings)),
        readouts=readouts,
        taps=tuple(_taps(taps, len(depths), readouts, spots, uses)),
        features=tuple(_features(FeatureTaps(rehearsal, graph), named)),
        unassigned={name: why_unassigned(uses[name]) for name, facts in parameters.items() if facts.role is None},
        warnings=tuple(_warnings(regions, parameters, spots, uses, idle)),
    )


def _require_no_reentrance(module: nn.Module, graph: Graph) -> None:
    """Refuse activation checkpointing that runs a part without a graph until gradients are needed."""
    if any(op.name == "CheckpointFunction" for op in graph.ops):
        raise ValueError(
            f"{type(module).__name__} uses reentrant activation checkpointing, inside of which nothing can be seen in the "
            "forward pass. Give use_reentrant=False to torch.utils.checkpoint.checkpoint, which the module then trains "
            'with, too (gradient_checkpointing_kwargs={"use_reentrant": False} of a Hugging Face model), or switch '
            "checkpointing on after the module was planned, and give MLUCallback(plan=...)."
        )


def _require_no_recurrence(module: nn.Module, graph: Graph, regions: Regions) -> None:
    found: dict[str, str] = {}
    for region in regions.branches:
        how = find_recurrence(graph, region.ops)
        if how is not None:
            names = tuple(use.parameter for op in region.ops for use in graph.matrices(op))
            found.setdefault(_common_module(names), how)
    if found:
        first, *others = found
        more = f" and {len(others)} more" if others else ""
        raise ValueError(
            f"{type(module).__name__} has recurrent or state-space branches, which the theory does not cover: "
            f"{first or 'the module itself'}{more} ({found[first]}). There are no numbers to plan it by: the MLU "
            "parameterization is one of residual branches whose units do not feed back into themselves from token to "
            "token, such as perceptrons, attention and convolutions."
        )


@dataclass(frozen=True)
class _NamedBranch:
    """One branch, wherever it is called."""

    name: str
    parameters: tuple[str, ...]
    calls: tuple[Spot, ...]


def _named_branches(spots: list[Spot], uses: dict[str, list[PlacedUse]]) -> list[_NamedBranch]:
    """Every branch with its name and parameters, in order."""
    members: dict[int, list[str]] = defaultdict(list)
    for name, placed in uses.items():
        for branch in dict.fromkeys(u.spot.branch for u in placed):
            if branch is not None:
                members[branch].append(name)
    calls: dict[int, list[Spot]] = defaultdict(list)
    for spot in spots:
        if spot.branch is not None:
            calls[spot.branch].append(spot)
    named: dict[str, _NamedBranch] = {}
    for branch, of_branch in calls.items():
        placement = of_branch[0].placement
        assert isinstance(placement, BranchPlacement)
        matrices = placement.matrix_names
        # beside another branch of that name, gates of this one and then all but what it writes with are left out
        units = tuple(u for u in matrices if _role_in(placement, uses[u]) is not Role.BRANCH_BOUNDED_MATRIX)
        names = [_common_module(matrices), _common_module(units), matrices[-1].rpartition(".")[0]]
        name = next((name for name in names if name not in named), names[-1])
        named[name] = _NamedBranch(name, tuple(members[branch]), tuple(of_branch))
    return list(named.values())


def _role_in(placement: BranchPlacement, uses: list[PlacedUse]) -> Role | None:
    """Role of a parameter in a branch."""
    return next((u.role for u in uses if u.spot.placement is placement), None)


def _branch(branch: _NamedBranch, sites: Sites, idle: dict[str, str]) -> Branch:
    spot = branch.calls[0]
    placement = spot.placement
    assert isinstance(placement, BranchPlacement)
    attention = placement.attention
    writers = [use.parameter for op in placement.writers for use in placement.graph.matrices(op)]
    owner = writers[-1].rpartition(".")[0] if writers else branch.name
    ends = [call.placement.region.end for call in branch.calls if isinstance(call.placement, BranchPlacement)]
    folds = sites.folds(ends)
    return Branch(
        name=branch.name,
        kind=placement.kind,
        hidden=placement.hidden,
        stream=spot.stream,
        position=placement.region.position,
        parameters=branch.parameters,
        site=sites.branch(ends, branch.name, owner),
        folds=folds + tuple(name for name, beside in idle.items() if beside in folds),
        head_dim=None if attention is None else attention.key_dim,
        logits=None if attention is None else sites.logits(attention, len(ends)),
        logits_scale=None
        if attention is None
        else own_scale(attention, spot.ops, sites.graph, sites.rehearsal.scalars),
    )


def _readouts(uses: dict[str, list[PlacedUse]], sites: Sites) -> Iterator[Readout]:
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
    taps: Taps, streams: int, readouts: tuple[Readout, ...], spots: list[Spot], uses: dict[str, list[PlacedUse]]
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


def _features(taps: FeatureTaps, branches: list[_NamedBranch]) -> Iterator[Tap]:
    """Where the pre-activations of branches can be read."""
    for number, branch in enumerate(branches):
        # of several passes through a branch only the first one is read, which need not come first in the graph
        placements = (spot.placement for spot in branch.calls if isinstance(spot.placement, BranchPlacement))
        found = (taps.branch(number, placement) for placement in placements)
        yield from filter(None, [next(filter(None, found), None)])


def _common_module(names: tuple[str, ...]) -> str:
    """Longest module name that parameters share."""
    modules = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for parts in zip(*modules, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _idle_experts(shapes: dict[str, tuple[int, ...]], uses: dict[str, list[PlacedUse]]) -> dict[str, str]:
    """Parameters of experts that no token of the example was sent to, each with that of another expert beside it."""
    others = {
        pattern: name for name, placed in uses.items() if any(map(_is_of_expert, placed)) for pattern in _patterns(name)
    }
    found: dict[str, str] = {}
    for name, shape in shapes.items():
        beside = next((others[pattern] for pattern in _patterns(name) if pattern in others), None)
        if not uses.get(name) and beside is not None and shapes[beside] == shape:
            found[name] = beside
    return found


def _patterns(name: str) -> list[str]:
    """A name without one of its numbers, the last one first, which is that of an expert and not of its block."""
    numbers = reversed(list(re.finditer(r"\d+(?=\.)", name)))
    return [f"{name[: number.start()]}*{name[number.end() :]}" for number in numbers]


def _is_of_expert(placed: PlacedUse) -> bool:
    placement = placed.spot.placement
    return isinstance(placement, BranchPlacement) and placement.is_expert(placed.use.op)


def _warnings(
    regions: Regions,
    parameters: dict[str, ParameterFacts],
    spots: list[Spot],
    uses: dict[str, list[PlacedUse]],
    idle: dict[str, str],
) -> Iterator[str]:
    """What the theory does not cover."""
    if any(facts.variant is Variant.POST_NORM for facts in parameters.values()):
        yield (
            "the stream is normalized after its additions (post-norm), which the theory does not cover: the learning "
            "rates of these norms are divided by the depth ratio, because their effects compound"
        )
    shared = [name for name, placed in uses.items() if _is_shared(placed)]
    if shared:
        yield (
            "weights shared across depth are not covered by the theory, they are planned as if each use were its own: "
            + ", ".join(shared)
        )
    mixtures = [
        _common_module(spot.placement.matrix_names)
        for spot in spots
        if isinstance(spot.placement, BranchPlacement) and spot.placement.is_selection_hidden
    ]
    if mixtures:
        yield (
            "the number of experts that a token is sent to cannot be read in the graph, so that the hidden units of one "
            "expert are counted, which is right as long as that number is the base's: " + ", ".join(mixtures)
        )
    if idle:
        yield (
            "experts that no token of the example was sent to are planned as the experts beside them: "
            + ", ".join(idle)
        )
    if regions.nested:
        yield f"{regions.nested} residual additions inside other residual branches are taken for parts of these"


def _is_shared(uses: list[PlacedUse]) -> bool:
    """Whether a matrix or a table acts at several places along the depth."""
    spots: dict[Op, dict[int | None, Spot]] = defaultdict(dict)
    for placed in uses:
        if placed.use.kind in ("matrix", "lookup") and placed.spot.branch is not None:
            spots[placed.use.op].setdefault(placed.spot.position, placed.spot)
    if len({position for at in spots.values() for position in at}) < 2:
        return False
    return len(spots) > 1 or any(_is_read_again(op, list(at.values())) for op, at in spots.items())


def _is_read_again(op: Op, spots: list[Spot]) -> bool:
    """Whether several branches read the same of what an operation makes, and not parts of their own."""
    common = set(spots[0].ops).intersection(*(spot.ops for spot in spots[1:]))
    made = {op}
    for other in sorted(common, key=lambda other: other.index):
        if any(operand in made for operand in other.data):
            made.add(other)
    seen: set[tuple[Op, int]] = set()
    for spot in spots:
        own = (o for o in spot.ops if o not in common)
        read = {operand for o in own for operand in o.operands if operand is not None and operand[0] in made}
        if seen & read:
            return True
        seen |= read
    return False
