"""Prepare the modules, batches and Trainers of a check as at the beginning of a training."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden

from mlu_lightning.discovery import Structure, discover
from mlu_lightning.observation import locate
from mlu_lightning.observation.batches import first_samples, sample_count
from mlu_lightning.observation.probe import observe_counted
from mlu_lightning.planning import Plan
from mlu_lightning.shapes import Shape

USERS_ERRORS = ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError
"""What modules raise of sizes that they do not take."""


def build(module_factory: Callable[..., LightningModule], shape: Shape, seed: int) -> LightningModule:
    """Build a module with the initial weights of a seed."""
    seed_everything(seed, verbose=False)
    try:
        return module_factory(depth=shape.depth, hidden=shape.hidden, embedding=shape.embedding)
    except USERS_ERRORS as error:
        sizes = f"depth={shape.depth}, hidden={shape.hidden}, embedding={shape.embedding}"
        raise ValueError(f"The module cannot be built with {sizes}: {type(error).__name__}: {error}") from error


def prepare(module: LightningModule, trainer: Trainer) -> LightningModule:
    """Attach a module that is to be planned to a Trainer, and call the hooks that get its data and build it."""
    module.trainer = trainer
    for name, *arguments in (("prepare_data",), ("setup", "fit"), ("configure_model",)):
        if is_overridden(name, module):
            getattr(module, name)(*arguments)
    return module


def structure_of(module: LightningModule, trainer: Trainer, probe: Any) -> Structure:
    """Discover a module that may not work at its sizes, which is a ValueError then."""
    try:
        return discover(prepare(module, trainer), probe)
    except USERS_ERRORS as error:
        raise ValueError(f"The module does not work at these sizes: {type(error).__name__}: {error}") from error


def make_trainer(callbacks: Sequence[Callback], steps: int, trainer: Mapping[str, Any]) -> Trainer:
    """Make a silent Trainer that trains for a few steps, on the CPU by default."""
    few = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0}
    return silent_trainer(callbacks, {"accelerator": "cpu", **trainer, **few})


def silent_trainer(callbacks: Sequence[Callback], settings: Mapping[str, Any]) -> Trainer:
    """Make a Trainer on one device, without callbacks that write or print anything."""
    silent = {
        "num_sanity_val_steps": 0,
        "logger": DummyLogger(),  # which steps and callbacks may ask for
        **dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
        "callbacks": [item for item in callbacks if not isinstance(item, (Checkpoint, ProgressBar, ModelSummary))],
    }
    return Trainer(**{"devices": 1, **settings, **silent})


def first_batches(data: Any, module: LightningModule, count: int, seed: int) -> list[Any]:
    """Take a run's first batches, again if there are too few; the seed shuffles loaders and says where a list begins."""
    if isinstance(data, list):
        begin = seed * count % max(len(data), 1)
        loader: Any = Batches(data[begin:] + data[:begin])
    elif isinstance(data, LightningDataModule):
        data.trainer = module.trainer
        data.prepare_data()
        data.setup("fit")
        loader = data.train_dataloader()
    else:
        loader = module.train_dataloader() if data is None else data
    seed_everything(seed, verbose=False)
    combined = CombinedLoader(loader, "max_size_cycle")
    found: list[Any] = []
    while len(found) < count:
        epoch = [batch for batch, _, _ in islice(combined, count - len(found))]
        if not epoch:
            raise ValueError("There are no batches in the data. Give check() data that has some.")
        found += epoch
    return found


def few_samples(batch: Any, module: LightningModule, plan: Plan) -> Any:
    """Leave of a batch the first samples that have as many positions (tokens, pixels) as are looked at of a stream."""
    ends = locate(plan.taps, [stream.depth for stream in plan.streams], (0, 1))
    try:
        positions = observe_counted(module, batch, ends, "training_step", 1, restore_parameters=True)[1]
    except USERS_ERRORS:  # of a step that needs a training, such as its optimizers
        return batch
    samples = sample_count(batch) or 1
    return first_samples(batch, max(_LEAST_SAMPLES, math.ceil(_POSITIONS * samples / positions)))


_LEAST_SAMPLES, _POSITIONS = 4, 128


class Batches:
    """Batches that a Trainer takes for a loader; a list would be one of several loaders."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def transfer(batch: Any, hooks: LightningDataModule | LightningModule) -> Any:
    """Hand over a batch as a Trainer does, by the hooks of its data or module."""
    with torch.no_grad():
        return hooks.on_after_batch_transfer(hooks.on_before_batch_transfer(batch, 0), 0)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what the Trainer says about devices and loaders in each of many short runs."""
    with ExitStack() as stack:
        for name in ("lightning.pytorch", "lightning.fabric"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield
