"""Save the plan in every checkpoint of a module and apply it on loading, also where Lightning asks no callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from lightning.pytorch import LightningModule

from mlu_lightning.application.applied import mark_initialized, residual_state
from mlu_lightning.application.checkpoint import load_plan, write_plan
from mlu_lightning.application.state_mark import adapt_mark, is_marked
from mlu_lightning.application.transaction import loading
from mlu_lightning.callbacks.passing_changes import PassingChanges, wrap_method


def wrap_loading(module: LightningModule, loaded: Callable[[], None], changes: PassingChanges) -> None:
    """Give a module the multipliers of each checkpoint before its weights are loaded; without them it is refused."""

    def load(method: Callable[..., Any], checkpoint: dict[str, Any]) -> None:
        method(checkpoint)
        if residual_state(module) is None:
            with loading(module, ends=False):
                plan = load_plan(module, checkpoint)
        else:
            plan = load_plan(module, checkpoint)
        state = checkpoint.get("state_dict")
        if plan is not None:
            mark_initialized(module)
        # sharded strategies have loaded it already; and a mark that no plan explains has to be refused
        if state and (plan is not None or not is_marked(state)):
            adapt_mark(module, state)
        loaded()

    wrap_method(module, "on_load_checkpoint", load, changes.note)


def wrap_saving(module: LightningModule) -> None:
    """Let every checkpoint of a module and of its copies have its plan, also those with ``save_weights_only``."""
    found = vars(module).get("on_save_checkpoint")
    method = getattr(found, "__func__", None)
    if isinstance(method, _SavesPlan):
        return
    if found is None:
        method = type(module).on_save_checkpoint
    elif method is None or found.__self__ is not module:

        def method(_: LightningModule, checkpoint: dict[str, Any]) -> None:
            found(checkpoint)

    # as a method, which a deep copy binds to the copy, and a pickle looks up by its name
    vars(module)["on_save_checkpoint"] = MethodType(_SavesPlan(method), module)


@dataclass(frozen=True)
class _SavesPlan:
    method: Callable[[LightningModule, dict[str, Any]], None]
    __name__ = "on_save_checkpoint"

    def __call__(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.method(module, checkpoint)
        write_plan(module, checkpoint)
