"""Modules, batches and Trainers of a check: built, attached and set up as when a training begins."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden

from mlu_lightning.shapes import Shape

__all__ = ["Batches", "build", "first_batches", "make_trainer", "prepare", "quiet", "transfer"]


def build(module_factory: Callable[..., LightningModule], shape: Shape, seed: int) -> LightningModule:
    """Build a module with the initial weights of a seed."""
    seed_everything(seed, verbose=False)
    return module_factory(depth=shape.depth, hidden=shape.hidden, embedding=shape.embedding)


def prepare(module: LightningModule, trainer: Trainer) -> LightningModule:
    """Attach a module to a Trainer and call the hooks that get its data and build it.

    It is to be planned, not to be trained: the Trainer that does that calls the same hooks again.
    """
    module.trainer = trainer
    for name, arguments in _HOOKS.items():
        if is_overridden(name, module):
            getattr(module, name)(*arguments)
    return module


_HOOKS: dict[str, tuple[str, ...]] = {"prepare_data": (), "setup": ("fit",), "configure_model": ()}


def make_trainer(callbacks: Sequence[Callback], steps: int, trainer: Mapping[str, Any]) -> Trainer:
    """Make a Trainer that trains for a few steps, without callbacks that write or print anything."""
    arguments = {
        "accelerator": "cpu",
        "devices": 1,
        **trainer,
        "max_steps": steps,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "logger": DummyLogger(),  # which steps and callbacks may ask for
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [one for one in callbacks if not isinstance(one, (Checkpoint, ProgressBar, ModelSummary))],
    }
    return Trainer(**arguments)


def first_batches(data: Any, module: LightningModule, count: int, seed: int) -> list[Any]:
    """The first batches of a run with a seed, again from the beginning if there are not as many.

    The seed decides the order of loaders that shuffle, and where a list begins.
    """
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
        before = len(found)
        for batch, _, _ in combined:
            found.append(batch)
            if len(found) == count:
                break
        if len(found) == before:
            raise ValueError("There are no batches in the data. Give check() data that has some.")
    return found


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
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
