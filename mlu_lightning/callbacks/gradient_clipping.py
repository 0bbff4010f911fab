"""Make Lightning's gradient clipping right for a module whose multipliers are folded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from mlu_lightning.application import unfolded_gradients, unfolded_weights
from mlu_lightning.callbacks.passing_changes import PassingChanges, wrap_method
from mlu_lightning.planning import Plan
from mlu_lightning.utilities.lightning_namespaces import is_hook_overridden


def wrap_clipping(trainer: Trainer, module: LightningModule, plan: Plan, changes: PassingChanges) -> None:
    """Let a module clip its gradients as those of weights without multipliers, whoever asks."""
    own, clipping = is_hook_overridden("configure_gradient_clipping", module), False

    def clip(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal clipping
        limits = trainer.gradient_clip_val, *args[1:2], kwargs.get("gradient_clip_val")
        # one of the two calls the other; and what is not clipped should not be rounded
        if clipping or not (own or any(limits)):
            return method(*args, **kwargs)
        clipping = True
        try:
            # what is the module's own may clip by the size of weights
            with unfolded_weights(module, plan) if own else nullcontext(), unfolded_gradients(module, plan):
                return method(*args, **kwargs)
        finally:
            clipping = False

    for name in ("configure_gradient_clipping", "clip_gradients"):
        wrap_method(module, name, clip, changes.note)
