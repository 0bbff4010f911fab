"""What a plan knows about the base shape, and which parameter corresponds to which."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from lightning.pytorch import LightningModule
from torch import nn

from mlu_lightning.discovery.structure import Branch, BranchKind, ParameterFacts, Structure
from mlu_lightning.table import COUNTED, Role, Variant, row_name
from mlu_lightning.utilities.lightning_namespaces import of_both
from mlu_lightning.utilities.names import (
    distance_along_depth,
    listed,
    name_pattern,
    name_pattern_of_parts,
    planned_parameters,
)


@dataclass(frozen=True)
class BaseParameter:
    """One parameter of the base; ``std`` is its root mean square at initialization."""

    role: Role
    shape: tuple[int, ...]
    fans: tuple[int, int]
    std: float | None
    active: int
    uses: int
    variant: Variant | None
    constant: float | None
    repeats: int | None = None

    @property
    def row(self) -> str:
        """Name of its row of the table."""
        return row_name(self.role, self.variant)

    def is_like(self, facts: ParameterFacts) -> bool:
        """Whether a parameter has that row, but for being one of several that are counted where this one is alone."""
        variants = {self.variant, facts.variant} - COUNTED - {None}
        both = self.variant == facts.variant or not variants
        return self.role is facts.role and both and len(self.shape) == len(facts.shape)


@dataclass(frozen=True)
class BaseBranch:
    """A branch of the base, with what the base itself multiplies its logits and its output by."""

    hidden: int
    head_dim: int | None
    logits_scale: float | None
    constant: float | None


@dataclass(frozen=True)
class Base:
    """The base shape: parameters by name, (depth, embedding) of streams, branches by name and kind, and what the base itself
    multiplies readouts by, by the name of their matrix."""

    parameters: dict[str, BaseParameter]
    streams: tuple[tuple[int, int], ...]
    branches: dict[tuple[str, BranchKind], BaseBranch]
    readouts: dict[str, float | None]
    additions: float = 0.0  # beside branches, as in ``Structure``

    def readout_constant(self, name: str) -> float | None:
        """What the base multiplies a readout by, or one of its pattern: a deeper module may have more of them."""
        alike = (constant for other, constant in self.readouts.items() if name_pattern(other) == name_pattern(name))
        return self.readouts[name] if name in self.readouts else next(alike, None)

    def counterparts(self, branches: Iterable[Branch]) -> dict[str, BaseBranch | None]:
        """The branch of the name of each branch, or else the nearest of its pattern, or of a name with other numbers."""
        groups: defaultdict[tuple[str, BranchKind], list[Branch]] = defaultdict(list)
        for branch in branches:
            groups[name_pattern(branch.name), branch.kind].append(branch)
        found: dict[str, BaseBranch | None] = {}
        for (pattern, kind), own in groups.items():
            of_base = {other: entry for (other, its_kind), entry in self.branches.items() if its_kind == kind}
            alike = {o: entry for o, entry in of_base.items() if name_pattern(o) == pattern}
            parts = name_pattern_of_parts(pattern)
            alike = alike or {o: entry for o, entry in of_base.items() if name_pattern_of_parts(o) == parts}
            sizes = {b.name: (b.hidden, b.head_dim) for b in own}
            names = of_the_same_kind(sizes, {o: (e.hidden, e.head_dim) for o, e in alike.items()})
            for name in sizes:
                near = min(names.get(name, alike), key=lambda other: distance_along_depth(name, other), default=None)
                found[name] = None if near is None else alike[near]
        return found


def refuse_base(base: nn.Module, module: nn.Module, example: Any = None) -> None:
    """Refuse a base that is known to be trained already, or that does not take the examples of the module.

    Training leaves gradients and a Trainer; of weights that were loaded, or trained elsewhere, nothing is known, and their
    root mean square is taken as that of the initial ones.
    """
    steps = [isinstance(each, of_both(LightningModule)) for each in (base, module)]
    if example is not None and steps[0] != steps[1]:
        whose = "module" if steps[1] else "base"
        raise ValueError(
            f"The base is a {type(base).__name__} and the module a {type(module).__name__}, and only the {whose} is a "
            "LightningModule: the example of one is a batch for training_step, and that of the other arguments of forward. "
            "Give a base of the module's class, with another shape."
        )
    trainer = vars(base).get("_trainer")
    own = trainer is not None and trainer is vars(module).get("_trainer")
    trained = not own and getattr(trainer, "global_step", 0) > 0
    if trained or (base is not module and any(parameter.grad is not None for parameter in base.parameters())):
        how = f"was trained for {trainer.global_step} steps" if trained and trainer else "has gradients"
        raise ValueError(
            f"The base {type(base).__name__} {how}, so its weights may not be its initial ones, by whose size those of the "
            "module are set. Build the base anew; if it was not trained, zero_grad() takes the gradients away."
        )


def base_of_module(module: nn.Module, structure: Structure) -> Base:
    """Describe a freshly initialized module, all of whose parameters have a role, as the base."""
    values = planned_parameters(module)
    if any(parameter.is_meta for parameter in values.values()):
        raise ValueError(
            f"The base {type(module).__name__} is on the meta device, so its initial standard deviations, which the plan "
            "needs, do not exist. Build the base on a real device; it is the small model."
        )
    stds = {name: _std(name, value, structure.roles[name], module) for name, value in values.items()}
    counted = attrgetter("active", "uses", "variant", "constant", "repeats")
    scales, constants = own_factors(structure, "logits_scale"), own_factors(structure, "constant")
    return Base(
        parameters={
            name: BaseParameter(structure.roles[name], f.shape, (f.fan_in, f.fan_out), stds[name], *counted(f))
            for name, f in structure.parameters.items()
        },
        streams=tuple((stream.depth, stream.embedding) for stream in structure.streams),
        branches={
            (b.name, b.kind): BaseBranch(b.hidden, b.head_dim, scales[b.name], constants[b.name])
            for b in structure.branches
        },
        readouts={readout.parameter: readout.constant for readout in structure.readouts},
        additions=structure.additions,
    )


def _std(name: str, parameter: nn.Parameter, role: Role, module: nn.Module) -> float | None:
    """Root mean square at initialization; None of one without entries, and of frozen ones, which are left as they are."""
    if parameter.numel() == 0 or role is Role.FROZEN:
        return None
    std: float = parameter.detach().abs().double().square().mean().sqrt().item()
    if not math.isfinite(std):
        raise ValueError(
            f"{name} of the base {type(module).__name__} has values that are not finite, and all weights would be drawn by "
            "their root mean square. Build the base anew, and look at what initializes it."
        )
    return std


def own_factors(structure: Structure, key: Literal["logits_scale", "constant"]) -> dict[str, float | None]:
    """What the module itself multiplies logits or branches by; None where that is unknown or differs along the depth.

    Stages of another head_dim or width may have another factor.
    """
    groups: dict[tuple[str, str, int | None, int], list[Branch]] = {}
    for branch in structure.branches:
        groups.setdefault((name_pattern(branch.name), branch.kind, branch.head_dim, branch.hidden), []).append(branch)
    found: dict[str, float | None] = {}
    for alike in groups.values():
        factors = {getattr(branch, key) for branch in alike}
        found |= {branch.name: factors.copy().pop() if len(factors) == 1 else None for branch in alike}
    return found


def counterparts(structure: Structure, base: Base) -> dict[str, BaseParameter]:
    """Find the base's counterpart of every parameter: of the same name, or else at the nearest place along the depth.

    Places are numbers between dots; for names that the base does not have otherwise, also numbers inside of a part.
    """
    by_pattern: defaultdict[str, list[str]] = defaultdict(list)
    for name in base.parameters:
        for pattern in {name_pattern(name), name_pattern_of_parts(name)}:
            by_pattern[pattern].append(name)
    own_names: defaultdict[str, list[str]] = defaultdict(list)
    for name in structure.parameters:
        own_names[name_pattern(name)].append(name)
    of_kind: dict[str, dict[str, list[str]]] = {}
    found: dict[str, BaseParameter] = {}
    differences: list[str] = []
    for name, facts in structure.parameters.items():
        pattern = name_pattern(name)
        names = by_pattern.get(pattern) or by_pattern.get(name_pattern_of_parts(name), [])
        alike = {other: base.parameters[other] for other in names}
        if facts.role is Role.FROZEN:
            continue
        if pattern not in of_kind:
            own = {n: (structure.parameters[n].row, structure.parameters[n].shape) for n in own_names[pattern]}
            of_kind[pattern] = of_the_same_kind(own, {n: (entry.row, entry.shape) for n, entry in alike.items()})
        candidates = [other for other in of_kind[pattern].get(name, ()) if alike[other].is_like(facts)]
        candidates = candidates or [other for other, entry in alike.items() if entry.is_like(facts)]
        if candidates:
            found[name] = alike[min(candidates, key=lambda other: distance_along_depth(name, other))]
        elif alike:
            entry = next(iter(alike.values()))
            its = f"{entry.row} {list(entry.shape)}"
            differences.append(f"{name} is {facts.row} {list(facts.shape)} and the base's is {its}")
        else:
            differences.append(f"{name} has no counterpart in the base")
    patterns = {name_pattern_of_parts(name) for name in structure.parameters}
    others = {p: names[0] for p, names in by_pattern.items() if name_pattern_of_parts(p) not in patterns}
    missing = [name for name in others.values() if base.parameters[name].role is not Role.FROZEN]
    differences.extend(f"{name} of the base has no counterpart in the module" for name in missing)
    if differences:
        advice = advice_on_names([*structure.parameters, *base.parameters])
        raise ValueError(
            f"The base is of a different architecture: {listed(differences, separator='; ')}. Give a base that differs from "
            f"the module in depth, hidden width or embedding only.{advice}"
        )
    return found


def of_the_same_kind(own: Mapping[str, object], of_base: Mapping[str, object]) -> dict[str, list[str]]:
    """Names of the base for each name that has a kind, such as a shape: of the kind that is the first, second, … in both.

    Stages of a width of their own may have blocks that are numbered throughout. Empty if there are not as many kinds.
    """
    by_kind: defaultdict[object, list[str]] = defaultdict(list)
    for name, kind in of_base.items():
        by_kind[kind].append(name)
    kinds = dict.fromkeys(own.values())
    if len(kinds) != len(by_kind):
        return {}
    names = dict(zip(kinds, by_kind.values(), strict=True))
    return {name: names[kind] for name, kind in own.items()}


def advice_on_names(names: Iterable[str]) -> str:
    """What to do about names that torch.compile has changed, to be added to an error about them; empty if there are none."""
    if not any("_orig_mod." in name for name in names):
        return ""
    return (
        " Parts wrapped by torch.compile have other names (_orig_mod): compile them in place instead, with their method "
        ".compile(), or compile the whole module."
    )
