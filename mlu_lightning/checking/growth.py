"""Check that a module grows along the axis along which it is built larger."""

from __future__ import annotations

import math

from mlu_lightning.planning import Plan
from mlu_lightning.utilities.names import name_pattern

__all__ = ["check_growth"]


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
