"""Compare what a module computes with its plan when training starts."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from mlu_lightning.callbacks.base_module import built_base
from mlu_lightning.observation.verification import deviations, refuse
from mlu_lightning.planning import Plan
from mlu_lightning.utilities.lightning_steps import run_start_hooks
from mlu_lightning.utilities.module_copies import copied_module


def verify_function(trainer: Trainer, module: LightningModule, plan: Plan, base: Any, example: Any, seed: int) -> None:
    """Refuse a module whose function is not that of its plan, next to its base, which is built as for planning."""
    if plan.is_at_base and not plan.forward_factors and not plan.tuned:
        return  # the run is that without the callback, whatever it computes
    if not (isinstance(base, nn.Module) or callable(base)):
        rank_zero_info("What the module computes was not compared with a base, because base=... is not a module.")
        return
    if any(hasattr(value, "placements") or "_fsdp" in name for name, value in module.named_parameters()):
        rank_zero_info("What the module computes was not compared with its base, because its parameters are sharded.")
        return
    try:
        with built_base(base, module, trainer, seed) as built, trainer.precision_plugin.val_step_context():
            assert isinstance(built, nn.Module)
            try:
                found = deviations(module, built, plan, example)
            except AttributeError:  # hooks that Lightning has called before this may have made what the base lacks
                run_start_hooks(twin := copied_module(built, None), example)
                found = deviations(module, twin, plan, example)
    except _OF_STEPS as error:
        rank_zero_warn(
            f"What {type(module).__name__} computes could not be compared with its plan: its training_step, or that of its "
            f"base, was run in evaluation mode to do so, and raised {type(error).__name__}: {str(error).rstrip('.')[:300]}. "
            "The training goes on. Give MLUCallback(verify=False) to leave the comparison out."
        )
        return
    refuse(found, module, rank_zero_warn)


# what steps raise that are not made for evaluation mode
_OF_STEPS = (LookupError, TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, AssertionError)
