"""Strategies under which a module keeps parameters of its own, and those under which it does not."""

from __future__ import annotations

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from torch import nn

__all__ = ["check_strategy", "check_whole"]


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
