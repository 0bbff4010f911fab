"""Optimizers that nobody has given to ``scale_optimizer``, found and scaled as they make their first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mlu_lightning.application.inner_optimizers import parameters_of, updating
from mlu_lightning.application.optimization import Scaled, ScaledOptimizer, scale_optimizer, scaled_by
from mlu_lightning.application.optimizer_rules import Family
from mlu_lightning.planning import Plan

__all__ = ["scale_at_step"]


def scale_at_step(module: nn.Module, plan: Plan, family: Family | None, scaled: list[Scaled]) -> Callable[[], None]:
    """Scale every optimizer of a module's parameters that makes a step and is not scaled; return what ends this.

    Whoever made it, and wherever its step is called: in ``training_step``, in backward, in another optimizer. Their handles
    go to those of ``scaled``. Steps that go around a scaled one, as a method that was kept before, are scaled, too.

    Raises:
        TypeError: in the step, if its optimizer cannot be scaled or is not known.
        ValueError: in the step, if it has parameters that the plan does not know.
    """
    depths: dict[ScaledOptimizer, int] = {}

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        part = _part(optimizer, scaled)
        if part is None and _is_inside(optimizer, scaled):
            return None
        if part is None and updating(optimizer) == [optimizer]:
            known = {id(parameter) for parameter in module.parameters()}
            if any(id(parameter) in known for parameter in parameters_of(optimizer)):
                scaled.append(scale_optimizer(optimizer, module, plan, family))
                (part,) = scaled[-1].parts
        if part is None or (part.updates and part not in depths):
            return None
        depths[part] = depths.get(part, 0) + 1
        if depths[part] > 1:
            return None
        rest, kwargs = part.begin(args[1:], kwargs)
        return (args[0], *rest), kwargs

    def after(optimizer: Optimizer, *_: Any) -> None:
        part = _part(optimizer, scaled)
        if part is not None and part in depths:
            depths[part] -= 1
            if depths[part] == 0:
                del depths[part]
                part.end()

    hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)

    def end() -> None:
        for hook in hooks:
            hook.remove()
        for part in depths:
            part.end()  # of a step that has failed

    return end


def _part(optimizer: Optimizer, scaled: list[Scaled]) -> ScaledOptimizer | None:
    """Handle of an optimizer, or of one that it shares its list of groups with."""
    parts = (part for each in scaled for part in each.parts if part.active)
    shared = (part for part in parts if part.optimizer.param_groups is optimizer.param_groups)
    return scaled_by(optimizer) or next(shared, None)


def _is_inside(optimizer: Optimizer, scaled: list[Scaled]) -> bool:
    """Whether an optimizer makes a part of another's update, which has given it numbers of its shadow groups."""
    updated = {id(p) for each in scaled for part in each.parts if part.swapped for p in parameters_of(part.optimizer)}
    return any(id(parameter) in updated for parameter in parameters_of(optimizer))
