"""Strategies under which a module keeps parameters of its own, and those under which it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from torch import nn

from mlu_lightning.application.multipliers import attach_again, residual_state
from mlu_lightning.callbacks.wrapped_methods import wrap_method
from mlu_lightning.planning.plan import Plan

__all__ = ["check_strategy", "check_whole", "wrap_layer_sync"]


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies whose optimizers are given other parameters than the module's own.

    Args:
        strategy: of the Trainer.

    Raises:
        ValueError: if it is DeepSpeed, or FSDP1 with flattened parameters.

    >>> check_strategy(FSDPStrategy())
    >>> check_strategy(FSDPStrategy(use_orig_params=False))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: FSDPStrategy(use_orig_params=False) joins parameters of different roles into one tensor, so ...
    """
    if isinstance(strategy, DeepSpeedStrategy):
        what = "DeepSpeed joins parameters of different roles into one tensor before its optimizer sees them"
    elif isinstance(strategy, FSDPStrategy) and not strategy.kwargs["use_orig_params"]:
        what = "FSDPStrategy(use_orig_params=False) joins parameters of different roles into one tensor"
    else:
        return
    raise ValueError(
        f"{what}, so they cannot have learning rates of their own. Use ModelParallelStrategy (FSDP2), "
        "FSDPStrategy(use_orig_params=True) or DDP."
    )


def check_whole(strategy: Strategy, module: nn.Module) -> None:
    """Refuse a module for FSDP1 that is not there as a whole, with its values: later it has shards of other shapes.

    Args:
        strategy: of the Trainer; other strategies than FSDP1 are not looked at.
        module: when it has been built, before its first fit.

    Raises:
        ValueError: if parts of it are wrapped or on the meta device.

    >>> check_whole(FSDPStrategy(), nn.Linear(2, 2))
    >>> check_whole(FSDPStrategy(), nn.Linear(2, 2, device="meta"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: The module is on the meta device, and would be flattened before it has values, so it can ...
    """
    if not isinstance(strategy, FSDPStrategy):
        return
    parameters = dict(module.named_parameters())
    if any("_fsdp_wrapped_module" in name for name in parameters):
        found = "Parts of the module are wrapped by FSDP already"
    elif any(parameter.is_meta for parameter in parameters.values()):
        found = "The module is on the meta device, and would be flattened before it has values"
    else:
        return
    raise ValueError(
        f"{found}, so it can neither be planned nor initialized. With FSDPStrategy, build a module anew, with its values "
        "and without wrappers, and name the parts to wrap in its auto_wrap_policy; or use ModelParallelStrategy (FSDP2)."
    )


def wrap_layer_sync(strategy: Strategy, module: nn.Module, plan: Plan) -> Callable[[], None]:
    """Let a module keep its hooks where a strategy exchanges its norms, and exchanges them back after the fit.

    With ``Trainer(sync_batchnorm=True)`` every BatchNorm becomes a SyncBatchNorm of the same weights, without hooks.

    Args:
        strategy: of the Trainer.
        module: that it fits.
        plan: whose multipliers the module has then.

    Returns:
        What undoes this, but for the exchange that is still to come.

    >>> wrap_layer_sync(FSDPStrategy(), nn.Linear(1, 1), Plan({}, (), (), ()))()
    """
    layers: Any = getattr(strategy, "_layer_sync", None)
    if layers is None:
        return lambda: None

    def exchange(method: Callable[[nn.Module], nn.Module], model: nn.Module) -> nn.Module:
        before = list(module.modules())
        exchanged = method(model)
        if residual_state(module) is not None and before != list(module.modules()):  # equal if they are the same
            attach_again(module, plan)
        return exchanged

    def exchange_back(method: Callable[[nn.Module], nn.Module], model: nn.Module) -> nn.Module:
        restore()
        return exchange(method, model)

    # undone when it was called: after an error Lightning does so last, when callbacks are through
    restore = wrap_method(layers, "revert", exchange_back)
    return wrap_method(layers, "apply", exchange)
