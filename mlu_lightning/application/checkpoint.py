"""What a checkpoint says about the multipliers of its module, and what a module takes from one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from mlu_lightning.application.multipliers import (
    applied_plan,
    attach_multipliers,
    fold,
    mark_baked,
    residual_state,
    uncompiled,
)
from mlu_lightning.planning.entries import Multiplier
from mlu_lightning.planning.fingerprint import fingerprint
from mlu_lightning.planning.plan import Plan
from mlu_lightning.utilities.names import planned_parameters

__all__ = ["PLACES", "STATE_KEY", "apply_saved", "load_plan", "warn_of_hooks", "wrap_saving", "write_plan"]

STATE_KEY = "MLUCallback"
"""Where checkpoints have the plan, among the states of callbacks."""

PLACES = {"hook": "in hooks", "fold": "in its weights", "baked": "baked into its weights"}
"""Where multipliers are, in words."""


def write_plan(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Write into a checkpoint which plan's multipliers its module has, and where; nothing if it has none.

    Args:
        module: with the checkpoint's weights.
        checkpoint: that is about to be saved.

    >>> checkpoint = {"state_dict": {}}
    >>> write_plan(nn.Linear(1, 1), checkpoint)
    >>> checkpoint
    {'state_dict': {}}
    """
    plan, state = applied_plan(module), residual_state(module)
    if plan is not None and state is not None:
        # beside the states of callbacks also where Lightning saves none, so that it lets callbacks read this one
        checkpoint.setdefault("callbacks", {})[STATE_KEY] = {"plan": plan.to_yaml(), "mode": state.mode}


def wrap_saving(module: LightningModule) -> None:
    """Let every checkpoint of a module and of its copies have its plan, those with ``save_weights_only`` too.

    Lightning asks no callback about these, only the module itself. They may be saved at any time after a run.

    Args:
        module: that a plan's multipliers are in.

    >>> from mlu_lightning.models import ResNet
    >>> model = ResNet(depth=1, hidden=4, embedding=2, inputs=1, outputs=1)
    >>> handle, checkpoint = attach_multipliers(model, Plan.from_model(model)), {}
    >>> wrap_saving(model)
    >>> model.on_save_checkpoint(checkpoint)
    >>> checkpoint["callbacks"]["MLUCallback"]["mode"]
    'hook'
    """
    found = vars(module).get("on_save_checkpoint")
    # a module that was pickled has the method of its class there
    if _OWN in vars(module) and getattr(found, "__func__", None) is not type(module).on_save_checkpoint:
        return
    vars(module)[_OWN] = found
    vars(module)["on_save_checkpoint"] = MethodType(on_save_checkpoint, module)


# pickles of a module look its method up by this name
def on_save_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Do what the module does when a checkpoint is saved, and add its plan."""
    own = vars(self)[_OWN]
    if own is None:
        type(self).on_save_checkpoint(self, checkpoint)
    else:
        own(checkpoint)
    write_plan(self, checkpoint)


def load_plan(module: LightningModule, checkpoint: Mapping[str, Any]) -> Plan | None:
    """Check that the multipliers of a module are those of the weights it was just given; put them in if it has none.

    Args:
        module: with the checkpoint's weights.
        checkpoint: that they are from.

    Returns:
        The checkpoint's plan, if it has one.

    Raises:
        ValueError: if the module has another plan's multipliers, or in another place.

    >>> load_plan(LightningModule(), {"callbacks": {}}) is None
    True
    """
    saved = checkpoint["callbacks"].get(STATE_KEY)
    present = residual_state(module)
    if saved is None:
        plan = applied_plan(module)
        if plan is not None and present is not None and present.mode != "baked":
            rank_zero_warn(_of_plain_weights(plan, present.mode))
        return None
    if present is None:
        return apply_saved(module, saved)
    plan, mode = _plan(saved), saved["mode"]
    if present.mode != mode:
        raise ValueError(
            f"The checkpoint is of a module with its multipliers {PLACES[mode]}, and this one has them "
            f"{PLACES[present.mode]}, so the weights would not fit. {_ADVICE[mode]}"
        )
    if present.fingerprint != fingerprint(plan):
        raise ValueError(
            "The checkpoint is of a run with another plan than the one in effect on the module. Give MLUCallback "
            "the base, overrides and alpha of that run, or its plan, and a module that was built anew."
        )
    return plan


def apply_saved(module: nn.Module, saved: Mapping[str, Any]) -> Plan:
    """Put multipliers into a module where a checkpoint says that its weights need them.

    Args:
        module: with the checkpoint's weights and no multipliers.
        saved: what :func:`write_plan` wrote.

    Returns:
        The plan.

    Raises:
        ValueError: if the plan does not fit the module, the module has multipliers already or ties what bake has
            untied, or the place is not known.

    >>> module, plan = nn.Identity(), Plan({}, (), (), ())
    >>> apply_saved(module, {"plan": plan.to_yaml(), "mode": "fold"}) == plan, residual_state(module).mode
    (True, 'fold')
    """
    plan = _plan(saved)
    if saved["mode"] == "hook":
        attach_multipliers(module, plan)
    elif saved["mode"] == "fold":
        fold(module, plan, multiplied=True)
    else:
        present = residual_state(module)
        if present is not None:
            raise ValueError(
                f"The checkpoint is of a baked module, a plain one, and this one has multipliers {PLACES[present.mode]} "
                "already. Load it into a module that was built anew."
            )
        _check_untied(module, plan)
        mark_baked(module, plan)
    return plan


def warn_of_hooks(plan: Plan) -> None:
    """Say which multipliers of a run with folded weights its checkpoints do not hold.

    Args:
        plan: of the run.

    >>> warn_of_hooks(Plan({}, (), (), ()))
    """
    left = _hooks_of_fold(plan)
    if left:
        rank_zero_warn(
            f"Folding leaves {_listed(left)} in hooks, because no weight multiplies there and nowhere else, so a plain "
            "model that loads a checkpoint of this run is another function. Afterwards, bake(module, callback.plan) makes a "
            "plain module of the same function."
        )


_OWN = "_mlu_own_on_save_checkpoint"
_ADVICE = {
    "hook": "Give residual='hook' to MLUCallback, and a module that was built anew.",
    "fold": "Give residual='fold' to MLUCallback, and a module that was built anew.",
    "baked": "To train on with MLUCallback, go on from a checkpoint that was saved before bake; to evaluate, give the "
    "Trainer a module that was built anew.",
}


def _hooks_of_fold(plan: Plan) -> list[Multiplier]:
    """Multipliers that no weight of their own can hold."""
    return [m for m in plan.multipliers if not m.folds and plan.forward_multiplier(m) != 1]


def _plan(saved: Mapping[str, Any]) -> Plan:
    if saved["mode"] not in PLACES:
        raise ValueError(
            f"The checkpoint has its multipliers in a place that this version does not know, {saved['mode']!r}; it knows "
            f"{', '.join(PLACES)}. Update mlu-lightning, or save the checkpoint again with this version."
        )
    return Plan.from_yaml(saved["plan"], "the plan in the checkpoint")


def _listed(multipliers: list[Multiplier]) -> str:
    named = [f"the {multiplier.kind} {multiplier.name!r}" for multiplier in multipliers[:3]]
    more = [f"{len(multipliers) - 3} more"] if len(multipliers) > 3 else []
    *first, last = named + more
    found = f"{', '.join(first)} and {last}" if first else last
    return f"the multiplier{'s' if first else ''} of {found}"


def _of_plain_weights(plan: Plan, mode: Literal["hook", "fold"]) -> str:
    """What became of weights without multipliers in a module with them."""
    if mode == "hook":
        became = (
            "Its weights were trained as another function of the module, which now has the plan's multipliers, and at other "
            "learning rates."
        )
        whole = ' To go on with that function, give MLUCallback residual="fold".'
        in_part = ' It would be another one with residual="fold", too'
    else:
        became = "Its weights take the place of those that hold the plan's multipliers,"
        whole = " so the module is the function that they were trained as; from here on they have the plan's learning rates."
        in_part = " but the module is another function than they were trained as"
    left = _hooks_of_fold(plan)
    if left:
        whole = (
            f"{in_part}, because {_listed(left)} can only be in hooks. To go on with that function, train without "
            "MLUCallback."
        )
    return f"The checkpoint is of a run without MLUCallback. {became}{whole}"


def _check_untied(module: nn.Module, plan: Plan) -> None:
    """Refuse a module that ties a readout that has a weight of its own in the checkpoint, where bake untied it."""
    names: dict[int, list[str]] = {}
    for name, parameter in planned_parameters(uncompiled(module), remove_duplicate=False).items():
        names.setdefault(id(parameter), []).append(name)
    for multiplier in _hooks_of_fold(plan):
        tied = next((found for found in names.values() if multiplier.name in found), [])
        if multiplier.kind == "readout" and len(tied) > 1:
            raise ValueError(
                f"The checkpoint is of a baked module, in which {' and '.join(tied)} are different weights, and in this "
                "module they are one. Build it with tie_word_embeddings=False in its config, or give the readout a weight "
                "of its own before the checkpoint is loaded."
            )
