"""What was applied to a module: one value, kept on the module under one name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from mlu_lightning.planning import Multiplier, Plan
from mlu_lightning.planning.fingerprint import fingerprint

__all__ = [
    "Applied",
    "Mode",
    "folded_parameters",
    "forward_factors",
    "mark_initialized",
    "residual_state",
    "set_applied",
    "uncompiled",
]

Mode = Literal["hook", "fold", "baked"]
"""Where multipliers are: in hooks, in weights as far as they fold, or in weights altogether."""

_NAME = "_mlu_applied"


@dataclass(frozen=True)
class Applied:
    """A plan whose multipliers are in a module, and how they were put there.

    Copies and pickles of the module have it too: torch handles find their hooks in a copy.

    Args:
        plan: whose multipliers they are.
        mode: where they are.
        folded: names of the parameters that hold their multipliers.
        hooks: a torch handle for each hook.
        initialized: whether ``MLUCallback`` answers for the initial weights.
    """

    plan: Plan
    mode: Mode
    folded: frozenset[str] = frozenset()
    hooks: tuple[RemovableHandle, ...] = field(default=(), compare=False)
    initialized: bool = field(default=False, compare=False)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the plan."""
        return fingerprint(self.plan)

    def is_of(self, plan: Plan) -> bool:
        """Whether these are the multipliers of a plan, or of one with equal numbers."""
        return plan is self.plan or fingerprint(plan) == self.fingerprint


def residual_state(module: nn.Module) -> Applied | None:
    """Tell how multipliers were put into a module, None if they were not.

    Args:
        module: any, also torch.compile's wrapper of one; a deep copy of a module with multipliers has them too.

    >>> residual_state(nn.Linear(2, 2)) is None
    True
    """
    found = vars(uncompiled(module)).get(_NAME)
    return found if isinstance(found, Applied) else None


def forward_factors(plan: Plan) -> list[tuple[Multiplier, float]]:
    """Multipliers of a plan that change the forward pass, with their factors."""
    factors = [(multiplier, plan.forward_multiplier(multiplier)) for multiplier in plan.multipliers]
    return [(multiplier, factor) for multiplier, factor in factors if factor != 1]


def folded_parameters(module: nn.Module) -> frozenset[str]:
    """Names of the parameters that hold multipliers."""
    applied = residual_state(module)
    return frozenset() if applied is None else applied.folded


def set_applied(module: nn.Module, applied: Applied | None) -> None:
    """Replace what is kept on a module."""
    if applied is None:
        vars(module).pop(_NAME, None)
    else:
        vars(module)[_NAME] = applied


def mark_initialized(module: nn.Module) -> None:
    """Note on a module with multipliers that ``MLUCallback`` answers for its initial weights."""
    applied = residual_state(module)
    assert applied is not None
    set_applied(uncompiled(module), replace(applied, initialized=True))


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module inside a ``torch.compile`` wrapper, which has the names that plans use."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module
