"""Save which plan's multipliers a module has in its checkpoints, and put them into a module that loads one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from mlu_lightning.application.applied import Applied, Mode, residual_state
from mlu_lightning.application.multipliers import put_in
from mlu_lightning.application.state_mark import add_mark
from mlu_lightning.application.transaction import change
from mlu_lightning.planning import Multiplier, Plan
from mlu_lightning.utilities.names import original_module, planned_parameters

STATE_KEY = "MLUCallback"  # where checkpoints have the plan, among the states of callbacks
WHERE: dict[Mode, str] = {"hook": "in hooks", "fold": "in its weights", "baked": "baked into its weights"}


def write_plan(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Write into a checkpoint, among the states of callbacks, which plan's multipliers its module has, if any, and where."""
    applied = residual_state(module)
    if applied is None:
        return
    state = checkpoint.get("state_dict") or {}  # of sharded weights, one process has all
    left_out = _left_out(module, applied, state) if state else []
    if state and (applied.acting or left_out):
        add_mark(state)
    saved: dict[str, Any] = {"plan": applied.plan.to_yaml(), "mode": applied.mode}
    checkpoint.setdefault("callbacks", {})[STATE_KEY] = saved | ({"left_out": left_out} if left_out else {})


def saved_plan(checkpoint: Any) -> Mapping[str, Any] | None:
    """What a checkpoint has of its plan; None if it has none."""
    parts = _mapping(checkpoint)
    callbacks = _mapping(parts.get("callbacks"))
    _mapping(parts.get("state_dict"))
    return _mapping(callbacks[STATE_KEY]) if STATE_KEY in callbacks else None


def load_weights(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a state dict as the module wants it, or raise a ``ValueError`` if it is another's."""
    try:
        module.load_state_dict(state, strict=bool(getattr(module, "strict_loading", True)))
    except (RuntimeError, TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"The checkpoint's weights are not those of a {type(module).__name__}: {error}") from error


def load_plan(module: nn.Module, checkpoint: Mapping[str, Any]) -> Plan | None:
    """Check that a module has the multipliers of a checkpoint's weights, or put them in; their plan, if any."""
    saved = saved_plan(checkpoint)
    present = residual_state(module)
    if saved is None:
        if present is not None and present.mode != "baked":
            rank_zero_warn(_of_plain_weights(present.plan, present.mode))
        return None
    if present is None:
        return apply_saved(module, saved)
    plan, mode = _read(saved)
    if present.mode != mode:
        advice = f"Give residual={mode!r} to MLUCallback, and a module that was built anew."
        if mode == "baked":
            advice = (
                "To train on with MLUCallback, go on from a checkpoint that was saved before bake; to evaluate, give the "
                "Trainer a module that was built anew."
            )
        raise ValueError(
            f"The checkpoint is of a module with its multipliers {WHERE[mode]}, and this one has them "
            f"{WHERE[present.mode]}, so the weights would not fit. {advice}"
        )
    if not present.is_of(plan):
        raise ValueError(
            "The checkpoint is of a run with another plan than the one in effect on the module. Give MLUCallback "
            "the base, overrides, alpha and tuned of that run, or its plan, and a module built anew."
        )
    return plan


def apply_saved(module: nn.Module, saved: Mapping[str, Any]) -> Plan:
    """Put multipliers into a module where a checkpoint says that its weights need them."""
    plan, mode = _read(saved)
    if mode != "baked":
        put_in(original_module(module), plan, mode, weights=saved.get("left_out", ()))
    else:
        present = residual_state(module)
        if present is not None:
            raise ValueError(
                f"The checkpoint is of a baked module, a plain one, and this one has multipliers {WHERE[present.mode]} "
                "already. Load it into a module that was built anew."
            )
        _check_untied(module, plan)
        change(original_module(module), Applied(plan, "baked"), attach=False)
    return plan


def warn_of_hooks(plan: Plan) -> None:
    """Say which multipliers of a run with folded weights its checkpoints do not hold."""
    left = [*Applied(plan, "fold").acting]
    if left:
        rank_zero_warn(
            f"Folding leaves {_listed(left)} in hooks, because no weight multiplies there and nowhere else, so a plain "
            "model, which would be another function, refuses to load checkpoints of this run, unless the load is not strict "
            "or takes only the keys it knows (torch.distributed.checkpoint). Load them with MLUCallback or "
            "restore_multipliers(module, path); bake(module, callback.plan) makes a plain module of the same function."
        )


def _left_out(module: nn.Module, applied: Applied, state: Mapping[str, Any]) -> list[str]:
    """Parameters that hold multipliers and are not in a state dict, as frozen ones may not be, under whatever name."""
    parameters = planned_parameters(module, remove_duplicate=False)
    missing = [name for name in sorted(applied.folded) if name not in state]
    missing = [name for name in missing if not any(key.endswith(f".{name}") for key in state)]
    tensors = [value for value in state.values() if type(value) in (Tensor, nn.Parameter)] if missing else []
    places = {tensor.data_ptr() for tensor in tensors}
    return [name for name in missing if parameters[name].data_ptr() not in places]


def _mapping(value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"The checkpoint is not one of a Trainer: it has a {type(value).__name__} in place of a dict.")
    return value


def _read(saved: Mapping[str, Any]) -> tuple[Plan, Mode]:
    left_out = saved.get("left_out", [])
    texts = [saved.get("plan"), saved.get("mode"), *(left_out if isinstance(left_out, list) else [None])]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("The checkpoint has a plan of another form than MLUCallback writes: it is damaged.")
    mode = next((mode for mode in WHERE if mode == saved["mode"]), None)
    if mode is None:
        raise ValueError(
            f"The checkpoint has its multipliers in a place that this version does not know, {saved['mode']!r}; it knows "
            f"{', '.join(WHERE)}. Update mlu-lightning, or save the checkpoint again with this version."
        )
    return Plan.from_yaml(saved["plan"], "the plan in the checkpoint"), mode


def _listed(multipliers: list[Multiplier]) -> str:
    named = [f"the {multiplier.kind} {multiplier.name!r}" for multiplier in multipliers[:3]]
    *first, last = [*named, f"{len(multipliers) - 3} more"] if len(multipliers) > 3 else named
    return f"the multipliers of {', '.join(first)} and {last}" if first else f"the multiplier of {last}"


def _of_plain_weights(plan: Plan, mode: Literal["hook", "fold"]) -> str:
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
    left = [*Applied(plan, "fold").acting]
    if left:
        whole = (
            f"{in_part}, because {_listed(left)} can only be in hooks. To go on with that function, train without "
            "MLUCallback."
        )
    return f"The checkpoint is of a run without MLUCallback. {became}{whole}"


def _check_untied(module: nn.Module, plan: Plan) -> None:
    """Refuse a module that ties a readout that has a weight of its own in the checkpoint, where bake untied it."""
    parameters = planned_parameters(original_module(module), remove_duplicate=False)
    for multiplier in Applied(plan, "fold").acting:
        tied = [name for name, parameter in parameters.items() if parameter is parameters.get(multiplier.name)]
        if multiplier.kind == "readout" and len(tied) > 1 and not multiplier.gains:
            raise ValueError(
                f"The checkpoint is of a baked module, in which {' and '.join(tied)} are different weights, and in this "
                "module they are one. Build it with tie_word_embeddings=False in its config, or give the readout a weight "
                "of its own before the checkpoint is loaded."
            )
