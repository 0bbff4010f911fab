"""Find out what every parameter of a module is for, from the autograd graph of one forward pass."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from mlu_lightning.discovery.attention import own_scale
from mlu_lightning.discovery.branch_roles import BranchRoles
from mlu_lightning.discovery.constants import Constants
from mlu_lightning.discovery.copies import find_copies
from mlu_lightning.discovery.feature_taps import FeatureTaps
from mlu_lightning.discovery.forward_graph import build_graph
from mlu_lightning.discovery.graph import UseKind
from mlu_lightning.discovery.multiplier_sites import MultiplierSites
from mlu_lightning.discovery.outer_roles import Unplaced
from mlu_lightning.discovery.parameter_facts import (
    PlacedUse,
    Region,
    Uses,
    find_regions,
    likely_role,
    parameter_facts,
    place_uses,
)
from mlu_lightning.discovery.residual import partition
from mlu_lightning.discovery.stream_taps import StreamTaps
from mlu_lightning.discovery.structure import Branch, ParameterFacts, Readout, Stream, Structure, Tap, WeightFunction
from mlu_lightning.discovery.summed import find_sums
from mlu_lightning.discovery.trace import trace_module
from mlu_lightning.discovery.uncovered import (
    require_no_reentrance,
    require_recurrence_in_branches,
    require_residual_branches,
    require_sums,
    warnings_about,
)
from mlu_lightning.discovery.weight_functions import has_functions, matrices_of_constants, with_functions
from mlu_lightning.table import Role, row_name
from mlu_lightning.utilities.garbage import collected_later
from mlu_lightning.utilities.names import common_module, original_module, owner_of, planned_parameters


def discover(module: nn.Module, example: Any = None) -> Structure:
    """Find the residual streams and branches of a module and the role of every parameter.

    One forward pass is run on a copy of the module whose tensors have shapes but no memory; then autograd's graph is
    walked back. Residual additions are those whose one operand goes into the other through a parameter matrix.
    Parameters that could not be placed are in ``unassigned``, with what was found around them.

    Args:
        module: LightningModule, or any other module.
        example: batch of a LightningModule's ``training_step``, by default its ``example_input_array`` for ``forward``;
            arguments of any other module's ``forward``: a tensor, a tuple, or a mapping of keyword arguments.

    Raises:
        ValueError: no example, no residual branches, recurrent layers outside of them, parts that autograd does not show or
            that cannot be copied.

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
    with collected_later():
        return _structure(original_module(module), example)


def _structure(module: nn.Module, example: Any) -> Structure:
    trace = trace_module(module, example)
    graph = build_graph(trace)
    if has_functions(graph):
        trace = trace_module(module, example, programs=True)
        graph = with_functions(build_graph(trace), trace)
        constants = matrices_of_constants(graph)
        graph = with_functions(build_graph(trace, constants), trace) if constants else graph
    require_no_reentrance(module, graph)
    parts = partition(graph)
    require_residual_branches(module, parts)
    require_recurrence_in_branches(module, graph, parts)
    require_sums(module, graph, parts)
    regions, depths = find_regions(graph, parts)
    factors = Constants(graph, parts.branches)
    summed = find_sums(graph, parts, factors, trace.constants)
    uses = place_uses(graph, regions, summed.marks)
    shapes = {name: tuple(parameter.shape) for name, parameter in planned_parameters(module).items()}
    idle = _idle_experts(shapes, uses)
    uses |= {name: uses[sibling] for name, sibling in idle.items()}
    parameters = {name: _facts(name, shape, uses[name], factors) for name, shape in shapes.items()}
    sites = MultiplierSites(trace, graph, frozenset().union(*(branch.ops for branch in parts.branches)))
    named = _named_branches(regions, uses)
    members: dict[int | None, list[str]] = defaultdict(list)
    for name, placed in uses.items():
        for number in {u.region.number for u in placed}:
            members[number].append(name)
    branches = tuple(
        _branch(name, calls, members[calls[0].number], sites, factors, idle, parameters)
        for name, calls in named.items()
    )
    readouts = tuple(_readouts(uses, sites, factors))
    sums = {branch.addition: branch.before for branch in parts.branches}
    multiplied = {branch.site for branch in branches} | {readout.site for readout in readouts}
    multiplied |= {branch.logits.site for branch in branches if branch.logits is not None}
    roots = frozenset(branch.root for branch in parts.branches)
    taps = StreamTaps(trace, graph, sums, roots, frozenset(filter(None, multiplied)), factors)
    along = [[r.branch for r in regions if r.branch is not None and r.stream == i] for i in range(len(depths))]
    streams = tuple(Stream(depth, taps.dimension(calls)) for depth, calls in zip(depths, along, strict=True))
    branches = tuple(
        replace(branch, hidden=streams[branch.stream].embedding) if branch.kind == "mixing" else branch
        for branch in branches
    )
    return Structure(
        parameters=parameters,
        branches=branches,
        streams=streams,
        readouts=readouts,
        taps=tuple(_taps(taps, along, readouts, uses)),
        features=FeatureTaps(trace, graph).branches(map(_calls, named.values())),
        unassigned={name: _why_unassigned(uses[name]) for name, facts in parameters.items() if facts.role is None},
        additions=summed.bare,
        copies=find_copies(module, {name for name, facts in parameters.items() if facts.role is Role.FROZEN}),
        warnings=tuple(warnings_about(parts, regions, factors, {f.variant for f in parameters.values()}, [*idle])),
    )


def _facts(name: str, shape: tuple[int, ...], uses: list[PlacedUse], constants: Constants) -> ParameterFacts:
    """What is found about a parameter; a readout's constants are its multiplier's."""
    facts = parameter_facts(name, shape, uses)
    function: WeightFunction | None = facts.function
    constant: float | None = 1.0
    if facts.role is not Role.READOUT and (function is None or facts.role is not Role.READOUT_BIAS):
        own = (u.use for u in uses if not facts.tied or u.found.role is facts.role)
        constant = constants.of_parameter(own)
    if function is not None and function.problem is None:
        constant = (constant or 1.0) * function.size() / function.size(name)
    return replace(facts, constant=constant, likely=likely_role(uses) if facts.role is None else None)


def _calls(regions: Iterable[Region]) -> list[BranchRoles]:
    return [region.branch for region in regions if region.branch is not None]


def _named_branches(regions: list[Region], uses: Uses) -> dict[str, list[Region]]:
    """The calls of every branch by its name, in order."""
    called: dict[int | None, list[Region]] = defaultdict(list)
    for region in regions:
        called[region.number].append(region)
    called.pop(None, None)
    named: dict[str, list[Region]] = {}
    last = (_calls(of_branch)[0].names[-1:] for of_branch in called.values())
    owners = Counter(owner_of(name) for names in last for name in names)
    for of_branch in called.values():
        first, matrices = of_branch[0], _calls(of_branch)[0].names
        if not matrices:
            named[f"mixing.{len(named)}"] = of_branch
            continue
        roles = {name: next((u.found.role for u in uses[name] if u.region is first), None) for name in matrices}
        # if another branch has that name, gates of this one and then all but what it writes with are left out
        units = [name for name in matrices if roles[name] is not Role.BRANCH_BOUNDED_MATRIX]
        names = [common_module(matrices), common_module(units), owner_of(matrices[-1])]
        names = names if owners[names[-1]] == 1 else [matrices[-1]]  # lists of parameters have no module for each
        named[next((name for name in names if name not in named), names[-1])] = of_branch
    return named


def _branch(
    name: str,
    regions: list[Region],
    parameters: list[str],
    sites: MultiplierSites,
    constants: Constants,
    idle: dict[str, str],
    order: Iterable[str],
) -> Branch:
    calls = _calls(regions)
    first, attention = calls[0], calls[0].attention
    owner = owner_of(first.writer_names[-1]) if first.writers else name
    ends = [call.region.end for call in calls]
    folds = sites.folds(ends)
    if idle:  # which of the experts that is depends on the example, and the order must not
        folds = tuple(name for name in order if name in folds or idle.get(name) in folds)
    place, site = (regions[0].stream, first.region.position), sites.branch(ends, name, owner)
    branch = Branch(name, first.kind, first.hidden, *place, tuple(parameters), site, folds, constants.of_branch(ends))
    if attention is None:
        return replace(branch, head_dim=first.head_dim)
    scale = own_scale(attention, first.region.ops, sites.graph)
    return replace(branch, head_dim=attention.key_dim, logits=sites.logits(attention, len(ends)), logits_scale=scale)


def _readouts(uses: Uses, sites: MultiplierSites, constants: Constants) -> Iterator[Readout]:
    for name, placed in uses.items():
        reads = _used_as(placed, Role.READOUT, "matrix")
        if reads:
            site = sites.readout([u.use.op for u in reads])
            function = reads[0].use.function
            carrier = name if function is None or function.gain is None else function.gain
            alone = len(reads) == len(uses[carrier]) and all(u.use.homogeneous for u in uses[carrier])
            folds = (carrier,) if alone else ()
            constant = constants.of_parameter(u.use for u in reads)
            gains = () if alone else sites.gains([u.use.op for u in reads])
            yield Readout(name, reads[0].region.stream, site, folds, reads[0].use.fans[0], constant, gains)


def _used_as(uses: list[PlacedUse], role: Role, kind: UseKind) -> list[PlacedUse]:
    return [u for u in uses if u.found.role is role and u.use.kind == kind]


def _taps(taps: StreamTaps, along: list[list[BranchRoles]], readouts: tuple[Readout, ...], uses: Uses) -> Iterator[Tap]:
    """Taps of streams, from the calls of branches along each, then of readouts."""
    for number, branches in enumerate(along):
        yield from taps.stream(number, branches)
    biases = {u.use.op for placed in uses.values() for u in _used_as(placed, Role.READOUT_BIAS, "add")}
    for number, readout in enumerate(readouts):
        matrices = [u.use.op for u in _used_as(uses[readout.parameter], Role.READOUT, "matrix")]
        tap = taps.readout(number, matrices, biases)
        if tap is not None:
            yield tap


def _why_unassigned(uses: list[PlacedUse]) -> str:
    reasons = dict.fromkeys(u.found.reason for u in uses if isinstance(u.found, Unplaced))
    rows = (row_name(u.found.role, u.found.variant) for u in uses if u.found.role is not None)
    return "; ".join(reasons) or "it is used as " + " and as ".join(dict.fromkeys(rows))


def _idle_experts(shapes: dict[str, tuple[int, ...]], uses: Uses) -> dict[str, str]:
    """Parameters of experts that no token of the example was sent to, each with its sibling in another expert."""
    busy: dict[str, str] = {}
    for name, placed in uses.items():
        if any(u.region.branch is not None and u.region.branch.is_expert(u.use.op) for u in placed):
            busy |= dict.fromkeys(_patterns(name), name)
    idle = (name for name in shapes if not uses.get(name))
    siblings = ((name, next(filter(None, map(busy.get, _patterns(name))), "")) for name in idle)
    return {name: sibling for name, sibling in siblings if shapes.get(sibling) == shapes[name]}


def _patterns(name: str) -> list[str]:
    """A name without one of its numbers, the last one first, which is that of an expert and not of its block."""
    numbers = reversed(list(re.finditer(r"\d+(?=\.)", name)))
    return [f"{name[: number.start()]}*{name[number.end() :]}" for number in numbers]
