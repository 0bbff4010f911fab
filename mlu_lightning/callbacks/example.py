"""Take example and probe batches from the data without disturbing the training that follows."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from mlu_lightning.utilities.lightning_namespaces import is_hook_overridden, of_both
from mlu_lightning.utilities.lightning_private import (
    before_batch_transfer,
    is_sequential,
    train_dataloaders,
    val_dataloaders,
)
from mlu_lightning.utilities.lightning_steps import StepName


def find_example(trainer: Trainer, module: LightningModule) -> Any:
    """Take a batch as ``training_step`` will be given it, or None if only ``example_input_array`` can serve.

    It has the first samples of the dataset: no sampler runs, no worker starts, and random states stay.
    """
    with isolate_rng():
        loaders = _iterables(train_dataloaders(trainer))
        try:
            return _transferred(tree_map(_first_batch, loaders), trainer, module)
        except _NoBatchError as reason:
            if module.example_input_array is not None:
                return None
            raise ValueError(
                f"To plan {type(module).__name__} one forward pass has to be run, and there is no example to run it on: "
                f"{reason}. Give MLUCallback(example=...) a batch as training_step takes it, or set example_input_array "
                "in the module."
            ) from reason


def find_probe(trainer: Trainer, module: LightningModule) -> tuple[Any, StepName]:
    """Take a batch of the first validation data, or of training data if there are none, with the step that takes it."""
    with isolate_rng():
        loaders = _validation_loader(trainer, module)
        step: StepName = "training_step" if loaders is None else "validation_step"
        if loaders is None:
            loaders = _iterables(train_dataloaders(trainer))
        try:
            return tree_map(_first_batch, loaders), step
        except _NoBatchError as reason:
            raise ValueError(
                f"There is no batch to probe {type(module).__name__} with: {reason}. Give the callback probe=..., a "
                "batch or the path of a safetensors file that holds one."
            ) from reason


class _NoBatchError(Exception):
    """Why no batch can be taken from a loader."""


def _validation_loader(trainer: Trainer, module: LightningModule) -> Any:
    """Find the first of the loaders that validation goes through, None if there is no validation."""
    loaders = val_dataloaders(trainer) if is_hook_overridden("validation_step", module) else None
    if isinstance(loaders, of_both(CombinedLoader)) and not is_sequential(loaders):
        return loaders.iterables  # a batch has a part of each
    return next(iter(tree_leaves(_iterables(loaders))), None)


def _iterables(loaders: Any) -> Any:
    return loaders.iterables if isinstance(loaders, of_both(CombinedLoader)) else loaders


def _first_batch(loader: Any) -> Any:
    """Make the first batch in the order of the data."""
    if isinstance(loader, DataLoader):
        if isinstance(loader.sampler, BatchSampler) and loader.batch_sampler is None:
            # the dataset is asked for whole batches, by index, so that it has a length, which Dataset does not declare
            size = min(loader.sampler.batch_size, len(loader.dataset))  # type: ignore[arg-type]
            return loader.collate_fn(loader.dataset[list(range(size))])
        samples = _first_samples(loader)
        return loader.collate_fn(samples if loader.batch_sampler is not None else samples[0])
    batches = _beginning(loader, 1)
    if not batches:
        raise _NoBatchError(f"{type(loader).__name__} has no batches")
    return batches[0]


def _first_samples(loader: DataLoader[Any]) -> list[Any]:
    """Read as many samples as a batch has, without the loader's sampler and workers."""
    dataset: Any = loader.dataset
    size = loader.batch_size or int(getattr(loader.batch_sampler, "batch_size", 1))
    if isinstance(dataset, IterableDataset):
        samples = _beginning(dataset, size)
    else:
        try:
            samples = [dataset[index] for index in range(min(size, len(dataset)))]
        except LookupError as error:
            raise _NoBatchError(f"{type(dataset).__name__} has no samples numbered from 0") from error
    if not samples:
        raise _NoBatchError(f"{type(dataset).__name__} has no samples")
    return samples


def _beginning(data: Iterable[Any], size: int) -> list[Any]:
    """Read the first items of what can only be iterated over, and warn if the next to ask gets others."""
    with isolate_rng():
        iterator = iter(data)
        if iterator is data:
            raise _NoBatchError(f"the data come from a {type(data).__name__}, which gives them only once")
        items = list(islice(iterator, size))
    again = list(islice(iter(data), size))
    leaves, others = tree_leaves(items), tree_leaves(again)
    if len(leaves) != len(others) or not all(map(_same, leaves, others)):
        rank_zero_warn(
            f"{type(data).__name__} gave other data when it was asked for the first ones again: it goes on where it was "
            "left, or draws them anew. What was taken from it, to plan or to probe with, is missing from the run. To "
            "leave it alone, give the callback a batch: MLUCallback(example=...), ReferenceRecorder(probe=...)."
        )
    return items


def _same(value: Any, other: Any) -> bool:
    """Whether two tensors, arrays, numbers or texts are equal, as NaN is to itself; others are not looked at."""
    if isinstance(value, np.ndarray) or (isinstance(value, Tensor) and value.layout is torch.strided):
        alike = type(value) is type(other) and value.shape == other.shape
        return alike and bool(((value == other) | ((value != value) & (other != other))).all())
    return not isinstance(value, (str, bytes, int, float)) or value == other or value != value


def _transferred(batch: Any, trainer: Trainer, module: LightningModule) -> Any:
    """Run the hooks that change a batch before ``training_step``, on the device of the module."""
    precision = trainer.precision_plugin
    # setup comes before the precision plugin converts the module: convert the batch only if the module is converted
    converted = precision.convert_input(torch.zeros(())).dtype
    if any(parameter.dtype == converted for parameter in module.parameters()):
        batch = precision.convert_input(batch)
    batch = before_batch_transfer(module, batch)
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    return trainer.strategy.batch_to_device(batch, torch.device("cpu") if device.type == "meta" else device)
