"""Modules and batches as a Trainer would have them when it begins: built, attached and set up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden

from mlu_lightning.checking.measurement import Batches
from mlu_lightning.shapes.error_bound import Shape

__all__ = ["built", "first_batches", "prepared", "transferred"]


def built(module_factory: Callable[..., LightningModule], shape: Shape, seed: int) -> LightningModule:
    """Build a module, with initial weights that belong to a seed.

    Args:
        module_factory: builds it, called with ``depth=``, ``hidden=`` and ``embedding=``.
        shape: L, M and D.
        seed: of its weights.

    >>> from mlu_lightning.models import ResNet
    >>> len(built(lambda depth, **others: ResNet(depth, 2, 2, 1, 1), Shape(3, 2, 2), 0).blocks)
    3
    """
    seed_everything(seed, verbose=False)
    return module_factory(depth=shape.depth, hidden=shape.hidden, embedding=shape.embedding)


def prepared(module: LightningModule, trainer: Trainer) -> LightningModule:
    """Attach a module to a Trainer and call the hooks that get its data and build it.

    It is to be planned, not to be trained: the Trainer that does that calls the same hooks again.

    Args:
        module: freshly built.
        trainer: which its hooks and steps may ask for, and which does not train it.

    >>> class Late(LightningModule):
    ...     def configure_model(self):
    ...         self.layer = torch.nn.Linear(1, 1)
    >>> prepared(Late(), Trainer(accelerator="cpu", barebones=True)).layer
    Linear(in_features=1, out_features=1, bias=True)
    """
    module.trainer = trainer
    for name, arguments in _HOOKS.items():
        if is_overridden(name, module):
            getattr(module, name)(*arguments)
    return module


def first_batches(data: Any, module: LightningModule, count: int, seed: int) -> list[Any]:
    """The first batches that a run with a seed is given, again from the beginning if there are not as many.

    Args:
        data: loaders, a list of batches, a ``LightningDataModule``, or None for those of the module.
        module: that was prepared.
        count: of batches.
        seed: of the run: in which order loaders shuffle, and where in a list it begins.

    Raises:
        ValueError: if there are none.

    >>> module = LightningModule()
    >>> first_batches(["a", "b", "c"], module, 2, seed=1), first_batches(iter("a"), module, 1, seed=0)
    (['c', 'a'], ['a'])
    """
    if isinstance(data, list):
        begin = seed * count % max(len(data), 1)
        loader: Any = Batches(data[begin:] + data[:begin])  # a list would be one of several loaders
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


def transferred(batch: Any, hooks: LightningDataModule | LightningModule) -> Any:
    """A batch as a Trainer hands it to a step.

    Args:
        batch: as the loader makes it.
        hooks: whose it is to be transferred.

    >>> transferred([1, 2], LightningModule())
    [1, 2]
    """
    with torch.no_grad():
        return hooks.on_after_batch_transfer(hooks.on_before_batch_transfer(batch, 0), 0)


_HOOKS: dict[str, tuple[str, ...]] = {"prepare_data": (), "setup": ("fit",), "configure_model": ()}
