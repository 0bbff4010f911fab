"""Every use of a parameter: its region, its role there, and what that says about the parameter."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from mlu_lightning.discovery.attention import find_attention
from mlu_lightning.discovery.axes import unit_axis
from mlu_lightning.discovery.branch_roles import BranchRoles
from mlu_lightning.discovery.graph import PARTS, TAKEN, Graph, Op, Use
from mlu_lightning.discovery.outer_roles import (
    HeadRoles,
    Placed,
    TrunkRoles,
    Unplaced,
    first_norms,
    keeps_dimension,
    place_for_blocks,
    place_gain,
    place_in_stem,
)
from mlu_lightning.discovery.residual import Partition
from mlu_lightning.discovery.structure import ParameterFacts
from mlu_lightning.discovery.summed import Mark
from mlu_lightning.discovery.traversal import Ancestry, in_order
from mlu_lightning.discovery.units import Units
from mlu_lightning.table import COMPOUNDING, COUNTED, Role, Variant


@dataclass(frozen=True, eq=False)
class Region:
    """A region of the graph and the rules for roles in it."""

    ops: tuple[Op, ...]  # in order
    place: Callable[[Use], Placed | Unplaced]
    stream: int
    branch: BranchRoles | None = None  # the branch that it is, None outside of branches
    number: int | None = None  # of the branch
    position: int | None = None  # along the stream, None before and after its additions


Places = frozenset[tuple[int, int | None]]  # numbers of streams, with positions along them


@dataclass(frozen=True)
class PlacedUse:
    """One use of a parameter, its region, and its role there or why it has none."""

    use: Use
    region: Region
    found: Placed | Unplaced
    read_at: Places = frozenset()  # where along streams what it makes is added first


Uses = dict[str, list[PlacedUse]]  # uses of parameters by name


def find_regions(graph: Graph, partition: Partition) -> tuple[list[Region], list[int]]:
    """Regions in the order in which they are looked at, and the depth of every stream.

    Calls of a branch, which write with one matrix, are one branch, also in several forward passes, whose streams are one.
    """
    branches = [BranchRoles(graph, region) for region in partition.branches]
    number_of: dict[str, int] = {}
    keys = [branch.writer_names or branch.names for branch in branches]
    # without any parameter, as the one before the next branch that has some
    beside = [next(filter(None, (*keys[i:], *keys[:i][::-1])), ()) if not key else () for i, key in enumerate(keys)]
    keys = [key or tuple(f"before {name}" for name in after) for key, after in zip(keys, beside, strict=True)]
    numbers = [_number(key, number_of) for key in keys]
    stream_of_group: dict[int, int] = {}
    merged: dict[int, int] = {}
    for number, branch in zip(numbers, partition.branches, strict=True):
        merged.setdefault(branch.stream, stream_of_group.setdefault(number, branch.stream))
    kept = sorted(set(merged.values()))
    streams = {old: kept.index(new) for old, new in merged.items()}

    regions = [
        Region(branch.region.ops, branch.place, streams[branch.region.stream], branch, number, branch.region.position)
        for number, branch in zip(numbers, branches, strict=True)
    ]
    head = in_order(op for stream in partition.streams for op in stream.head)
    before = ((stream.stem, *(own.ops for own in stream.own)) for stream in partition.streams)
    stems = in_order(op for parts in before for ops in parts for op in ops)
    maps = Ancestry(graph, stems, (op for op in stems if graph.kinds(op) & {"matrix", "lookup"}))
    place = partial(place_in_stem, maps_before=maps, apart=partition.apart)
    dimensions = frozenset(branch.embedding for branch in branches if branch.embedding is not None)
    for number, stream in enumerate(partition.streams):
        # norms between additions compound if there are several: those where stages meet come with a matrix
        segments = [segment for segment in stream.trunk if _is_norm(graph, segment)]
        last = first_norms(graph, stream.head) | first_norms(graph, stream.link)
        several = len(segments) > 1 or (len(segments) == 1 and stream.depth < 4)
        norms = frozenset(op for segment in segments for op in segment) | last if several else frozenset[Op]()
        of_norms = norms, len(segments) + bool(last)
        passed = [op for op in stream.shortcuts if _is_repeatable(graph, op, stream.shortcuts)]
        repeats = len(passed) if 2 * len(passed) >= stream.depth else 0
        along = (use for ops in stream.trunk for op in ops for use in graph.matrices(op))
        square = sum(map(keeps_dimension, along))
        trunk = partial(TrunkRoles, dimensions, *of_norms, matrices=square)
        # of an attention that the stream goes through
        found = [heads for ops in stream.trunk if (heads := _heads(graph, ops, stream.stem)) is not None]
        tables = [op for op in stream.stem if "lookup" in graph.kinds(op)] if found else []
        of_logits = [(heads, tuple(filter(heads.makes_logits, tables))) for heads in found]
        parts: list[tuple[tuple[Op, ...], Callable[[Use], Placed | Unplaced], int | None]] = [
            *((biases, trunk(units=heads).place, None) for heads, biases in of_logits),
            (tuple(op for op in stream.stem if not any(op in biases for _, biases in of_logits)), place, None),
            *((own.ops, partial(place_for_blocks, place, own.repeats), own.position) for own in stream.own),
            *((ops, trunk(units=_heads(graph, ops, stream.stem)).place, at) for at, ops in enumerate(stream.trunk)),
            (stream.link, TrunkRoles(dimensions, *of_norms).place, None),
            (stream.shortcuts, TrunkRoles(dimensions, repeats=repeats, beside=True, matrices=repeats).place, None),
            (stream.head, HeadRoles(graph, head, dimensions, *of_norms).place, None),
        ]
        regions += [Region(ops, place, streams[number], position=at) for ops, place, at in parts if ops]
    return regions, [partition.streams[old].depth for old in kept]


def _heads(graph: Graph, ops: tuple[Op, ...], stem: tuple[Op, ...]) -> Units | None:
    """Heads of an attention outside of branches, as where stages meet; None if there is none."""
    if find_attention(ops, graph) is None:
        return None
    matrices = Ancestry(graph, ops)
    last = [op for op in ops if graph.is_matrix(op)]
    feeding = frozenset[Op]().union(*map(matrices.of, last))
    writers = tuple(op for op in last if op not in feeding)
    return Units(graph, in_order({*ops, *stem}), writers, frozenset())


def _number(writers: tuple[str, ...], number_of: dict[str, int]) -> int:
    """Number of the branch that writes with matrices of these names, which may be a new one."""
    number = min((number_of[name] for name in writers if name in number_of), default=len({*number_of.values()}))
    for name in writers:
        number_of.setdefault(name, number)
    return number


def place_uses(graph: Graph, regions: list[Region], marks: Mapping[Use, Mark]) -> defaultdict[str, list[PlacedUse]]:
    """All uses of every parameter with their roles; ``marks`` are those of summands."""
    placed: defaultdict[str, list[PlacedUse]] = defaultdict(list)
    read_at = _places_that_read(graph, regions)
    regional = ((region, use) for region in regions for op in region.ops for use in graph.uses.get(op, ()))
    for region, use in regional:
        if use.kind == "penalty":
            continue
        if use.kind == "gain" and use.function is not None:
            found = place_gain(region.place(replace(use, kind="matrix")), use.function.along)
        else:
            found = region.place(use)
        if use.kind == "matrix" and use.shared:
            found = Unplaced("it is combined with other parameters before it meets data")
        compounds = found.variant in COMPOUNDING and use in marks and marks[use].variant is Variant.OF_BLOCK
        if isinstance(found, Placed) and not found.role.in_branch and use in marks and not compounds:
            role = Role.EMBEDDING if use.kind == "add" and found.role is Role.STREAM_NORM else found.role
            found = replace(found, role=role, **marks[use]._asdict())
        placed[use.parameter].append(PlacedUse(use, region, found, read_at[use.op]))
    covered = {op for region in regions for op in region.ops}
    outside = Unplaced(
        "it is used outside of all that was found to lead to the stream, along it, in branches, and after it"
    )
    for use in (use for op, uses in graph.uses.items() if op not in covered for use in uses if use.kind != "penalty"):
        # a loss depends on it, so it is not left alone
        placed[use.parameter].append(PlacedUse(use, regions[0], outside))
    for name, of_name in placed.items():
        # a discriminator of outputs, and of data, has the roles that it has on a stream's outputs
        roles = {u.use.kind: u.found for u in of_name if not u.found.apart}
        others = [roles.get(u.use.kind, u.found) if u.found.apart else u.found for u in of_name]
        placed[name] = [
            u if o.role is u.found.role else replace(u, found=o) for u, o in zip(of_name, others, strict=True)
        ]
    return placed


def parameter_facts(name: str, shape: tuple[int, ...], uses: list[PlacedUse]) -> ParameterFacts:
    """Say where a parameter sits, from all its uses, of which there are none if no loss reaches it."""
    uses = _agreeing(uses)
    roles = {placed.found.role for placed in uses}
    tied = roles == {Role.EMBEDDING, Role.READOUT}
    norms = {placed.found.variant in COUNTED for placed in uses}
    function = next((placed.use.function for placed in uses if placed.use.function is not None), None)
    if function is not None and None in roles:
        why = next(placed.found.reason for placed in uses if isinstance(placed.found, Unplaced))
        function = replace(function, problem=function.problem or why)
    mixed_up = len({placed.found.variant for placed in uses} & {Variant.SUMMED, *COMPOUNDING}) > 1
    if (len(roles) != 1 and not tied) or len(norms) > 1 or mixed_up:
        fans = (shape[1], shape[0]) if len(shape) > 1 else (1, math.prod(shape))
        if not uses:
            return ParameterFacts(name, Role.FROZEN, shape, *fans)
        repeats = max((u.found.repeats or 1 for u in uses if isinstance(u.found, Placed)), default=None)
        variants = COMPOUNDING if len(roles) == 1 else {Variant.SUMMED}
        variant = next((u.found.variant for u in uses if u.found.variant in variants), None)
        where = uses[0].region.number, uses[0].region.stream
        return ParameterFacts(name, None, shape, *fans, *where, variant=variant, function=function, repeats=repeats)
    placed = next(u for u in uses if not tied or u.found.role is Role.EMBEDDING)
    use, region, role, branch = placed.use, placed.region, placed.found.role, placed.region.branch
    fan_in, fan_out = use.fans
    head_dim = active = 1
    mixed = False
    if isinstance(placed.found, Placed) and placed.found.outputs is not None:
        fan_out = placed.found.outputs
    elif branch is not None:
        if use.kind in ("add", "mul", "norm") or (use.kind == "bias" and use.is_section):
            fan_out = use.selected[-1] if branch.is_expert(use.op) else math.prod(use.selected)
        elif use.kind == "lookup" and branch.attention is not None:
            fan_out = branch.heads.own(use) or fan_out  # heads, whichever axis they are on
        if branch.is_expert(use.op):
            if use.kind == "matrix" and branch.experts is not None and use.selected[0] == branch.experts.number:
                fan_out = math.prod(use.selected[1:]) // fan_in  # of one expert, also where all are one operand
            fan_in, fan_out, active = _of_experts(branch, role, fan_in, fan_out)
        elif use.kind in ("matrix", "bias") and role in _OF_UNITS and not use.op.is_recurrent_layer:
            heads = branch.hidden if branch.attention is not None and branch.heads_write else 0
            rows, blocks = branch.units.rows(use.op, heads), branch.units.blocks(use)
            mixed = blocks == 1 and 0 < rows < use.op.shape[unit_axis(use.op)]
            fan_out = rows if mixed else fan_out * blocks
        if branch.attention is not None:
            if role is Role.BRANCH_OUT:
                head_dim = branch.attention.value_dim if branch.heads_write else 1
            elif role is Role.BRANCH_IN or (role is Role.BRANCH_IN_BIAS and fan_out != branch.hidden):
                head_dim = branch.attention.key_dim
    transposed = use.stored_inputs_first if use.kind == "matrix" else len(shape) > 1
    place = region.number, region.stream, transposed, head_dim, tied, mixed, active, _places_along_depth(uses)
    repeats = placed.found.repeats if isinstance(placed.found, Placed) else None
    return ParameterFacts(name, role, shape, fan_in, fan_out, *place, None, placed.found.variant, function, repeats)


def likely_role(uses: list[PlacedUse]) -> Role:
    """The most probable role of a parameter that could not be placed: one of those found, or by what it enters."""
    found = [u.found.role for u in uses if u.found.role is not None]
    if found:
        return max(found, key=lambda role: (role is Role.READOUT, not role.in_branch))
    use, region = uses[0].use, uses[0].region
    roles = Role.STREAM_NORM, Role.STREAM_MATRIX
    if region.branch is not None and use.op in region.ops:
        roles = Role.BRANCH_IN_BIAS, Role.BRANCH_HIDDEN
    return roles[use.kind == "matrix"]


def _agreeing(uses: list[PlacedUse]) -> list[PlacedUse]:
    """Uses without those whose role has the same numbers as another one, or counts for less."""
    # a norm that a stream goes through is the stream's, also where a branch of another stream reads its output
    norms = {u.use.op for u in uses if u.region.branch is None and u.found.role is Role.STREAM_NORM}
    uses = [placed for placed in uses if placed.region.branch is None or placed.use.op not in norms]
    # what one block reads, and the head too, has the gradient of the head
    of_all = [placed for placed in uses if placed.found.variant is not Variant.OF_BLOCK]
    uses = of_all if {placed.found.role for placed in of_all} == {placed.found.role for placed in uses} else uses
    roles = {placed.found.role for placed in uses}
    # what is on the stream in every block is on that of the first, which begins with it, too
    along = next((u.found for u in uses if isinstance(u.found, Placed) and u.found.variant in COMPOUNDING), None)
    if along is not None and len(roles) == 1:
        number = sum(u.found.variant is None for u in uses) + (along.repeats or 0)
        same = replace(along, repeats=number)
        uses = [replace(u, found=same) if u.found.variant in (None, along.variant) else u for u in uses]
    if roles == {Role.BRANCH_IN, Role.BRANCH_HIDDEN}:  # in a branch that others have made a part of
        return [placed for placed in uses if placed.found.role is Role.BRANCH_IN]
    if roles == {Role.EMBEDDING, Role.BRANCH_NORM}:  # a table that is read before the first block, and again in each
        return [placed for placed in uses if placed.found.role is Role.EMBEDDING]
    # what makes outputs and another stream, as a mean of latents does, is on the way to that
    onward = {u.use.op for u in uses if u.found.role in (Role.STREAM_MATRIX, Role.STREAM_NORM)}
    if roles in ({Role.STREAM_MATRIX, Role.READOUT}, {Role.STREAM_NORM, Role.READOUT_BIAS}) and onward.issuperset(
        placed.use.op for placed in uses
    ):
        role = Role.STREAM_MATRIX if Role.READOUT in roles else Role.STREAM_NORM
        return [replace(uses[0], found=Placed(role, Variant.IN_HEAD if role is Role.STREAM_MATRIX else None))]
    # data, and what another network makes in their place
    if roles in ({Role.EMBEDDING, Role.STREAM_MATRIX}, {Role.EMBEDDING, Role.STREAM_NORM}):
        return [placed for placed in uses if placed.found.role is Role.EMBEDDING]
    # what is done to data is undone on outputs, as by a reversible norm: vectors over channels
    on_data = {placed.found.role for placed in uses if isinstance(placed.found, Placed) and placed.found.on_data}
    if roles - on_data == {Role.READOUT_BIAS}:
        return [placed for placed in uses if placed.found.role is Role.READOUT_BIAS]
    return uses


def _places_along_depth(uses: list[PlacedUse]) -> int:
    """Number of places along a stream at which a parameter acts: other streams and forward passes add none."""
    summed = Counter[object]()
    acts: set[tuple[object, int, int | None]] = set()
    first: dict[Op, Places] = {}
    for placed in uses:
        if isinstance(placed.found, Placed) and placed.found.places is not None:
            summed[placed.use.part] += placed.found.places
        here = first.setdefault(placed.use.op, frozenset([(placed.region.stream, placed.region.position)]))
        acts.update((placed.use.part, *place) for place in (placed.read_at if placed.region.branch else None) or here)
    return max(summed.values() or Counter((part, stream) for part, stream, _ in acts).values(), default=1)


def _places_that_read(graph: Graph, regions: list[Region]) -> dict[Op, Places]:
    """Positions of the additions, by stream, that each operation leads to before any other; parts lead to their own."""
    added = {r.branch.region.addition: frozenset([(r.stream, r.position)]) for r in regions if r.branch is not None}
    found: dict[Op, Places] = {}
    for op in reversed(graph.ops):
        parts: dict[object, Places] = defaultdict(frozenset)
        for user in graph.users[op]:
            taken = tuple(map(user.saved, TAKEN)) if user.name in PARTS else None
            for output in {number for operand, number in user.values if operand is op}:
                parts[output, taken] |= added.get(user, found[user])
        found[op] = max(parts.values(), key=len, default=frozenset())
    return found


_OF_UNITS = (Role.BRANCH_IN, Role.BRANCH_HIDDEN, Role.BRANCH_IN_BIAS)


def _is_repeatable(graph: Graph, op: Op, beside: tuple[Op, ...]) -> bool:
    """Whether a gain, norm or matrix beside a branch keeps the dimension, so that every block can have one."""
    kinds, fans = graph.kinds(op), [use.fans for use in graph.matrices(op)]
    source = op.data[0].source if op.data else op  # a matrix, where stages of a ResNet meet
    of_stage = "norm" in kinds and graph.is_matrix(source) and source in beside
    return not of_stage and (bool(kinds & {"mul", "norm"}) or any(inputs == outputs for inputs, outputs in fans))


def _is_norm(graph: Graph, segment: tuple[Op, ...]) -> bool:
    """Whether a norm with a gain, and no matrix, lies between two additions."""
    kinds = set().union(*map(graph.kinds, segment))
    return bool(kinds & {"norm", "mul"}) and "matrix" not in kinds


def _of_experts(branch: BranchRoles, role: Role | None, fan_in: int, fan_out: int) -> tuple[int, int, int]:
    """Fans of an expert's parameter, among all experts' units if outputs are summed, and number of experts averaged over."""
    assert branch.experts is not None
    if branch.experts.averaged:
        return fan_in, fan_out, branch.active
    inputs = branch.active if role in (Role.BRANCH_HIDDEN, Role.BRANCH_OUT) else 1
    outputs = branch.active if role in (Role.BRANCH_IN, Role.BRANCH_IN_BIAS, Role.BRANCH_HIDDEN) else 1
    return fan_in * inputs, fan_out * outputs, 1
