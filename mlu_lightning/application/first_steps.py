"""Check in the first steps that every weight moves in an update of a scaled optimizer, at the plan's numbers.

It looks at what is, not at what was asked for: whether weights have changed, in whose update, and whether hooks were called.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from mlu_lightning.application.between_updates import BetweenUpdates
from mlu_lightning.application.initial_weights import refuse_exchanged, trained_parameters
from mlu_lightning.application.inner_optimizers import parameters_of
from mlu_lightning.application.multiplier_routes import ActingMultipliers
from mlu_lightning.application.optimization import Scaled, ScaledOptimizer
from mlu_lightning.application.optimizer_rules import is_known
from mlu_lightning.application.own_optimizers import Optimizers
from mlu_lightning.application.plan_names import plan_names
from mlu_lightning.application.used_numbers import refuse_other_numbers
from mlu_lightning.planning import Plan
from mlu_lightning.utilities.names import listed, original_module
from mlu_lightning.utilities.samples import Sample, samples


def verify_steps(module: nn.Module, plan: Plan, *scaled: Scaled) -> None:
    """Let a loop of one's own be stopped in its first two steps where it does not train a module as its plan says.

    As with :class:`~mlu_lightning.MLUCallback`: every multiplier of the forward pass has to be seen, every parameter that
    moves has to do so in an update of these optimizers, and these have to read the numbers of their groups. What is found
    is raised, or warned of, by ``optimizer.step()``.

    Args:
        module: module that has the plan's multipliers, before its first step.
        plan: its plan.
        scaled: handles of all optimizers that update the module, as :func:`scale_optimizer` returns them.

    >>> import torch
    >>> from mlu_lightning import Role, scale_optimizer
    >>> from mlu_lightning.planning import ParameterPlan
    >>> module = nn.Linear(1, 1, bias=False)
    >>> entry = ParameterPlan(Role.STREAM_MATRIX, (1, 1), fans=(4, 1), base_fans=(1, 1))
    >>> plan, optimizer = Plan({"weight": entry}, (), (), ()), torch.optim.SGD(module.parameters(), lr=0.5)
    >>> verify_steps(module, plan, scale_optimizer(optimizer, module, plan))
    >>> module(torch.ones(1)).sum().backward()
    >>> optimizer.step()
    """
    optimizers = Optimizers(original_module(module), plan, given=scaled)
    FirstSteps(original_module(module), plan, optimizers, manual=True, in_loop=True)


class FirstSteps:
    """Watches updates, ever more rarely, until every parameter has moved once, in the update of a scaled optimizer.

    With ``manual``, weights that have an optimizer must not change before its step (otherwise gradients may accumulate
    while forward passes change weights, as ``max_norm`` does); with ``in_loop``, every further update counts as a new
    batch.
    """

    def __init__(
        self, module: nn.Module, plan: Plan, optimizers: Optimizers, manual: bool = False, in_loop: bool = False
    ) -> None:
        self._module, self._plan, self._optimizers, self._manual = module, plan, optimizers, manual
        self._in_loop = in_loop
        self._start = samples(trained_parameters(module, plan))
        self._unmoved = {*self._start}
        self._before: dict[str, Sample] = {}
        self._gradients: dict[str, Sample] = {}  # of an optimizer that is not known
        self._moved: set[str] = set()  # in an update
        self._have_stepped: dict[ScaledOptimizer, None] = {}
        self._idle: set[str] = set()  # warned of
        self._looks = 0  # since the first update, or before it
        self._multipliers = ActingMultipliers(module, plan)
        self._multipliers.track(not in_loop)
        self._between: BetweenUpdates | None = BetweenUpdates(module, self._start)
        optimizers.let_watch(self)

    def end(self) -> None:
        """Look no more at what a whole pass or step does."""
        if self._between is not None:
            self._between.end()
            self._between = None
            self._multipliers.track(False)

    def before_backward(self, loss: Tensor) -> None:
        """Refuse a loss that depends on weights around their multipliers, and what was done since the last step."""
        if self._have_stepped:
            self.look_before_batch()
            self.end()
        if self._between is not None:
            self._multipliers.refuse_detours(loss)

    def after_backward(self) -> None:
        """Look at weights in the middle of a step, and at gradients."""
        if self._between is not None:
            self._between.after_backward(trained_parameters(self._module, self._plan))

    def before_update(self, scaled: ScaledOptimizer) -> None:
        """Note what is about to be updated, and refuse gradients that have not gone through their multiplier."""
        if self._in_loop and scaled in self._have_stepped:
            self.look_before_batch()
            self.look()
        first, first_of_it = not self._have_stepped, scaled not in self._have_stepped
        self._looks = 0 if first else self._looks
        self._have_stepped[scaled] = None
        if self._looks >= _DENSE:
            return
        own = self._own(scaled)
        self._before = samples({name: p for name, p in own.items() if name in self._unmoved})
        self._gradients = {}
        if first_of_it and not is_known(scaled.optimizer):
            self._gradients = samples({name: grad for name, p in own.items() if (grad := p.grad) is not None})
        if first and not self._manual:
            _refuse_changed_in_step([name for name, now in self._before.items() if not now.is_near(self._start[name])])
        if self._between is not None:
            self._between.before_update(own)
        self._multipliers.refuse_unseen({name: parameter.grad for name, parameter in own.items()})

    def after_update(self, scaled: ScaledOptimizer) -> None:
        """Note what was updated."""
        if not self._before and self._between is None:
            return
        own, before, self._before = self._own(scaled), self._before, {}
        found = samples(own)
        moved = {name for name, then in before.items() if name in found and not then.is_of(found[name])}
        self._moved |= moved
        if self._between is not None:
            self._between.after_update(found)
        if not is_known(scaled.optimizer):
            for split in scaled.splits:
                refuse_other_numbers(split.shadows, own, scaled.planned, (before, found, self._gradients))

    def after_wrapped_update(self, parameters: Iterable[Tensor]) -> None:
        """Note what an optimizer has made of the updates of those in it, as Lookahead does."""
        if self._between is not None:
            members = {id(parameter) for parameter in parameters}
            trained = trained_parameters(self._module, self._plan).items()
            self._between.after_update(samples({name: p for name, p in trained if id(p) in members}))

    def look_before_batch(self) -> None:
        """Look at what was done to weights after the first step."""
        if self._between is not None and self._have_stepped:
            refuse_exchanged(self._module, self._plan)
            trained = trained_parameters(self._module, self._plan)
            held = self._refuse_strays(trained)[1]
            self._warn_of_idle([name for name in trained if name in self._start and name not in held])
            self._between.before_batch(trained)

    def look(self, is_step: bool = False) -> None:
        """Refuse parameters that moved outside of these optimizers' updates, or in one of other numbers.

        ``is_step`` says that a step was made in the eyes of the Trainer.
        """
        self._multipliers.forget()
        if self._have_stepped and self._looks >= 1:
            self.end()
        if not self._unmoved:
            self._optimizers.let_watch(None if self._between is None else self)
            return
        self._looks += 1
        if self._looks > _DENSE and self._looks & (self._looks - 1):
            return
        trained = trained_parameters(self._module, self._plan)
        moved, held = self._refuse_strays(trained, is_step)
        if self._have_stepped and self._looks == 1:
            self._warn_of_idle([name for name in trained if name in self._unmoved and name not in held])
        self._unmoved &= trained.keys() - (moved if self._have_stepped else set())

    def _refuse_strays(self, trained: Mapping[str, Tensor], is_step: bool = False) -> tuple[set[str], set[str]]:
        """Refuse parameters that have moved without an update; find those that have moved, and those of optimizers."""
        now = samples({name: p for name, p in trained.items() if name in self._unmoved})
        moved = {name for name, found in now.items() if not self._start[name].is_of(found)}
        names = plan_names(self._module, self._plan)
        held = _names(names, self._optimizers.parts)
        explained = set(self._moved)
        if self._looks > _DENSE:
            explained |= _names(names, self._have_stepped)
        elif not (self._have_stepped or self._manual or is_step):
            explained |= held
        _refuse_strays(moved - explained)
        return moved, held

    def _warn_of_idle(self, idle: list[str]) -> None:
        if idle := [name for name in idle if name not in self._idle]:
            self._idle |= {*idle}
            rank_zero_warn(
                "Parameters of the plan belong to no optimizer that is known in the first step, so they stay as they are: "
                f"{listed(idle)}. If that is as it should be, requires_grad_(False) says so. Where they were made anew, let "
                "that be done before configure_optimizers."
            )

    def _own(self, scaled: ScaledOptimizer) -> dict[str, Tensor]:
        names = plan_names(self._module, self._plan)
        named = ((names.get(id(parameter)), parameter) for parameter in parameters_of(scaled.optimizer))
        return {name: parameter for name, parameter in named if name in self._start}


_DENSE = 8  # steps that are all looked at; after these every power of two is


def _names(names: Mapping[int, str], optimizers: Iterable[ScaledOptimizer]) -> set[str]:
    return {names[id(p)] for each in optimizers for p in parameters_of(each.optimizer) if id(p) in names}


def _refuse_changed_in_step(changed: Sequence[str]) -> None:
    if changed:
        raise ValueError(
            f"Weights have changed in the first step before an optimizer's update: {listed(changed)}. What does it may be "
            "training_step or a forward pass (weights that are drawn when they are first used, max_norm of an embedding) "
            "or code after backward (a decay of its own), and the plan knows nothing of that. Draw weights before the fit, "
            "leave decay to the optimizer, or, if it is as it should be, give MLUCallback verify=False."
        )


def _refuse_strays(strays: set[str]) -> None:
    if strays:
        raise ValueError(
            "Weights have moved in the first steps, but in no update of an optimizer that is scaled: "
            f"{listed(sorted(strays))}. So their learning rates are not those of the plan. Update them with an optimizer of "
            "torch.optim, or with another torch.optim.Optimizer and its family=... for MLUCallback or scale_optimizer; or "
            "multiply your numbers by those of plan.scales(family), and give MLUCallback verify=False."
        )
