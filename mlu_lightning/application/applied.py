"""What has been applied to a module, kept on it as one value."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from mlu_lightning.planning import Multiplier, Plan
from mlu_lightning.planning.fingerprint import fingerprint
from mlu_lightning.utilities.names import original_module

Mode = Literal["hook", "fold", "baked"]  # in hooks, in weights as far as they fold, or in weights altogether

_NAME = "_mlu_applied"


@dataclass(frozen=True)
class Applied:
    """A plan whose multipliers are in a module, and how; copies of the module have it, as handles find hooks in a copy."""

    plan: Plan
    mode: Mode
    hooks: tuple[RemovableHandle, ...] = field(default=(), compare=False)
    initialized: bool = field(default=False, compare=False)  # whether MLUCallback answers for the initial weights

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the plan."""
        return fingerprint(self.plan)

    @property
    def acting(self) -> dict[Multiplier, float]:
        """Multipliers that act in the forward pass besides the weights, with their factors."""
        factors = {} if self.mode == "baked" else self.plan.forward_factors
        return {m: factor for m, factor in factors.items() if self.mode == "hook" or not m.folds}

    @property
    def folded(self) -> frozenset[str]:
        """Names of the parameters that hold their multipliers."""
        return frozenset() if self.mode == "hook" else frozenset(self.plan.folded_factors)

    def is_of(self, plan: Plan) -> bool:
        """Whether these are the multipliers of a plan, or of one with equal numbers."""
        return plan is self.plan or fingerprint(plan) == self.fingerprint


def residual_state(module: nn.Module) -> Applied | None:
    """Tell how multipliers were put into a module, or into what torch.compile has wrapped; None if they were not."""
    found = vars(original_module(module)).get(_NAME)
    return found if isinstance(found, Applied) else None


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


def mark_initialized(module: nn.Module, initialized: bool = True) -> None:
    """Note on a module with multipliers whether ``MLUCallback`` answers for its initial weights."""
    applied = residual_state(module)
    assert applied is not None
    set_applied(original_module(module), replace(applied, initialized=initialized))
