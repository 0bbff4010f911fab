"""Lightning's clipping of gradients, in a fit of a module whose multipliers are folded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from mlu_lightning.application.clipping import unfolded_gradients
from mlu_lightning.callbacks.wrapped_methods import wrap_method
from mlu_lightning.planning.plan import Plan

__all__ = ["wrap_clipping"]


def wrap_clipping(trainer: Trainer, module: LightningModule, plan: Plan) -> Callable[[], None]:
    """Let a module clip its gradients as those of weights without multipliers, whoever asks for it.

    Args:
        trainer: which is fitting the module.
        module: whose ``configure_gradient_clipping`` and ``clip_gradients`` it is.
        plan: whose multipliers it has in its weights.

    Returns:
        What undoes this.

    >>> from mlu_lightning.models import ResNet
    >>> model = ResNet(depth=1, hidden=4, embedding=2, inputs=1, outputs=1)
    >>> restore = wrap_clipping(Trainer(barebones=True), model, Plan.from_model(model))
    >>> sorted(name for name in vars(model) if "clip" in name)
    ['clip_gradients', 'configure_gradient_clipping']
    >>> restore()
    >>> [name for name in vars(model) if "clip" in name]
    []
    """
    own, clipping = is_overridden("configure_gradient_clipping", module), False

    def clip(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal clipping
        limits = trainer.gradient_clip_val, *args[1:2], kwargs.get("gradient_clip_val")
        # one of the two calls the other; and what is not clipped should not be rounded
        if clipping or not (own or any(limits)):
            return method(*args, **kwargs)
        clipping = True
        try:
            with unfolded_gradients(module, plan):
                return method(*args, **kwargs)
        finally:
            clipping = False

    stack = ExitStack()
    for name in ("configure_gradient_clipping", "clip_gradients"):
        stack.callback(wrap_method(module, name, clip))
    return stack.close
