"""What became of a plan that was applied: initial weights until training starts, updates and multipliers in its first steps.

It looks at what is, not at what was asked for: whether weights have changed, in whose update, and whether hooks were called.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from mlu_lightning.application.applied import residual_state
from mlu_lightning.application.hooks import sites_seen
from mlu_lightning.application.inner_optimizers import parameters_of
from mlu_lightning.application.optimization import ScaledOptimizer
from mlu_lightning.application.optimizer_rules import is_known
from mlu_lightning.application.own_optimizers import Optimizers
from mlu_lightning.application.plan_names import plan_names
from mlu_lightning.planning import Multiplier, Plan
from mlu_lightning.table import Role
from mlu_lightning.utilities.checksums import Checksum, checksums
from mlu_lightning.utilities.names import listed

__all__ = ["FirstSteps", "InitialWeights", "refuse_changed"]


class InitialWeights:
    """Weights as ``initialize`` has set them, or a checkpoint, and which of them somebody has changed since."""

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self._module, self._plan = module, plan
        self.changed: dict[str, str] = {}  # names, and what may have done it
        self._sums = checksums(_trained(module, plan), rough=True)

    def look(self, who: str) -> None:
        """Look whether weights are what they were; if they are not, it was somebody since the last time."""
        before, self._sums = self._sums, checksums(_trained(self._module, self._plan), rough=True)
        changed = (name for name, found in self._sums.items() if name in before and not before[name].is_of(found))
        self.changed = {**dict.fromkeys(changed, who), **self.changed}


def refuse_changed(changed: Mapping[str, str]) -> None:
    """Stop a run whose initial weights are not those that were set."""
    if changed:
        who = " or ".join(dict.fromkeys(changed.values()))
        raise ValueError(
            f"Initial weights that MLUCallback has set were changed before the first step: {listed(changed)}. It was done "
            f"{who}. Draw or load weights before MLUCallback sets their scale: in __init__, setup or configure_model of the "
            "module, or in setup of a callback that comes before it, and fit a module that was built anew; or, if these are "
            "to be trained as they are, give MLUCallback init=None."
        )


class FirstSteps:
    """Watches updates until every parameter has moved once, in the update of a scaled optimizer.

    Looked at are the first steps, and then ever fewer: what is frozen for long costs nothing.

    Args:
        module: module whose training begins.
        plan: its plan.
        optimizers: all that are known to update it.
        manual: whether weights that have an optimizer should not change before it makes a step, as in manual optimization;
            otherwise gradients may be accumulated first, while forward passes change weights, as ``max_norm`` does.
    """

    def __init__(self, module: nn.Module, plan: Plan, optimizers: Optimizers, manual: bool = False) -> None:
        self._module, self._plan, self._optimizers, self._manual = module, plan, optimizers, manual
        self._start = checksums(_trained(module, plan))
        self._unmoved = {*self._start}
        self._before: dict[str, Checksum] = {}
        self._moved: set[str] = set()  # in an update
        self._unread: dict[str, str] = {}  # by parameter: what its update has not asked for
        self._have_stepped: dict[ScaledOptimizer, None] = {}
        self._looks = 0  # since the first update, or before it
        self._unseen = _guarded(module, plan)
        optimizers.let_watch(self)

    def before_update(self, scaled: ScaledOptimizer) -> bool:
        """Note what is about to be updated, and refuse gradients that have not gone through their multiplier."""
        first = not self._have_stepped
        self._looks = 0 if first else self._looks
        self._have_stepped[scaled] = None
        if self._looks >= _DENSE:
            return False
        own = self._own(scaled)
        self._before = checksums(own)
        if first and not self._manual:
            _refuse_changed_in_step([name for name in own if not self._before[name].is_of(self._start[name])])
        if self._unseen:
            self._require_multipliers(own)
        return not is_known(scaled.optimizer)

    def after_update(self, scaled: ScaledOptimizer) -> None:
        """Note what was updated."""
        if not self._before:
            return
        own, before, self._before = self._own(scaled), self._before, {}
        moved = {name for name, found in checksums(own).items() if not before[name].is_of(found)}
        self._moved |= moved
        for shadow in scaled.shadows:
            for key in shadow.unread:
                members = {id(parameter) for parameter in shadow.given["params"]}
                self._unread |= {name: key for name in moved if id(own[name]) in members}

    def look(self) -> None:
        """Look at what has moved since training began, as after each batch.

        Raises:
            ValueError: if a parameter has moved, but not in an update of these, or in one that has not read its numbers.
        """
        if not self._unmoved:
            return
        self._looks += 1
        if self._looks > _DENSE and self._looks & (self._looks - 1):
            return
        _refuse_unread(self._unread)
        trained = _trained(self._module, self._plan)
        now = checksums({name: p for name, p in trained.items() if name in self._unmoved})
        moved = {name for name, found in now.items() if not self._start[name].is_of(found)}
        names = plan_names(self._module, self._plan)
        held = _names(names, self._optimizers.parts)
        explained = set(self._moved)
        if self._looks > _DENSE:
            explained |= _names(names, self._have_stepped)
        elif not (self._have_stepped or self._manual):
            explained |= held
        _refuse_strays(moved - explained)
        if self._have_stepped and self._looks == 1:
            _warn_of_idle([name for name in now if name not in held])
        self._unmoved &= trained.keys() - (moved if self._have_stepped else set())
        if not self._unmoved:
            self._optimizers.let_watch(None)

    def _own(self, scaled: ScaledOptimizer) -> dict[str, Tensor]:
        names = plan_names(self._module, self._plan)
        named = ((names.get(id(parameter)), parameter) for parameter in parameters_of(scaled.optimizer))
        return {name: parameter for name, parameter in named if name is not None and name in self._unmoved}

    def _require_multipliers(self, own: Mapping[str, Tensor]) -> None:
        applied = residual_state(self._module)
        assert applied is not None
        seen = sites_seen(applied.hooks)
        self._unseen = {m: names for m, names in self._unseen.items() if m.site not in seen}
        for multiplier, names in self._unseen.items():
            reached = [n for n in names if (p := own.get(n)) is not None and p.grad is not None and bool(p.grad.any())]
            if reached:
                raise ValueError(
                    f"The multiplier of the {multiplier.kind} {multiplier.name!r} was not seen in the forward pass: its "
                    f"hook on {multiplier.site} was not called, but {listed(reached)} got a gradient. Hooks run where a "
                    "module is called, not where its forward is, or code that was traced before they were attached. "
                    'Call the module, or put the multiplier into the weights: residual="fold", or fold(module, plan).'
                )


_DENSE = 8
"""Steps that are all looked at; after these every power of two is."""


def _trained(module: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Parameters of a plan that are trained: others, such as those of a teacher, are somebody's own business."""
    names = plan_names(module, plan)
    named = ((names[id(parameter)], parameter) for parameter in module.parameters())
    roles = plan.roles
    return {name: p for name, p in named if p.requires_grad and roles.get(name, Role.FROZEN) is not Role.FROZEN}


def _names(names: Mapping[int, str], optimizers: Iterable[ScaledOptimizer]) -> set[str]:
    return {names[id(p)] for each in optimizers for p in parameters_of(each.optimizer) if id(p) in names}


def _guarded(module: nn.Module, plan: Plan) -> dict[Multiplier, tuple[str, ...]]:
    """Parameters that get a gradient through a multiplier's hook alone, by multiplier."""
    applied = residual_state(module)
    acting = {} if applied is None else applied.acting
    of_branch: dict[str, list[str]] = {}
    for name, parameter in plan.parameters.items():
        if parameter.branch is not None:
            of_branch.setdefault(plan.branches[parameter.branch].name, []).append(name)
    return {m: m.folds or tuple(of_branch.get(m.name, ()) if m.kind == "branch" else ()) for m in acting}


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


def _refuse_unread(unread: Mapping[str, str]) -> None:
    if unread:
        keys = " and ".join(sorted({*unread.values()}))
        raise ValueError(
            f"An optimizer has updated {listed(sorted(unread))} without reading {keys} in its parameter groups, where the "
            "plan multiplies it. Let its step read it there; let the optimizer that makes its update be an attribute of it; "
            "and leave out of its groups what it has no use for."
        )


def _warn_of_idle(idle: list[str]) -> None:
    if idle:
        rank_zero_warn(
            f"Parameters of the plan belong to no optimizer that is known in the first step, so they stay as they are: "
            f"{listed(idle)}. If that is as it should be, requires_grad_(False) says so."
        )
