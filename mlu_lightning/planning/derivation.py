"""Derive the entries of a plan: compare every stream, parameter, branch and multiplier with the base's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from mlu_lightning.discovery.structure import Branch, ParameterFacts, Structure
from mlu_lightning.planning.base import Base, BaseBranch, BaseParameter, counterparts, own_factors
from mlu_lightning.planning.entries import BranchPlan, Multiplier, ParameterPlan, StreamPlan, constant_ratio
from mlu_lightning.table import COUNTED, TABLES, Parameterization, Ratios, Role, Table
from mlu_lightning.utilities.names import name_pattern


def plan_streams(structure: Structure, base: Base | None) -> tuple[StreamPlan, ...]:
    """Put every stream next to the base's, or next to 1 in the paper's absolute form."""
    shapes = [(1, 1)] * len(structure.streams) if base is None else base.streams
    if len(shapes) != len(structure.streams):
        raise ValueError(
            f"The module has {len(structure.streams)} residual streams and the base {len(shapes)}: they are of different "
            "architecture. Give a base that differs from the module in depth, hidden width or embedding only."
        )
    return tuple(
        StreamPlan(stream.depth, depth, stream.embedding, embedding)
        for stream, (depth, embedding) in zip(structure.streams, shapes, strict=True)
    )


def plan_parameters(
    structure: Structure, base: Base | None, streams: tuple[StreamPlan, ...]
) -> dict[str, ParameterPlan]:
    """Put every parameter, all of which have a role, next to its counterpart, or next to units in the absolute form."""
    found = None if base is None else counterparts(structure, base)
    planned: dict[str, ParameterPlan] = {}
    for name, facts in structure.parameters.items():
        assert facts.role is not None
        if facts.role is Role.FROZEN:
            shape, copy_of = facts.shape, original_of(name, structure.copies)
            planned[name] = ParameterPlan(Role.FROZEN, shape, (1, 1), (1, 1), shape, copy_of=copy_of)
            continue
        if found is None:
            fans = _units(facts, structure)
            of_base = BaseParameter(facts.role, (), (1, 1), _absolute_std(facts), 1, 1, facts.variant, 1.0, 1)
        else:
            fans, of_base = (facts.fan_in, facts.fan_out), found[name]
        stream = streams[facts.stream]
        depths = stream.depth, stream.base_depth
        if COUNTED & {facts.variant, of_base.variant}:
            depths = facts.repeats or 1, of_base.repeats or 1
        sizes = facts.shape, fans, of_base.fans, None if base is None else of_base.shape, of_base.std, *depths
        counts = facts.active, of_base.active, facts.uses, of_base.uses, facts.constant, of_base.constant
        numbers = (*sizes, *counts, None, facts.variant or of_base.variant, facts.branch, facts.transposed, facts.mixed)
        planned[name] = ParameterPlan(facts.role, *numbers)
    return planned


def plan_branches(structure: Structure, base: Base | None) -> tuple[BranchPlan, ...]:
    """Put every branch next to the base's, or next to 1 in the absolute form."""
    planned, found = [], _base_branches(structure, base)
    for branch in structure.branches:
        of_base = found[branch.name] or BaseBranch(1, None, None, 1.0)
        place = branch.name, branch.kind, branch.hidden, of_base.hidden, branch.stream, branch.position
        of_logits = branch.head_dim, of_base.head_dim, branch.logits_scale, of_base.logits_scale
        planned.append(BranchPlan(*place, *of_logits))
    return tuple(planned)


def plan_multipliers(
    structure: Structure,
    base: Base | None,
    parameters: Mapping[str, ParameterPlan],
    streams: tuple[StreamPlan, ...],
    parameterization: Parameterization,
) -> tuple[tuple[Multiplier, ...], tuple[str, ...]]:
    """Look up the factors in the forward pass, with warnings: of branches, readouts, and logits of another head_dim.

    The theory has a bounded head_dim d_k (theory.md, section 3). Where it differs from the base's, logits with a factor c of
    the module's own are multiplied by (base d_k / d_k) / (c / base c), because training correlates queries and keys, so
    that a logit becomes c times a sum of d_k products of one sign; with query-key norm c · d_k bounds it.
    """
    table = TABLES[parameterization]
    constants, of_bases = own_factors(structure, "constant"), _base_branches(structure, base)
    found: list[Multiplier] = []
    for branch in structure.branches:
        stream = streams[branch.stream]
        value = table.rows[Role.BRANCH_OUT].multiplier(Ratios(depth=stream.depth / stream.base_depth))
        of_base = of_bases[branch.name]
        own = constants[branch.name], (1.0 if base is None else of_base.constant if of_base else None)
        found.append(_relative(Multiplier(branch.name, "branch", value, branch.site, branch.folds, *own), table))
    for readout in structure.readouts:
        matrix = parameters[readout.parameter]
        # a tied table has the fans of an embedding, whose outputs are the readout's inputs
        axis = 1 if structure.parameters[readout.parameter].tied else 0
        ratios = Ratios(depth=matrix.depth / matrix.base_depth, inputs=matrix.fans[axis] / matrix.base_fans[axis])
        value = table.row(Role.READOUT, matrix.variant, ratios).multiplier(ratios)
        own = readout.constant, (1.0 if base is None else base.readout_constant(readout.parameter))
        multiplier = Multiplier(readout.parameter, "readout", value, readout.site, readout.folds, *own, readout.gains)
        # the numbers of a tied table are those of the embedding, whose constant they are relative to
        of_numbers = matrix.constant_ratio if structure.parameters[readout.parameter].tied else 1.0
        found.append(_relative(multiplier, table, of_numbers))
    found.extend(_added(structure.additions, None if base is None else base.additions))
    scales = own_factors(structure, "logits_scale")
    changed = _changed_logits(structure, base, of_bases, scales) if table.scales_logits else []
    found.extend(_logits(branch, of_base, scales[branch.name]) for branch, of_base in changed)
    warnings = tuple(_warnings_about_branches(structure, of_bases, streams, constants))
    changed = [(branch, of_base) for branch, of_base in changed if branch.head_dim != of_base.head_dim]
    if not changed:
        return tuple(found), warnings
    branch, of_base = changed[0]
    warning = (
        f"head_dim is {branch.head_dim} and the base's is {of_base.head_dim}. The theory holds for a bounded key-query "
        "dimension only, so for these branches µP's rule is used instead: logits proportional to 1/head_dim relative to the "
        "base (whatever factor modules have themselves), and the fan-in ratio of the output matrix as the ratio of "
        "hidden widths. Keep head_dim and change the number of heads to stay within the theory"
    )
    return tuple(found), (*warnings, warning)


def _added(own: float, of_base: float | None) -> Iterator[Multiplier]:
    """Note what is added beside branches; refuse it where its number is not the base's and nothing can be multiplied."""
    if of_base is not None and (constant_ratio(own, of_base) != 1 or bool(own) != bool(of_base)):
        raise ValueError(
            f"The module adds to its stream, beside its branches, {own:.4g} times what no parameter of its own multiplies "
            f"(data that blocks are given again, constants, or what earlier blocks have made), and the base {of_base:.4g} "
            "times. Such a sum grows with the depth. Let the module multiply what it adds by 1 over that number itself, or "
            "by a learned gain in each block, which the plan then scales; or keep the number at the base's."
        )
    if own:
        yield Multiplier("beside branches", "addition", 1.0, None, (), own, of_base or own)


def _warnings_about_branches(
    structure: Structure,
    of_bases: Mapping[str, BaseBranch | None],
    streams: tuple[StreamPlan, ...],
    constants: Mapping[str, float | None],
) -> Iterator[str]:
    """Say which branches have constants that cannot be put next to the base's."""
    found: dict[str, None] = {}
    for branch in structure.branches:
        of_base = of_bases[branch.name]
        unknown = constants[branch.name] is None or (of_base is not None and of_base.constant is None)
        if unknown and streams[branch.stream].depth != streams[branch.stream].base_depth:
            found[name_pattern(branch.name) or "of the module itself"] = None
    if found:
        yield (
            f"the branches {', '.join(found)} are multiplied by numbers of the module's own that differ along the depth, "
            "so that they cannot be put next to the base's: they stay as they are, and the table's 1/l comes on top"
        )


def _base_branches(structure: Structure, base: Base | None) -> dict[str, BaseBranch | None]:
    names = (branch.name for branch in structure.branches)
    return dict.fromkeys(names) if base is None else base.counterparts(structure.branches)


def original_of(name: str, copies: Mapping[str, str]) -> str | None:
    """Name of the parameter that another one, or a submodule, is a copy of."""
    return next((f"{of}{name[len(copy) :]}" for copy, of in copies.items() if f"{name}.".startswith(f"{copy}.")), None)


def with_copies(multipliers: tuple[Multiplier, ...], copies: Mapping[str, str]) -> tuple[Multiplier, ...]:
    """Multipliers with those of submodules that are copies of others, which are to compute the same."""
    found = (_copied(multiplier, copy, original) for copy, original in copies.items() for multiplier in multipliers)
    return tuple(dict.fromkeys((*multipliers, *filter(None, found))))


def _copied(multiplier: Multiplier, copy: str, original: str) -> Multiplier | None:
    """The multiplier of a submodule in a copy of it, None if it is not inside of it."""
    site, back = multiplier.site, {original: copy}
    where = None if site is None else original_of(site.module, back)
    folds, gains = (
        tuple(filter(None, (original_of(name, back) for name in names)))
        for names in (multiplier.folds, multiplier.gains)
    )
    if where is None and not folds:
        return None
    name = original_of(multiplier.name, back) or f"{copy}.{multiplier.name}"
    moved = None if site is None or where is None else replace(site, module=where)
    return replace(multiplier, name=name, site=moved, folds=folds, gains=gains)


def _relative(multiplier: Multiplier, table: Table, of_numbers: float = 1.0) -> Multiplier:
    """Make a factor relative to the constants of module and base, so that the product is that of the table."""
    ratio = multiplier.constant_ratio / of_numbers if table.scales_optimizer else 1.0
    return replace(multiplier, value=multiplier.value / ratio)


def _changed_logits(
    structure: Structure,
    base: Base | None,
    of_bases: Mapping[str, BaseBranch | None],
    scales: Mapping[str, float | None],
) -> list[tuple[Branch, BaseBranch]]:
    """Attention branches whose head_dim, or factor on logits, is not that of the base's branch, which comes second.

    A factor that differs where neither heads nor streams do is a hyperparameter as others are, and not of the shape.
    """
    grown = base is not None and base.streams != tuple((stream.depth, stream.embedding) for stream in structure.streams)
    found = []
    for branch in structure.branches:
        of_base = of_bases[branch.name]
        if branch.head_dim is None or of_base is None or of_base.head_dim is None:
            continue
        of_shape = grown or branch.hidden != of_base.hidden
        own_differs = of_shape and constant_ratio(scales[branch.name], of_base.logits_scale) != 1
        if branch.head_dim != of_base.head_dim or own_differs:
            found.append((branch, of_base))
    return found


def _logits(branch: Branch, of_base: BaseBranch, scale: float | None) -> Multiplier:
    if branch.kind == "recurrence":
        raise ValueError(
            f"The state of a unit of {branch.name or 'the module itself'} has {branch.head_dim} entries (coordinates of "
            f"keys times those of values), and the base's has {of_base.head_dim}. The theory holds for states of bounded "
            "size: keep head_dim and the size of the state at the base's values, and change the number of heads or channels."
        )
    assert branch.head_dim is not None and of_base.head_dim is not None and branch.logits is not None
    name = branch.name or "the module itself"
    what, own, of_its_base = "head_dim", float(branch.head_dim), float(of_base.head_dim)
    if branch.head_dim == of_base.head_dim and scale and of_base.logits_scale:
        what, own, of_its_base = "the factor on logits", scale, of_base.logits_scale
    reason = f"{what} of {name} is {own:.4g} and the base's is {of_its_base:.4g}, so its logits have to be "
    if not scale or not of_base.logits_scale:
        whose = "the module" if not scale else "the base"
        raise ValueError(
            f"{reason}multiplied, but the factor that {whose} itself puts on them cannot be read from its forward pass, "
            "or is not the same in all blocks. Multiply queries times keys by a Python number, not in place and not by "
            "a tensor, or keep head_dim at the base's value and change the number of heads."
        )
    value = of_base.head_dim / branch.head_dim * of_base.logits_scale / scale
    if math.isclose(value, 1.0, rel_tol=1e-6):  # the module has the rule already, up to rounding of its constants
        value = 1.0
    elif branch.logits.site is None and not branch.logits.folds:
        raise ValueError(
            f"{reason}multiplied by {value:.4g}, but its queries can be multiplied nowhere: they are made together with "
            "keys or values, or normalized outside of any submodule, and no submodule returns them on their own after "
            "that. Keep head_dim at the base's value and change the number of heads, or pass the queries through a "
            "submodule of their own, after their norm if they have one (an nn.Identity is enough)."
        )
    return Multiplier(branch.name, "logits", value, branch.logits.site, branch.logits.folds)


def _units(facts: ParameterFacts, structure: Structure) -> tuple[int, int]:
    """Inputs and outputs in units: heads of attention branches; projections that are stored as one count once."""
    if facts.role is Role.BRANCH_OUT:
        return facts.fan_in // facts.head_dim, facts.fan_out
    outputs = facts.fan_out // facts.head_dim
    if facts.role in (Role.BRANCH_IN, Role.BRANCH_IN_BIAS) and facts.branch is not None:
        hidden = structure.branches[facts.branch].hidden // facts.active
        outputs = hidden if outputs in (2 * hidden, 3 * hidden) else outputs
    return facts.fan_in, outputs


def _absolute_std(facts: ParameterFacts) -> float | None:
    """Standard deviation at D = M = L = 1, so that stream and hidden units are of order one; vectors stay as built."""
    assert facts.role is not None
    if not facts.role.is_matrix or len(facts.shape) < 2:
        return None
    is_table = facts.fan_in == 1 and facts.transposed
    if facts.role is Role.EMBEDDING and not is_table:
        return math.sqrt(facts.fan_out / math.prod(facts.shape))  # sums over data, which the table does not count
    return 1.0
