"""Factors that were tuned at the base, per role: how they are given, what they match, and what they change.

Everything that is of order one at the base keeps its meaning at every shape, not the learning rate alone (theory.md,
section 3): a factor of a role's std, lr or decay, or of a multiplier, is found at the base and multiplied into the table's.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from os import PathLike, fspath
from typing import Any, get_args

from mlu_lightning.discovery.structure import BranchKind
from mlu_lightning.planning.entries import BranchPlan, Multiplier, ParameterPlan
from mlu_lightning.planning.ranges import in_range, range_of
from mlu_lightning.table import Role, Scale
from mlu_lightning.utilities.plain_yaml import parse_yaml, read_text

Tuned = dict[str, dict[str, float]]

FACTORS = ("std", "lr", "weight_decay", "multiplier", "alpha")
"""Numbers that have a factor; the richness alpha is that of all branches, whose key is branch_out."""


@dataclass(frozen=True)
class Matched:
    """Tuned factors by what they are of; the multipliers' own are with these."""

    parameters: Mapping[str, Scale] = field(default_factory=dict)
    multipliers: Mapping[Multiplier, float] = field(default_factory=dict)
    alpha: float = 1.0

    def of(self, name: str) -> Scale:
        """Factors of a parameter's std, lr and decay."""
        return self.parameters.get(name, _ONE)

    def into(self, name: str, scale: Scale) -> Scale:
        """Multiply a parameter's factors by those that were tuned."""
        own = self.parameters.get(name)
        if own is None:
            return scale
        decay = scale.weight_decay * own.weight_decay
        return replace(scale, std=scale.std * own.std, lr=scale.lr * own.lr, weight_decay=decay)


def read_tuned(given: Mapping[str, Mapping[str, float]] | str | PathLike[str] | None) -> Tuned:
    """Read tuned factors from a mapping or a YAML file, or refuse what is no factor."""
    where, content = "tuned", given
    if isinstance(given, (str, PathLike)):
        where = fspath(given)
        content = parse_yaml(read_text(given), where)
    if content is None or content == "":
        return {}
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} is {content!r:.80}, and should be a mapping, {_EXAMPLE}.")
    return {str(key): _factors(key, value, where) for key, value in content.items()}


def match_tuned(
    tuned: Tuned,
    parameters: Mapping[str, ParameterPlan],
    branches: Iterable[BranchPlan],
    multipliers: Iterable[Multiplier],
) -> Matched:
    """Find what each factor applies to, and multiply those of several keys; refuse a factor that applies to nothing."""
    if not tuned:
        return Matched()
    kinds = [branch.kind for branch in branches]
    writers = {multiplier: [*_writers(multiplier, parameters, branches)] for multiplier in multipliers}
    of_parameters: dict[str, Scale] = {}
    of_multipliers: dict[Multiplier, float] = {}
    alpha = tuned.get(Role.BRANCH_OUT.value, {}).get("alpha", 1.0)
    for key, factors in tuned.items():
        names = [name for name, entry in parameters.items() if _matches(key, name, entry, kinds)]
        alive = [name for name in names if parameters[name].base_std]
        scaled = [m for m, written in writers.items() if _multiplies(key, m, written, names)]
        for what, factor in factors.items():
            if not (scaled if what == "multiplier" else alive if what == "std" else names):
                raise ValueError(_of_nothing(key, what, names, parameters))
            if what == "alpha":
                if key != Role.BRANCH_OUT:
                    raise ValueError(
                        f"tuned has alpha for {key!r}. It is of all branches: give it to {Role.BRANCH_OUT}."
                    )
                continue
            if what == "multiplier":
                of_multipliers |= {m: of_multipliers.get(m, 1.0) * factor for m in scaled}
                continue
            for name in alive if what == "std" else names:
                before = of_parameters.get(name, _ONE)
                of_parameters[name] = replace(before, **{what: getattr(before, what) * factor})
    return Matched(of_parameters, of_multipliers, alpha)


_ONE = Scale()
_EXAMPLE = "such as {embedding: {lr: 1.9, std: 2.7}, branch_out: {lr: 0.4}}"


def _factors(key: Any, value: Any, where: str) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}, {key}: {value!r:.80} should be a mapping of factors, {_EXAMPLE}.")
    if unknown := [what for what in value if what not in FACTORS]:
        raise ValueError(f"{where}, {key}: there is no factor of {unknown[0]!r:.80}. There are: {', '.join(FACTORS)}.")
    return {str(what): _number(factor, f"{where}, {key}, {what}") for what, factor in value.items()}


def _number(value: Any, where: str) -> float:
    try:  # texts are those of a file
        number = math.nan if value is True or not isinstance(value, (str, Real)) else float(value)
    except ValueError:
        number = math.nan
    if not in_range("factor", number):
        raise ValueError(f"{where}: {value!r:.80} should be {range_of('factor')}.")
    return number


def _matches(key: str, name: str, entry: ParameterPlan, kinds: list[BranchKind]) -> bool:
    """Whether a key is a parameter's role, its role in its kind of branch, or a pattern of its name."""
    if entry.role is Role.FROZEN:
        return False
    role, _, kind = key.partition("@")
    if role not in _ROLES:
        return fnmatch.fnmatchcase(name, key)
    return role == entry.role.value and (not kind or (entry.branch is not None and kinds[entry.branch] == kind))


def _multiplies(key: str, multiplier: Multiplier, written: list[str], names: list[str]) -> bool:
    """Whether a key is the role whose row has a multiplier, or of a parameter that writes what it multiplies."""
    if key in _ROLES:  # of a tied table, which is an embedding, the readout's
        return multiplier.role is not None and multiplier.role.value == key
    return multiplier.role is not None and bool({*written} & {*names})


def _writers(
    multiplier: Multiplier, parameters: Mapping[str, ParameterPlan], branches: Iterable[BranchPlan]
) -> Iterator[str]:
    """Parameters that write what a multiplier is of; of a copy's, which has the original's factors, the original's."""
    positions = [index for index, branch in enumerate(branches) if branch.name == multiplier.name]
    for name, entry in parameters.items():
        inside = name in multiplier.folds or name == multiplier.name
        if multiplier.kind == "branch" and not positions:
            inside = inside or f"{name}.".startswith(f"{multiplier.name}.")
        elif multiplier.kind == "branch":
            inside = entry.branch in positions and entry.role is Role.BRANCH_OUT
        if inside:
            yield entry.copy_of or name


def _of_nothing(key: str, what: str, names: list[str], parameters: Mapping[str, ParameterPlan]) -> str:
    if names and what == "std":
        return (
            f"tuned has a factor of std for {key!r}, but {', '.join(names[:3])} start at zero, or as they are built, and a "
            "factor changes nothing there. Leave it out, or give the module's base another initialization."
        )
    if names:
        return (
            f"tuned has a multiplier for {key!r}, and {', '.join(names[:3])} have none: multipliers are those of branches "
            f"and readouts, whose keys are {Role.BRANCH_OUT} and {Role.READOUT}."
        )
    roles = dict.fromkeys(entry.role.value for entry in parameters.values() if entry.role is not Role.FROZEN)
    kinds = ", ".join(get_args(BranchKind))
    return (
        f"tuned has a factor of {what} for {key!r}, which matches nothing in this module. Its roles are {', '.join(roles)}; "
        f"a role in one kind of branch is written as {Role.BRANCH_IN}@attention ({kinds}); other keys are globs of "
        f"parameter names, such as {next(iter(parameters), 'blocks.*.weight')}."
    )


_ROLES = frozenset(role.value for role in Role)
