"""From a structure and a base to the numbers of a plan: ratios, multipliers, and what the base's init was."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mlu_lightning.discovery.structure import Branch, BranchKind, ParameterFacts, Site, Structure
from mlu_lightning.planning.base import Base, logits_scales, name_pattern, partners
from mlu_lightning.table import TABLE, TABLES, Parameterization, Ratios, Role

__all__ = [
    "BranchPlan",
    "Multiplier",
    "ParameterPlan",
    "StreamPlan",
    "plan_branches",
    "plan_multipliers",
    "plan_parameters",
    "plan_streams",
]


@dataclass(frozen=True)
class ParameterPlan:
    """What the plan says about one parameter.

    Args:
        role: row of the table.
        shape: its shape.
        base_shape: shape at the base; None in the paper's absolute form.
        ratios: ratios to the base shape.
        base_std: root mean square at the base's initialization; None leaves the parameter as it was built.
        fans: inputs and outputs of its map, in units.
        branch: index into ``Plan.branches``, None outside branches.
        transposed: whether it is stored [inputs, outputs], the other way round than ``nn.Linear`` stores it.
        active: number of experts over whose outputs a mixture of experts averages; 1 outside of experts.
    """

    role: Role
    shape: tuple[int, ...]
    base_shape: tuple[int, ...] | None
    ratios: Ratios
    base_std: float | None
    fans: tuple[int, int]
    branch: int | None = None
    transposed: bool = False
    active: int = 1


@dataclass(frozen=True)
class StreamPlan:
    """Shape of a residual stream next to the base's (1 in the absolute form).

    Args:
        depth: residual additions along it, L.
        base_depth: the same of the base, L0.
        embedding: its dimension, D.
        base_embedding: the same of the base, D0.
    """

    depth: int
    base_depth: int
    embedding: int
    base_embedding: int


@dataclass(frozen=True)
class BranchPlan:
    """A residual branch next to the base's.

    Args:
        name: of the module that it is.
        kind: ``"attention"``, ``"convolution"`` or ``"mlp"``.
        hidden: hidden width M: heads, channels or units.
        base_hidden: the same of the base, 1 in the absolute form.
        stream: index into ``Plan.streams``.
        position: place along the stream.
        head_dim: dimension of queries and keys per head, None for other kinds.
        base_head_dim: the same of the base, None in the absolute form.
        logits_scale: what the module itself multiplies logits by, None for other kinds and where it cannot be read.
        base_logits_scale: the same of the base.
    """

    name: str
    kind: BranchKind
    hidden: int
    base_hidden: int
    stream: int
    position: int
    head_dim: int | None = None
    base_head_dim: int | None = None
    logits_scale: float | None = None
    base_logits_scale: float | None = None


@dataclass(frozen=True)
class Multiplier:
    """A factor in the forward pass.

    Args:
        name: of the branch, or of the readout's matrix.
        kind: what it multiplies: a residual ``"branch"``, the ``"readout"``, or attention ``"logits"``.
        value: the factor relative to base, before the richness alpha.
        site: where a hook attaches it; None if there is no such place.
        folds: parameters into which it can be folded; empty if there are none.
    """

    name: str
    kind: Literal["branch", "readout", "logits"]
    value: float
    site: Site | None
    folds: tuple[str, ...]


def plan_streams(structure: Structure, base: Base | None) -> tuple[StreamPlan, ...]:
    """Put every stream next to the base's.

    Args:
        structure: of the module.
        base: None for the paper's absolute form.
    """
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
    """Ratios of every parameter to the base.

    Args:
        structure: of the module, all of whose parameters have a role.
        base: None for the paper's absolute form, with entries of order one: N(0, 1/d_in) where data is multiplied with
            a matrix, N(0, 1) for tables and readouts, the table's N(0, 1/D) and N(0, D/M²) in branches.
        streams: next to the base's.

    Raises:
        ValueError: if the base has another architecture.
    """
    counterparts = None if base is None else partners(structure, base)
    planned: dict[str, ParameterPlan] = {}
    for name, facts in structure.parameters.items():
        assert facts.role is not None
        depth = streams[facts.stream].depth / streams[facts.stream].base_depth
        if counterparts is None:
            fans = _units(facts, structure)
            ratios = _counted(facts.role, Ratios(depth, float(fans[0]), float(fans[1]), float(facts.active)))
            base_shape, base_std = None, _absolute_std(facts)
        else:
            partner = counterparts[name]
            fans = facts.fan_in, facts.fan_out
            inputs, outputs = fans[0] / partner.fans[0], fans[1] / partner.fans[1]
            ratios = _counted(facts.role, Ratios(depth, inputs, outputs, facts.active / partner.active))
            base_shape, base_std = partner.shape, partner.std
        role = facts.role
        if facts.in_head and role is Role.STREAM_MATRIX and base is not None and ratios.outputs == 1 != ratios.inputs:
            # it ends the stream as a readout does: with a random sum over D, gradients there would be of d^(-1/2)
            role = Role.STREAM_BOUNDED_MATRIX
        elif facts.normed:
            role = Role.BRANCH_OUT_NORMED
        planned[name] = ParameterPlan(
            role, facts.shape, base_shape, ratios, base_std, fans, facts.branch, facts.transposed, facts.active
        )
    return planned


def plan_branches(structure: Structure, base: Base | None) -> tuple[BranchPlan, ...]:
    """Put every branch next to the base's.

    Args:
        structure: of the module.
        base: None for the paper's absolute form.
    """
    shapes = {} if base is None else base.branches
    planned = []
    for branch in structure.branches:
        base_hidden, base_head_dim, base_scale = shapes.get((name_pattern(branch.name), branch.kind), (1, None, None))
        planned.append(
            BranchPlan(
                name=branch.name,
                kind=branch.kind,
                hidden=branch.hidden,
                base_hidden=base_hidden,
                stream=branch.stream,
                position=branch.position,
                head_dim=branch.head_dim,
                base_head_dim=base_head_dim,
                logits_scale=branch.logits_scale,
                base_logits_scale=base_scale,
            )
        )
    return tuple(planned)


def plan_multipliers(
    structure: Structure,
    base: Base | None,
    streams: tuple[StreamPlan, ...],
    parameterization: Parameterization = Parameterization.MLU,
) -> tuple[tuple[Multiplier, ...], tuple[str, ...]]:
    """Factors in the forward pass: 1/l on branches, 1/d on readouts, and on logits where head_dim is not the base's.

    The theory has a bounded head_dim d_k (theory.md, section 3). Where it differs from the base's, logits are to be
    proportional to 1/d_k relative to it, whatever the module's own factor c is: they are multiplied by
    (base d_k / d_k) / (c / base c), because training correlates queries and keys, so that a logit becomes c times a sum
    of d_k products of one sign.

    With query-key norm the rule is the same, for a stronger reason: a logit is at most c · d_k times the gains, however
    long the training, and 1/d_k keeps that bound. It has to come after the norm, which undoes what multiplies its
    input. For the same reason the std of the queries' and keys' projections has no effect on the function there, but
    it divides what a step of a given size does; without the norm, logits grow with it.

    Args:
        structure: of the module.
        base: None for the paper's absolute form.
        streams: next to the base's.
        parameterization: whose table they are looked up in; the standard parameterization leaves logits as they are too.

    Returns:
        The multipliers, and warnings.

    Raises:
        ValueError: if head_dim differs from the base's, and the logits of a branch cannot be multiplied or the module's
            own factor cannot be read.
    """
    found: list[Multiplier] = []
    for branch in structure.branches:
        stream = streams[branch.stream]
        value = TABLES[parameterization][Role.BRANCH_OUT].multiplier(Ratios(depth=stream.depth / stream.base_depth))
        found.append(Multiplier(branch.name, "branch", value, branch.site, branch.folds))
    counterparts = None if base is None else partners(structure, base)
    for readout in structure.readouts:
        # a tied table has the fans of an embedding, whose outputs are the readout's inputs
        tied = structure.parameters[readout.parameter].tied
        width = 1 if counterparts is None else counterparts[readout.parameter].fans[1 if tied else 0]
        value = TABLES[parameterization][Role.READOUT].multiplier(Ratios(inputs=readout.fan_in / width))
        found.append(Multiplier(readout.parameter, "readout", value, readout.site, readout.folds))
    changed = [] if parameterization == Parameterization.SP else list(_changed_heads(structure, base))
    scales = logits_scales(structure)
    found.extend(_logits(branch, base_dim, scales[branch.name], scale) for branch, base_dim, scale in changed)
    if not changed:
        return tuple(found), ()
    branch, base_dim, _ = changed[0]
    warning = (
        f"head_dim is {branch.head_dim} and the base's is {base_dim}. The theory holds for a bounded key-query dimension "
        "only, so for these branches µP's rule is used instead: logits proportional to 1/head_dim relative to the base "
        "(whatever factor modules have themselves), and the fan-in ratio of the output matrix as the ratio of hidden "
        "widths. Keep head_dim and change the number of heads to stay within the theory"
    )
    return tuple(found), (warning,)


def _changed_heads(structure: Structure, base: Base | None) -> Iterator[tuple[Branch, int, float | None]]:
    """Attention branches whose head_dim is not the base's, with that and the base's own factor of logits."""
    shapes = {} if base is None else base.branches
    for branch in structure.branches:
        _, base_dim, base_scale = shapes.get((name_pattern(branch.name), branch.kind), (0, None, None))
        if branch.head_dim is not None and base_dim is not None and branch.head_dim != base_dim:
            yield branch, base_dim, base_scale


def _logits(branch: Branch, base_dim: int, scale: float | None, base_scale: float | None) -> Multiplier:
    assert branch.head_dim is not None and branch.logits is not None
    name = branch.name or "the module itself"
    reason = f"head_dim of {name} is {branch.head_dim} and the base's is {base_dim}, so its logits have to be "
    if not scale or not base_scale:
        whose = "the module" if not scale else "the base"
        raise ValueError(
            f"{reason}multiplied, but the factor that {whose} itself puts on them cannot be read from its forward pass, "
            "or is not the same in all blocks. Multiply queries times keys by a Python number, not in place and not by "
            "a tensor, or keep head_dim at the base's value and change the number of heads."
        )
    value = base_dim / branch.head_dim * base_scale / scale
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
    table = facts.fan_in == 1 and facts.transposed
    if facts.role is Role.EMBEDDING and not table:
        return math.sqrt(facts.fan_out / math.prod(facts.shape))  # sums over data, which the table does not count
    return 1.0


def _counted(role: Role, ratios: Ratios) -> Ratios:
    """Only the ratios that the role's row of MLU's table uses; data, targets and bounded sizes do not count."""
    row = TABLE[role]
    powers = (row.n, row.g, row.multiplier, row.std, row.lr)
    return Ratios(
        depth=ratios.depth if any(power.depth for power in powers) else 1.0,
        inputs=ratios.inputs if any(power.inputs for power in powers) else 1.0,
        outputs=ratios.outputs if any(power.outputs for power in powers) else 1.0,
        active=ratios.active,
    )
