"""All optimizers of a module: those that are given, and others that are found and scaled at their first step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from mlu_lightning.application.inner_optimizers import parameters_of, updating
from mlu_lightning.application.optimization import Scaled, ScaledOptimizer, Watch, prepared, scaled_by
from mlu_lightning.application.optimizer_rules import Family
from mlu_lightning.planning import Plan


class Optimizers:
    """Optimizers of a module's parameters that are scaled by one plan, and what watches their updates."""

    def __init__(
        self, module: nn.Module, plan: Plan, family: Family | None = None, given: Iterable[Scaled] = ()
    ) -> None:
        self._module, self._plan, self._family = module, plan, family
        self._scaled = [*given]
        self._watch: Watch | None = None
        self._depths: dict[ScaledOptimizer, int] = {}  # of steps that go around the scaled one
        self._hooks: list[RemovableHandle] = []  # of all optimizers there are

    @property
    def parts(self) -> list[ScaledOptimizer]:
        """Handles of all that are scaled themselves."""
        return [part for scaled in self._scaled for part in scaled.parts]

    def add(self, optimizer: Optimizer | LightningOptimizer) -> Scaled:
        """Scale one more."""
        scaled = prepared(optimizer, self._module, self._plan, self._family)
        self._scaled.append(scaled)  # before it starts, so that remove() finds it
        scaled.start()
        self.let_watch(self._watch)
        return scaled

    def let_watch(self, watch: Watch | None) -> None:
        """Let updates be watched, also those of optimizers to come."""
        self._watch = watch
        for part in self.parts:
            part.watch = watch

    def remove(self) -> None:
        """Make all of them plain again, and scale no others."""
        _remove(self._hooks)
        for part in self._depths:
            part.end()  # of a step that has failed
        while self._scaled:
            self._scaled[-1].remove()
            self._scaled.pop()

    def add_at_step(self) -> None:
        """Scale every optimizer of the module's parameters, whoever made it, at its first step, until :meth:`remove`.

        That includes steps that bypass the scaled one, such as a method that was kept from before.
        """
        # torch keeps them for all optimizers, and a fit whose end nobody was told should not keep its module
        own = weakref.ref(self)

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
            optimizers = own()
            return None if optimizers is None else optimizers._before_step(optimizer, args, kwargs)

        def after(optimizer: Optimizer, *_: Any) -> None:
            optimizers = own()
            if optimizers is not None:
                optimizers._after_step(optimizer)

        weakref.finalize(self, _remove, self._hooks)
        self._hooks.append(register_optimizer_step_pre_hook(before))
        self._hooks.append(register_optimizer_step_post_hook(after))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        part, depths = self._part(optimizer), self._depths
        if part is None and not self._is_inside(optimizer) and updating(optimizer) == [optimizer]:
            known = {id(parameter) for parameter in self._module.parameters()}
            if any(id(parameter) in known for parameter in parameters_of(optimizer)):
                (part,) = self.add(optimizer).parts
        if part is None or (part.updates and part not in depths):
            return None
        depths[part] = depths.get(part, 0) + 1
        if depths[part] > 1:
            return None
        rest, kwargs = part.begin(args[1:], kwargs)
        return (args[0], *rest), kwargs

    def _after_step(self, optimizer: Optimizer) -> None:
        part, depths = self._part(optimizer), self._depths
        if part is not None and part in depths:
            depths[part] -= 1
            if depths[part] == 0:
                del depths[part]
                part.end()
        elif part is None and self._watch is not None:
            self._watch.after_wrapped_update(parameters_of(optimizer))

    def _part(self, optimizer: Optimizer) -> ScaledOptimizer | None:
        """Handle of an optimizer, or of one that it shares its list of groups with."""
        shared = (part for part in self.parts if part.active and part.optimizer.param_groups is optimizer.param_groups)
        return scaled_by(optimizer) or next(shared, None)

    def _is_inside(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer makes a part of another's update, which has given it numbers of its shadow groups."""
        updated = {id(p) for part in self.parts if part.swapped for p in parameters_of(part.optimizer)}
        return any(id(parameter) in updated for parameter in parameters_of(optimizer))


def _remove(hooks: Iterable[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
