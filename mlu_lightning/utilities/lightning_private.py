"""Private parts of Lightning that the package needs, each behind one function."""

from __future__ import annotations

from typing import Any

from lightning.fabric.wrappers import _FabricModule
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import _configure_optimizers, _MockOptimizer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim import Optimizer

from mlu_lightning.utilities.lightning_namespaces import of_both


def configured_optimizers(configured: Any) -> tuple[list[Optimizer], list[LRSchedulerConfig], Any]:
    """Take apart what ``configure_optimizers`` returned: optimizers, schedulers, and what the latter monitor."""
    return _configure_optimizers(configured)


def is_mock_optimizer(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer is what Lightning has where ``configure_optimizers`` returned None."""
    return isinstance(optimizer, of_both(_MockOptimizer))


def starts_processes(strategy: Strategy) -> bool:
    """Tell whether a strategy trains in processes started from this one, which send only weights back."""
    return isinstance(strategy.launcher, of_both(_MultiProcessingLauncher))


def train_dataloaders(trainer: Any) -> Any:
    """Ask for the training data as ``fit`` does, without setting its loop up."""
    return trainer.fit_loop._data_source.dataloader()


def val_dataloaders(trainer: Any) -> Any:
    """Ask for the validation data as ``fit`` does, None if there are none."""
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    return source.dataloader() if source.is_defined() else None


def is_sequential(loaders: CombinedLoader) -> bool:
    """Tell whether loaders are gone through one after the other, so that a batch is of one of them."""
    return loaders._mode == "sequential"


def before_batch_transfer(module: LightningModule, batch: Any) -> Any:
    """Run a module's hook that changes batches before they are transferred, or its data module's."""
    return module._on_before_batch_transfer(batch)


def layer_sync(strategy: Strategy) -> Any:
    """Find what exchanges a module's norms under ``sync_batchnorm``, None without it."""
    return getattr(strategy, "_layer_sync", None)


def prunes_globally(pruning: Any) -> bool:
    """Tell whether pruning compares entries of different weights."""
    return bool(pruning._use_global_unstructured)


def resamples_parameters(pruning: Any) -> bool:
    """Tell whether pruning by the lottery ticket hypothesis draws weights anew instead of going back to the first."""
    return bool(pruning._use_lottery_ticket_hypothesis and pruning._resample_parameters)


def set_up_by_fabric(module: nn.Module) -> nn.Module | None:
    """Return the module that Fabric has set up and wrapped, None if it is no such wrapper."""
    return module.module if isinstance(module, of_both(_FabricModule)) else None
