"""Put a plan's forward multipliers into a module: attached as hooks, or folded into its weights.

Both make the same function. Hooks leave the weights as they are and cost a multiplication per branch; folded weights
cost nothing per step and make a checkpoint that any plain model loads, unless a multiplier has no weight and stays a
hook. A run stays the same either way if the optimizer is scaled for the form that was chosen, which
:func:`residual_state` tells (theory.md, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mlu_lightning.application.hooks import attach_hooks, detach_hooks
from mlu_lightning.planning.entries import Multiplier
from mlu_lightning.planning.fingerprint import fingerprint
from mlu_lightning.planning.plan import Plan
from mlu_lightning.utilities.names import planned_parameters

__all__ = [
    "MultiplierHandle",
    "ResidualState",
    "applied_plan",
    "attach_again",
    "attach_multipliers",
    "check_attached",
    "fold",
    "mark_baked",
    "residual_state",
    "uncompiled",
    "unfolded",
]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_STATE = "_mlu_residual_state"


@dataclass(frozen=True)
class ResidualState:
    """How a plan's multipliers were put into a module.

    Args:
        mode: ``"hook"``, ``"fold"``, or ``"baked"``: in weights, those too that folding leaves to hooks.
        folded: names of the parameters that hold their multipliers; empty in hook mode.
        fingerprint: :func:`fingerprint` of the plan.

    >>> ResidualState("hook", frozenset(), "5f0c").folded
    frozenset()
    """

    mode: Literal["hook", "fold", "baked"]
    folded: frozenset[str]
    fingerprint: str


class MultiplierHandle:
    """Takes attached multipliers off again."""

    def __init__(self, module: nn.Module) -> None:
        """Keep what one :func:`attach_multipliers` did.

        Args:
            module: the module that has the multipliers now.
        """
        self._module = module
        self._applied = _applied(module)

    def remove(self) -> None:
        """Remove the hooks; the module is as before :func:`attach_multipliers`.

        A second call does nothing, nor does one after the multipliers went into the weights.
        """
        if self._applied is not None and _applied(self._module) is self._applied:
            self._applied.remove(self._module)


def attach_multipliers(module: nn.Module, plan: Plan) -> MultiplierHandle:
    """Multiply the module's branches, readouts and attention logits by the plan's factors, with hooks.

    Branches by α/l, readouts by 1/d (theory.md, section 3). Weights and ``state_dict`` keys stay as they are, and
    nothing is attached where the factor is exactly 1. Code that ``torch.compile`` made before is dropped, because it
    would go on without the hooks.

    Args:
        module: the module that the plan was made for; changed in place.
        plan: its plan.

    Returns:
        A handle with ``.remove()``.

    Raises:
        ValueError: if the plan does not fit the module, if multipliers are already in it, or if a hook has no place.

    >>> from mlu_lightning import Plan
    >>> from mlu_lightning.discovery.structure import Site
    >>> plan = Plan({}, (), (), (Multiplier("mlp", "branch", 0.5, Site("mlp"), ()),))
    >>> module = nn.ModuleDict({"mlp": nn.Identity()})
    >>> handle = attach_multipliers(module, plan)
    >>> module["mlp"](torch.ones(2))
    tensor([0.5000, 0.5000])
    >>> handle.remove()
    >>> module["mlp"](torch.ones(2))
    tensor([1., 1.])
    """
    module = uncompiled(module)
    _check_fresh(module, plan)
    active = [(m, plan.forward_multiplier(m)) for m in plan.multipliers if plan.forward_multiplier(m) != 1]
    for multiplier, _ in active:
        _check_place(multiplier)
        if multiplier.site is None:
            raise ValueError(
                f"The multiplier of the {multiplier.kind} {multiplier.name!r} cannot be attached as a hook, because no "
                'submodule has it as its output or input. Put it into the weights instead: residual="fold", or '
                "fold(module, plan)."
            )
    hooks = attach_hooks(module, active)
    module.__dict__[_STATE] = _Applied(ResidualState("hook", frozenset(), fingerprint(plan)), plan, tuple(hooks))
    return MultiplierHandle(module)


def fold(module: ModuleT, plan: Plan, multiplied: bool = False) -> ModuleT:
    """Multiply the plan's factors into the weights that write to branches, readouts and attention logits.

    The function is that of :func:`attach_multipliers`; ``state_dict`` keys stay as they are. A readout tied to an
    embedding cannot be folded: its multiplier becomes a hook in this mode too (theory.md, section 3). A module that has
    the plan's multipliers as hooks is the same function before and after: they move into the weights. An optimizer that
    was scaled for it has to be scaled anew then; to leave the package behind, see :func:`mlu_lightning.bake`. Gradients of
    folded weights are larger by 1/factor: clip them in :func:`mlu_lightning.unfolded_gradients`.

    Args:
        module: the module that the plan was made for, plain or with the plan's hooks; changed in place.
        plan: its plan.
        multiplied: the weights already hold their multipliers, as those of a folded run's checkpoint do: multiply
            nothing, and attach only the hooks.

    Returns:
        The same module.

    Raises:
        ValueError: if the plan does not fit the module, if multipliers are already in it, if one can be neither folded
            nor attached, or if a parameter cannot be multiplied. Nothing was changed then.

    >>> from mlu_lightning import Plan, Role
    >>> from mlu_lightning.planning import ParameterPlan
    >>> module = nn.Linear(2, 2, bias=False)
    >>> before = module.weight.detach().clone()
    >>> weight = ParameterPlan(Role.BRANCH_OUT, (2, 2), fans=(2, 2), base_fans=(2, 2), depth=2)
    >>> plan = Plan({"weight": weight}, (), (), (Multiplier("mlp", "branch", 0.5, None, ("weight",)),))
    >>> torch.equal(fold(module, plan).weight, before * 0.5)
    True
    >>> residual_state(module).mode, residual_state(module).folded
    ('fold', frozenset({'weight'}))
    """
    plain = uncompiled(module)
    hooks = None if multiplied else _applied(plain)
    if hooks is not None and hooks.state == ResidualState("hook", frozenset(), fingerprint(plan)):
        plan.check(plain)
    else:
        hooks = None
        _check_fresh(plain, plan)
    factors: dict[str, float] = {}
    attached: list[tuple[Multiplier, float]] = []
    for multiplier in plan.multipliers:
        factor = plan.forward_multiplier(multiplier)
        if factor == 1:
            continue
        _check_place(multiplier)
        if not multiplier.folds:
            attached.append((multiplier, factor))
        for name in multiplier.folds:
            factors[name] = factors.get(name, 1.0) * factor
    parameters = _foldable(plain, factors, multiplied)
    if hooks is not None:
        hooks.remove(plain)
    rest = attach_hooks(plain, attached)
    if not multiplied:
        with torch.no_grad():
            for name, factor in factors.items():
                parameters[name].mul_(factor)
    plain.__dict__[_STATE] = _Applied(ResidualState("fold", frozenset(factors), fingerprint(plan)), plan, tuple(rest))
    return module


def residual_state(module: nn.Module) -> ResidualState | None:
    """Tell how multipliers were put into a module, None if they were not.

    Args:
        module: any module; a deep copy of one with multipliers has them too.

    >>> residual_state(nn.Linear(2, 2)) is None
    True
    """
    applied = _applied(uncompiled(module))
    return None if applied is None else applied.state


def applied_plan(module: nn.Module) -> Plan | None:
    """The plan whose multipliers are in a module, None if there is none.

    Args:
        module: any.

    >>> applied_plan(nn.Linear(2, 2)) is None
    True
    """
    applied = _applied(uncompiled(module))
    return None if applied is None else applied.plan


def check_attached(module: nn.Module) -> None:
    """Refuse a module of which parts with multipliers were exchanged for others, which have none.

    Args:
        module: any.

    Raises:
        ValueError: if a hook that was attached is not on the module now. Weights do not tell whether they are folded.

    >>> check_attached(nn.Linear(1, 1))
    """
    module = uncompiled(module)
    applied = _applied(module)
    if applied is None:
        return
    parts = list(module.modules())
    present = {id(hooks) for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)}
    for hook in applied.hooks:
        hooks = hook.hooks_dict_ref()
        if hooks is None or id(hooks) not in present or hook.id not in hooks:
            raise ValueError(
                "A part of the module that had a multiplier was exchanged for another, which has none, or its hooks were "
                "removed, so the module is no longer the plan's. Exchange parts before the module is given to "
                "MLUCallback or attach_multipliers, or load new weights into the part that is there."
            )


def attach_again(module: nn.Module, plan: Plan) -> None:
    """Attach the hooks of a module anew, after parts were exchanged for others of the same weights.

    Args:
        module: that has the plan's multipliers.
        plan: its plan.

    >>> from mlu_lightning.discovery.structure import Site
    >>> module, plan = nn.Sequential(nn.ReLU()), Plan({}, (), (), (Multiplier("0", "branch", 0.5, Site("0"), ()),))
    >>> handle = attach_multipliers(module, plan)
    >>> module[0] = nn.Identity()
    >>> attach_again(module, plan)
    >>> module(torch.ones(2))
    tensor([0.5000, 0.5000])
    """
    active, applied = unfolded(module, plan), _applied(module)
    assert applied is not None
    detach_hooks(module, applied.hooks)
    module.__dict__[_STATE] = replace(applied, hooks=tuple(attach_hooks(module, active.items())))


def unfolded(module: nn.Module, plan: Plan) -> dict[Multiplier, float]:
    """Multipliers that act in a module's forward pass besides its weights, and their factors.

    Args:
        module: that has the plan's multipliers.
        plan: its plan.

    Raises:
        ValueError: if the multipliers are not in the module, or another plan's are.
    """
    state = residual_state(module)
    if state is None:
        raise ValueError(
            "The module does not have the plan's multipliers, and weights alone do not tell whether they hold them. Put "
            "them in as they were in training: attach_multipliers(module, plan) after a run with hooks, fold(module, "
            "plan, multiplied=True) after one with folded weights, or restore_multipliers(module, checkpoint), which "
            "takes them from a checkpoint of MLUCallback."
        )
    if state.fingerprint != fingerprint(plan):
        raise ValueError(
            "The module has the multipliers of another plan. Give the plan that it was trained with, such as "
            "MLUCallback.plan after fit."
        )
    if state.mode == "baked":
        return {}
    acting = (m for m in plan.multipliers if state.mode == "hook" or not m.folds)
    return {m: plan.forward_multiplier(m) for m in acting if plan.forward_multiplier(m) != 1}


def mark_baked(module: nn.Module, plan: Plan) -> None:
    """Note that weights hold all of the plan's multipliers, and remove what hooks folding left; if none, it stays folded.

    Args:
        module: with folded multipliers, or with baked weights that were loaded.
        plan: whose multipliers they are.

    >>> module = nn.Linear(1, 1)
    >>> mark_baked(module, Plan({}, (), (), ()))
    >>> residual_state(module).mode
    'baked'
    """
    module = uncompiled(module)
    applied = _applied(module)
    if applied is not None:
        if not applied.hooks:
            return
        applied.remove(module)
    folded = frozenset(name for m in plan.multipliers if plan.forward_multiplier(m) != 1 for name in m.folds)
    module.__dict__[_STATE] = _Applied(ResidualState("baked", folded, fingerprint(plan)), plan, ())


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module inside a ``torch.compile`` wrapper, which has the names that plans use.

    Args:
        module: any.
    """
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module


@dataclass(frozen=True)
class _Applied:
    """What was done to a module, kept on it; torch handles find their hooks in copies of the module, too.

    Args:
        state: how the multipliers were put in.
        plan: whose they are.
        hooks: a torch handle for each hook.
    """

    state: ResidualState
    plan: Plan
    hooks: tuple[RemovableHandle, ...]

    def remove(self, module: nn.Module) -> None:
        """Take the hooks and this note off the module."""
        detach_hooks(module, self.hooks)
        module.__dict__.pop(_STATE, None)


def _applied(module: nn.Module) -> _Applied | None:
    applied = module.__dict__.get(_STATE)
    return applied if isinstance(applied, _Applied) else None


def _foldable(module: nn.Module, factors: Mapping[str, float], multiplied: bool) -> dict[str, nn.Parameter]:
    """Find the parameters to fold into, and refuse those that cannot be multiplied."""
    # later names of a shared parameter count too
    parameters = planned_parameters(module, remove_duplicate=False)
    missing = sorted(set(factors) - set(parameters))
    if missing:
        raise ValueError(
            f"The plan folds multipliers into parameters that the module does not have: {', '.join(missing)}. Plan "
            "this module again."
        )
    found = {name: parameters[name] for name in factors}
    unfit = [name for name, parameter in found.items() if parameter.is_meta or not parameter.is_floating_point()]
    if unfit and not multiplied:
        raise ValueError(
            "Multipliers cannot be folded into parameters on the meta device or of an integer type: "
            f"{', '.join(sorted(unfit))}. Give them values before folding, or attach the multipliers as hooks: "
            'residual="hook", or attach_multipliers(module, plan).'
        )
    return found


def _check_place(multiplier: Multiplier) -> None:
    """Refuse a multiplier that can be put nowhere."""
    if not multiplier.folds and multiplier.site is None:
        raise ValueError(
            f"The multiplier of the {multiplier.kind} {multiplier.name!r} can be neither folded, because no parameter "
            "of its own writes it, nor attached, because no submodule has it as its output or input. Let the module "
            "compute it in a submodule of its own (an nn.Identity is enough) and plan again."
        )


def _check_fresh(module: nn.Module, plan: Plan) -> None:
    """Refuse a module that the plan does not fit, or that has multipliers already."""
    plan.check(module)
    state = residual_state(module)
    if state is None:
        return
    which = "this" if state.fingerprint == fingerprint(plan) else "another"
    how, advice = "folded into its weights", "Start from a module that was built anew."
    if state.mode == "hook":
        how = "attached as hooks"
        advice = "Remove them first, with .remove() of the handle that attach_multipliers returned."
    raise ValueError(
        f"The module already has {which} plan's multipliers, {how}; putting them in again would multiply twice. {advice}"
    )
