"""Put a plan's forward multipliers into a module: attached as hooks, or folded into its weights.

Both make the same function and, with an optimizer that is scaled for it, the same run (theory.md, section 3).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Literal, TypeVar

from torch import nn

from mlu_lightning.application.applied import Applied, residual_state
from mlu_lightning.application.hooks import hooks_in
from mlu_lightning.application.transaction import Step, change, multiplication, settle
from mlu_lightning.planning import Multiplier, Plan
from mlu_lightning.utilities.names import original_module, planned_parameters

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class MultiplierHandle:
    """Handle of multipliers that :func:`attach_multipliers` has attached."""

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self._module = module
        self._plan: Plan | None = plan

    def remove(self) -> None:
        """Remove the hooks, unless they were removed before, or the multipliers went into the weights."""
        settle(self._module)
        applied = residual_state(self._module)
        if applied is not None and applied.mode == "hook" and applied.plan is self._plan:
            change(original_module(self._module), None)
        self._plan = None


def attach_multipliers(module: nn.Module, plan: Plan) -> MultiplierHandle:
    """Multiply the module's branches, readouts and attention logits by the plan's factors, with hooks.

    Branches by α/l, readouts by 1/d (theory.md, section 3). Weights and ``state_dict`` keys stay as they are, and
    nothing is attached where the factor is exactly 1. Code that ``torch.compile`` made before, without hooks, is dropped.

    Args:
        module: module that the plan was made for; changed in place.
        plan: its plan.

    Raises:
        ValueError: if the plan does not fit the module, if multipliers are already in it, or if a hook has no place.

    >>> import torch
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
    module = original_module(module)
    settle(module)
    put_in(module, plan, "hook")
    return MultiplierHandle(module, plan)


def fold(module: ModuleT, plan: Plan, multiplied: bool = False) -> ModuleT:
    """Multiply the plan's factors into the weights that write to branches, readouts and attention logits.

    The function is that of :func:`attach_multipliers`, whose hooks, if the module has them, move into the weights; an
    optimizer that was scaled for it has to be scaled anew then. A readout tied to an embedding cannot be folded: its
    multiplier becomes a hook (theory.md, section 3), and :func:`mlu_lightning.bake` leaves none. Gradients of folded
    weights are larger by 1/factor: clip them in :func:`mlu_lightning.unfolded_gradients`.

    Args:
        module: module that the plan was made for, plain or with the plan's hooks; changed in place and returned.
        plan: its plan.
        multiplied: whether the weights, as a folded run's checkpoint has them, hold their multipliers already: attach only
            the hooks that are left. ``MLUCallback(residual="fold", init=None)`` goes on from there.

    Raises:
        ValueError: if the plan does not fit the module, or a multiplier is already in it or can be put nowhere.

    >>> import torch
    >>> from mlu_lightning import Plan, Role
    >>> from mlu_lightning.planning import ParameterPlan
    >>> module = nn.Linear(2, 2, bias=False)
    >>> before = module.weight.detach().clone()
    >>> weight = ParameterPlan(Role.BRANCH_OUT, (2, 2), fans=(2, 2), base_fans=(2, 2), depth=2)
    >>> plan = Plan({"weight": weight}, (), (), (Multiplier("mlp", "branch", 0.5, None, ("weight",)),))
    >>> torch.equal(fold(module, plan).weight, before * 0.5)
    True
    """
    plain = original_module(module)
    settle(plain)
    attached = None if multiplied else residual_state(plain)
    if attached is not None and attached.mode == "hook" and attached.is_of(plan):
        plan.check(plain)
    else:
        attached = None
        _check_fresh(plain, plan)
    steps = fold_steps(plain, plan, () if multiplied else None)
    change(plain, Applied(plan, "fold", initialized=attached is not None and attached.initialized), steps)
    return module


def put_in(
    module: nn.Module,
    plan: Plan,
    mode: Literal["hook", "fold"],
    first: Iterable[Step] = (),
    weights: Collection[str] | None = None,
    initialized: bool = False,
) -> None:
    """Put multipliers into a module without any, in one transaction with ``first``; fold those of some weights, or all."""
    _check_fresh(module, plan)
    steps = []
    if mode == "fold":
        steps = fold_steps(module, plan, weights)
    else:
        _check_sites(plan)
    change(module, Applied(plan, mode, initialized=initialized), [*first, *steps])


def fold_steps(module: nn.Module, plan: Plan, weights: Collection[str] | None = None) -> list[Step]:
    """Find what folding does to weights, all or those that are named, and refuse what can be put nowhere."""
    for multiplier in plan.forward_factors:
        _check_place(multiplier)
    parameters, factors = _foldable(module, plan, check=weights is None), plan.folded_factors
    return [multiplication(parameters[name], factors[name]) for name in factors if weights is None or name in weights]


def check_attached(module: nn.Module) -> None:
    """Refuse a module of which parts with multipliers were exchanged for others, which have none."""
    module = original_module(module)
    applied = residual_state(module)
    if applied is None:
        return
    parts = list(module.modules())
    present = {
        id(hooks)
        for part in parts
        for hooks in (
            part._forward_hooks,
            part._forward_pre_hooks,
            part._state_dict_hooks,
            part._load_state_dict_pre_hooks,
        )
    }
    for hook in applied.hooks:
        hooks = hook.hooks_dict_ref()
        if hooks is None or id(hooks) not in present or hook.id not in hooks:
            raise ValueError(
                "A part of the module that had a multiplier was exchanged for another, which has none, or its hooks were "
                "removed, so the module is no longer the plan's. Exchange parts before the module is given to "
                "MLUCallback or attach_multipliers, or load new weights into the part that is there."
            )
    applied_to = filter(None, map(residual_state, parts))  # a part may be a module with a plan of its own
    if {*hooks_in(module)} - {(id(hook.hooks_dict_ref()), hook.id) for each in applied_to for hook in each.hooks}:
        raise ValueError(
            "There are multipliers in the module that are not its plan's: attach_multipliers was interrupted, or a part was "
            "copied from another module. Start from a module that was built anew."
        )


def attach_again(module: nn.Module, plan: Plan) -> None:
    """Attach the hooks of a module anew, after parts were exchanged for others of the same weights."""
    change(module, replace(state_with(module, plan)))


def state_with(module: nn.Module, plan: Plan) -> Applied:
    """Tell how a plan's multipliers were put into a module, and refuse one that does not have them."""
    settle(module)
    applied = residual_state(module)
    if applied is None:
        raise ValueError(
            "The module does not have the plan's multipliers, and weights alone do not tell whether they hold them. Put "
            "them in as in training: attach_multipliers(module, plan) after a run with hooks, fold(module, plan, "
            "multiplied=True) after one with folded weights, or restore_multipliers(module, checkpoint of MLUCallback)."
        )
    if not applied.is_of(plan):
        raise ValueError(
            "The module has the multipliers of another plan. Give the plan that it was trained with, such as "
            "MLUCallback.plan after fit."
        )
    return applied


def check_multiplied(module: nn.Module, plan: Plan) -> None:
    """Refuse a module that the plan does not fit, or that lacks its multipliers: the factors are for the run with them."""
    applied = residual_state(module)
    if applied is not None and applied.mode == "baked":
        raise ValueError(
            "The module was baked: some of its weights are those of a plain module, for which the plan has no learning "
            "rates. Go on with a checkpoint that was saved before bake."
        )
    if not any("_fsdp_wrapped_module" in name for name, _ in module.named_parameters()):
        plan.check(module)  # FSDP1 leaves shards, of other shapes
    if applied is None and plan.forward_factors:
        raise ValueError(
            "The plan has forward multipliers, and they are not in effect on the module, so its learning rates would "
            "be wrong. Call attach_multipliers(module, plan) or fold(module, plan) before scale_optimizer."
        )
    if applied is not None and not applied.is_of(plan):
        raise ValueError(
            "The module has the multipliers of another plan than the one given to scale_optimizer. Give the same plan "
            "to both."
        )


def _foldable(module: nn.Module, plan: Plan, check: bool) -> dict[str, nn.Parameter]:
    """Find the parameters to fold into, and refuse those that cannot be multiplied, if they will be."""
    # later names of a shared parameter count too
    parameters = planned_parameters(module, remove_duplicate=False)
    missing = sorted(plan.folded_factors.keys() - parameters.keys())
    if missing:
        raise ValueError(
            f"The plan folds multipliers into parameters that the module does not have: {', '.join(missing)}. Plan "
            "this module again."
        )
    found = {name: parameters[name] for name in plan.folded_factors}
    unfit = [name for name, parameter in found.items() if parameter.is_meta or not parameter.is_floating_point()]
    if unfit and check:
        raise ValueError(
            "Multipliers cannot be folded into parameters on the meta device or of an integer type: "
            f"{', '.join(sorted(unfit))}. Give them values before folding, or attach the multipliers as hooks: "
            'residual="hook", or attach_multipliers(module, plan).'
        )
    return found


def _check_sites(plan: Plan) -> None:
    for multiplier in plan.forward_factors:
        _check_place(multiplier)
        if multiplier.site is None:
            raise ValueError(
                f"The multiplier of the {multiplier.kind} {multiplier.name!r} cannot be attached as a hook, because no "
                'submodule has it as output or input. Put it into the weights: residual="fold", or fold(module, plan).'
            )


def _check_place(multiplier: Multiplier) -> None:
    if not multiplier.folds and multiplier.site is None:
        raise ValueError(
            f"The multiplier of the {multiplier.kind} {multiplier.name!r} can be neither folded, because no parameter "
            "of its own writes it, nor attached, because no submodule has it as its output or input. Let the module "
            "compute it in a submodule of its own (an nn.Identity is enough) and plan again."
        )


def _check_fresh(module: nn.Module, plan: Plan) -> None:
    plan.check(module)
    applied = residual_state(module)
    if applied is None:
        return
    which = "this" if applied.is_of(plan) else "another"
    how, advice = "folded into its weights", "Start from a module that was built anew."
    if applied.mode == "hook":
        how = "attached as hooks"
        advice = "Remove them first, with .remove() of the handle that attach_multipliers returned."
    raise ValueError(
        f"The module already has {which} plan's multipliers, {how}; putting them in again would multiply twice. {advice}"
    )
