"""The plan in every checkpoint of a module, also those about which Lightning asks no callback, only the module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from lightning.pytorch import LightningModule

from mlu_lightning.application.checkpoint import write_plan

__all__ = ["wrap_saving"]


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
