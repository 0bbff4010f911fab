"""Build the module of the base shape and attach it to the Trainer, so that it can be run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.nn.parameter import is_lazy

from mlu_lightning.application.applied import residual_state
from mlu_lightning.planning.base import refuse_base
from mlu_lightning.utilities.lightning_namespaces import is_hook_overridden, of_both
from mlu_lightning.utilities.names import name_pattern, planned_parameters


@contextmanager
def built_base(base: Any, module: nn.Module, trainer: Trainer, seed: int) -> Iterator[Any]:
    """Make a base that can be run: a LightningModule with all of its parts and the trainer; refuse a trained one."""
    # one that is built here is the same in all runs with this seed, so that embeddings coupled by it are, exactly
    with isolate_rng():
        torch.manual_seed(seed)
        built = base() if callable(base) and not isinstance(base, nn.Module) else base
    if built is None and base is not None:
        raise TypeError("The function that MLUCallback was given as its base returned None instead of a module.")
    if built is module:
        raise ValueError(
            "The base of MLUCallback is the module that is trained, so nothing would be scaled. Give it a module that is "
            "built apart at the shape at which the hyperparameters are known to be good; at that shape itself no "
            "MLUCallback is needed."
        )
    if isinstance(built, nn.Module):
        if residual_state(built) is not None:
            raise ValueError(
                f"The base {type(built).__name__} has multipliers of a plan, as a module that was trained with an "
                "MLUCallback has, so its weights are not those of a plain module. Build the base anew."
            )
        refuse_base(built, module)
    if not isinstance(built, of_both(LightningModule)):
        yield built
        return
    hooks = any(is_hook_overridden(name, built) for name in ("setup", "configure_model"))
    patterns, of_base = ({*map(name_pattern, planned_parameters(each))} for each in (module, built))
    incomplete = hooks and (patterns > of_base or any(map(is_lazy, built.parameters())))
    if incomplete and built is base:
        built = copy.deepcopy(built)
    built.trainer = trainer
    try:
        if incomplete:
            with isolate_rng():
                torch.manual_seed(seed)
                built.setup("fit")
                built.configure_model()
        yield built
    finally:
        built.trainer = None
