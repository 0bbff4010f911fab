"""Modules of two shapes beside each other: whether one has grown, and which of their parameters are alike."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from mlu_lightning.planning.base import name_pattern
from mlu_lightning.planning.plan import Plan
from mlu_lightning.table import Role

__all__ = ["check_growth", "roles_as_in"]


def check_growth(axis: str, factor: int, small: Plan, large: Plan) -> None:
    """Refuse modules that do not grow along an axis: what does not depend on a size that is not there passes everything.

    Sizes that are rounded may be off by up to the root of the factor; of several kinds of streams or branches, or of what
    grows together, one that grows is enough.
    """
    if any(_grows(grown, factor, small, large) for grown in (_COUNTED if axis == "together" else (axis,))):
        return
    had = "as they had at half of it" if factor == 2 else f"as they had at 1/{factor} of it"
    if axis == "together":
        raise ValueError(
            "The module grows neither with its depth nor with its hidden width or embedding. Let the module_factory use "
            "depth=..., hidden=... and embedding=..."
        )
    whose, what = _COUNTED[axis]
    raise ValueError(
        f"The module does not grow with its {axis}: {whose} have {_listed(_sizes(axis, large))} {what}, {had}. Let the "
        f"module_factory use {axis}=..., or leave it out with axes=[...] (--{axis} null on the command line, or names "
        "of other arguments)."
    )


def roles_as_in(plan: Plan, large: Plan, small: Plan) -> dict[str, Role]:
    """Roles of a module's parameters, as those that a larger module of its kind has.

    What a matrix is for may not be told where its outputs are as many as at the base. Names may differ between two modules,
    but in numbers only, and numbers may count parts of one block, too, so a name is not enough: ``small`` is a module that
    has not grown, of the depth of ``large`` if that has the same names.
    """
    if plan.roles.keys() == large.roles.keys():
        return dict(large.roles)
    of_pattern: dict[str, list[Role]] = defaultdict(list)
    for name, role in large.roles.items():
        if role not in of_pattern[name_pattern(name)]:
            of_pattern[name_pattern(name)].append(role)
    learned: Mapping[tuple[str, Role], Role] = {}
    if small.roles.keys() == large.roles.keys():
        learned = {(name_pattern(name), role): large.roles[name] for name, role in small.roles.items()}
    found = {}
    for name, own in plan.roles.items():
        pattern = name_pattern(name)
        roles = of_pattern[pattern]
        found[name] = roles[0] if len(roles) == 1 else learned.get((pattern, own), own)
    return found


_COUNTED = {
    "depth": ("its streams", "additions"),
    "hidden": ("its branches", "hidden units, heads or channels"),
    "embedding": ("its streams", "dimensions"),
}


def _grows(axis: str, factor: int, small: Plan, large: Plan) -> bool:
    before, after = _sizes(axis, small), _sizes(axis, large)
    if len(before) != len(after):
        return True
    return any(new >= old * math.sqrt(factor) for old, new in zip(before, after, strict=True))


def _sizes(axis: str, plan: Plan) -> list[int]:
    if axis == "hidden":
        # each kind and name once, however many blocks there are
        return list({(name_pattern(branch.name), branch.kind): branch.hidden for branch in plan.branches}.values())
    return [stream.depth if axis == "depth" else stream.embedding for stream in plan.streams]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, dict.fromkeys(numbers)))
