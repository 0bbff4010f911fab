"""The search space: factors around 1 per role, none of them twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mlu_lightning.planning import Plan
from mlu_lightning.planning.tuned import FACTORS, Tuned, match_tuned
from mlu_lightning.table import Role

DEFAULT_ROLES = ("embedding", "branch_in", "branch_out", "readout")
"""Roles whose factors matter most; a factor of all learning rates is searched beside them."""

_LARGEST = {"lr": 16.0, "": 8.0}  # of a factor, whose least is one over it: the learning rate of all, and any other
_DIGITS = 4  # of a factor
_NORMS = (Role.BRANCH_NORM, Role.STREAM_NORM, Role.BRANCH_BOUNDED)


@dataclass(frozen=True)
class Dimension:
    """One number that is searched, on a logarithmic scale."""

    name: str  # such as ``"embedding.std"``; ``"lr"`` is the factor of all learning rates
    keys: tuple[str, ...]  # of tuned factors that it is multiplied into
    what: str  # it is a factor of
    low: float
    high: float


def search_space(plan: Plan, roles: Sequence[str] = DEFAULT_ROLES) -> tuple[Dimension, ...]:
    """Choose what is searched: the learning rate, and factors of roles (std and lr as far as a role has them).

    A multiplier says for Adam and SGD what std and lr of its role say together, so it is searched only where a role has
    neither, as a tied readout. The factor of all learning rates is that of ``branch_in``, to which the others are
    relative. The richness alpha takes the place of the std of ``branch_out``: it is that std, with the lr of ``branch_in``
    over it (SGD: over its square).
    """
    present = tuple(dict.fromkeys(role.value for role in plan.roles.values() if role is not Role.FROZEN))
    found = [_dimension("lr", present, "lr")]
    for given in roles:
        own = [*_of(given, plan, present)]
        found += [each for each in own if not (given == Role.BRANCH_OUT and each.what == "std" and "alpha" in roles)]
    names = [dimension.name for dimension in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--roles has {twice[0]} twice. Leave one of them.")
    return tuple(found)


def factors_at(space: Sequence[Dimension], point: Mapping[str, float]) -> Tuned:
    """Tuned factors at a point of the space, rounded to what is written and trained."""
    found: Tuned = {}
    for dimension in space:
        for key in dimension.keys:
            factors = found.setdefault(key, {})
            factors[dimension.what] = factors.get(dimension.what, 1.0) * point.get(dimension.name, 1.0)
    rounded = {key: {what: float(f"{f:.{_DIGITS}g}") for what, f in factors.items()} for key, factors in found.items()}
    changed = {key: {what: f for what, f in factors.items() if f != 1.0} for key, factors in rounded.items()}
    return {key: factors for key, factors in changed.items() if factors}


def _dimension(name: str, keys: Sequence[str], what: str) -> Dimension:
    largest = _LARGEST.get(name, _LARGEST[""])
    return Dimension(name, tuple(keys), what, 1 / largest, largest)


def _of(given: str, plan: Plan, present: Sequence[str]) -> Iterator[Dimension]:
    if given == "alpha":
        replace(plan, tuned={Role.BRANCH_OUT.value: {"alpha": 2.0}})  # which refuses what has none
        yield _dimension("alpha", [Role.BRANCH_OUT], "alpha")
        return
    if given == "weight_decay":
        yield _dimension("weight_decay", present, "weight_decay")
        return
    if given == "norms":
        norms = [role.value for role in _NORMS if role.value in present]
        if not norms:
            raise ValueError("--roles has norms, and this module has none with parameters. Leave it out.")
        yield _dimension("norms.lr", norms, "lr")
        return
    key, _, what = given.rpartition(".")
    if key and what in FACTORS:
        _require(plan, key, what)
        yield _dimension(given, [key], what)
        return
    wanted = ["std"] if given == Role.BRANCH_IN else ["std", "lr"]
    own = [what for what in wanted if _has(plan, given, what)]
    if not own and _has(plan, given, "multiplier"):
        own = ["multiplier"]
    if not own and given in DEFAULT_ROLES:
        return  # which not every module has
    if not own:
        _require(plan, given, "lr")
    for what in own:
        yield _dimension(f"{given}.{what}", [given], what)


def _has(plan: Plan, key: str, what: str) -> bool:
    try:
        _require(plan, key, what)
    except ValueError:
        return False
    return True


def _require(plan: Plan, key: str, what: str) -> None:
    match_tuned({key: {what: 1.0}}, plan.parameters, plan.branches, plan.multipliers)
