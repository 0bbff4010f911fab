"""Check that a strategy keeps the module's own parameters, and keep hooks when ``sync_batchnorm`` exchanges norms."""

from __future__ import annotations

from collections.abc import Callable

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from mlu_lightning.application import residual_state
from mlu_lightning.application.multipliers import attach_again
from mlu_lightning.callbacks.passing_changes import PassingChanges, wrap_method
from mlu_lightning.planning import Plan
from mlu_lightning.utilities.lightning_namespaces import of_both
from mlu_lightning.utilities.lightning_private import layer_sync, starts_processes


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies whose optimizers are given other parameters than the module's own; warn of lost marks."""
    if isinstance(strategy, of_both(DeepSpeedStrategy)):
        what = "DeepSpeed joins parameters of different roles into one tensor before its optimizer sees them"
    elif isinstance(strategy, of_both(FSDPStrategy)) and not strategy.kwargs["use_orig_params"]:
        what = "FSDPStrategy(use_orig_params=False) joins parameters of different roles into one tensor"
    else:
        if starts_processes(strategy):
            rank_zero_warn(
                "The Trainer trains in processes started from this one, and only weights come back, without a mark that "
                'they were initialized. Go on from a checkpoint, with ckpt_path=..., or use strategy="ddp".'
            )
        return
    raise ValueError(
        f"{what}, so they cannot have learning rates of their own. Use ModelParallelStrategy (FSDP2), "
        "FSDPStrategy(use_orig_params=True) or DDP."
    )


def check_whole(strategy: Strategy, module: nn.Module) -> None:
    """Refuse a module for FSDP1 that is not there as a whole, with its values: later it has shards of other shapes."""
    if not isinstance(strategy, of_both(FSDPStrategy)):
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


def wrap_layer_sync(strategy: Strategy, module: nn.Module, plan: Plan, changes: PassingChanges) -> None:
    """Let a module keep its hooks where ``sync_batchnorm`` exchanges its norms, and where it exchanges them back."""
    layers = layer_sync(strategy)
    if layers is None:
        return

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
    restore = wrap_method(layers, "revert", exchange_back, lambda undo: None)
    wrap_method(layers, "apply", exchange, changes.note)
