"""Verify in a fit that weights, optimizers and multipliers are in effect as ``MLUCallback`` has set them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from mlu_lightning.application import is_scaled
from mlu_lightning.application.applied import mark_initialized
from mlu_lightning.application.first_steps import FirstSteps
from mlu_lightning.application.initial_weights import InitialWeights, kept_as_built, refuse_changed, refuse_exchanged
from mlu_lightning.application.own_optimizers import Optimizers
from mlu_lightning.callbacks.passing_changes import PassingChanges, wrap_method
from mlu_lightning.planning import Plan
from mlu_lightning.table import Role
from mlu_lightning.utilities.lightning_private import is_mock_optimizer
from mlu_lightning.utilities.names import listed, planned_parameters


class Verification:
    """What looks at a module from when it has its weights until it was trained for a few steps."""

    def __init__(
        self, module: LightningModule, plan: Plan, optimizers: Optimizers, initialized: bool, said: Iterable[str] = ()
    ) -> None:
        self._module, self._plan, self._optimizers = module, plan, optimizers
        self._said = tuple(said)  # patterns of overrides
        self._weights = InitialWeights(module, plan) if initialized else None
        self._kept: dict[str, Tensor] = kept_as_built(module, plan) if initialized else {}
        self._loaded = False
        self._first_step = 0
        self.steps: FirstSteps | None = None

    def look(self, who: str) -> None:
        """Look at the weights, which somebody may have changed since the last time."""
        if self._weights is not None and self._loaded:
            self._weights, self._loaded = InitialWeights(self._module, self._plan), False
        elif self._weights is not None:
            self._weights.look(who)

    def loaded(self) -> None:
        """Take the weights as they will be the next time, because callbacks are loading those of a checkpoint."""
        self._loaded = True

    def start(self, trainer: Trainer, changes: PassingChanges, compare: Callable[[], object]) -> None:
        """Refuse weights that have changed, now and before the first step, and compare what the module computes then."""
        who = "the module or another callback"
        self._refuse(trainer, f"in on_fit_start, or in on_train_start or the sanity check, of {who}")

        def begin(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            restore()
            skip = method(*args, **kwargs)
            self._refuse(trainer, "in on_train_start, on_train_epoch_start or on_train_batch_start")
            compare()
            if self._weights is not None:
                self._kept |= self._weights.changed_while_frozen
            self._weights, self._first_step = None, trainer.global_step
            manual = not self._module.automatic_optimization
            self.steps = steps = FirstSteps(self._module, self._plan, self._optimizers, manual)
            changes.note(steps.end)
            return skip

        self._watch_unreached(changes)
        # the last hook before the first step
        restore = wrap_method(self._module, "on_train_batch_start", begin, changes.note)

    def _watch_unreached(self, changes: PassingChanges) -> None:
        """Warn where a gradient reaches what was left alone because no loss of the example did."""
        entries = self._plan.parameters
        left = [name for name, entry in entries.items() if entry.role is Role.FROZEN]
        if all(entry.is_at_base for entry in entries.values() if entry.role is not Role.FROZEN):
            return

        def reach(name: str, gradient: Tensor) -> None:
            if left and bool(gradient.any()):
                rank_zero_warn(
                    f"{name} has a gradient, and is one of {len(left)} parameters that the plan leaves alone, because no "
                    "loss of the batch that it was planned with reaches them: they are trained with the base's learning "
                    "rates, and not with those of this shape. Give MLUCallback example=..., a batch whose loss reaches all "
                    'that is trained, or roles in overrides ("frozen" if it is as it should be).'
                )
                left.clear()

        parameters = planned_parameters(self._module)
        for name in left:
            said = any(fnmatch.fnmatchcase(name, pattern) for pattern in self._said)
            if name in parameters and parameters[name].requires_grad and not said:
                # torch has no types for it
                handle = parameters[name].register_hook(partial(reach, name))  # type: ignore[no-untyped-call]
                changes.note(handle.remove)

    def batch_end(self, trainer: Trainer) -> None:
        """Look at what has moved."""
        if self.steps is not None:
            self.steps.look(is_step=trainer.global_step > self._first_step)
        self._warn_of_kept()

    def _warn_of_kept(self) -> None:
        """Say which weights are trained that required no gradient when the others got their scale."""
        trained = sorted(name for name, parameter in self._kept.items() if parameter.requires_grad)
        if trained:
            self._kept = {name: parameter for name, parameter in self._kept.items() if name not in trained}
            rank_zero_warn(
                "Parameters are trained that required no gradient when MLUCallback set the scale of initial weights, or "
                f"when they were changed since, so they have not that of their plan: {listed(trained)}. This is as it "
                "should be for weights that were trained before. If they were drawn, let them require gradients until then: "
                "freeze them in on_fit_start, or in a callback that comes after MLUCallback, as they are."
            )

    def _refuse(self, trainer: Trainer, who: str) -> None:
        refuse_exchanged(self._module, self._plan)
        self._warn_of_kept()
        self.look(who)
        if self._weights is not None:
            # those of the first process: DDP gives them to the others, which had weights of their own before
            changed = trainer.strategy.broadcast(self._weights.changed)
            if changed:
                mark_initialized(self._module, False)  # so that the next fit does not take them for initialized
            refuse_changed(changed)


def refuse_unscaled(optimizer: Optimizer) -> None:
    """Refuse an update that is nobody's: what has the module's parameters was scaled when its step began."""
    if not is_mock_optimizer(optimizer) and not is_scaled(optimizer):
        raise ValueError(
            f"The {type(optimizer).__name__} that is about to make a step has none of the module's parameters, as a "
            "copy of an optimizer has not: it was put in the place of another since, and the module would stay. "
            "Make it from module.parameters(), or change the groups of the optimizer that is there, whose factors stay."
        )
