"""Small runs beside infinite models that are smaller."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from helpers.watched_runs import SHAPE, Memory, fit, loader
from mlu_lightning import MLUCallback
from mlu_lightning.callbacks import EmbeddingDistance
from mlu_lightning.callbacks.infinite_limit import Limit
from mlu_lightning.models import CausalTransformer, ResNet

SMALL = Limit(depth=6, units=16)


class Pairs(LightningDataModule):  # the data of small runs, for LightningCLI
    def train_dataloader(self) -> DataLoader[Any]:
        return loader()


def resnet(**changes: Any) -> ResNet:
    torch.manual_seed(0)
    return ResNet(**SHAPE | changes)


def measure(limit: Any, *callbacks: Callback, module: Any = None, metrics: Any = None, **more: Any) -> dict[int, Any]:
    if not any(isinstance(callback, MLUCallback) for callback in callbacks):
        callbacks = (MLUCallback(), *callbacks)
    memory = Memory()
    distance = EmbeddingDistance(limit, **({} if metrics is None else {"metrics": metrics}))
    fit(resnet() if module is None else module, *callbacks, distance, logger=memory, **more)
    return {
        step: {name.removeprefix("mlu/distance/").removesuffix("/limit"): value for name, value in values.items()}
        for step, values in memory.distances().items()
    }


def with_optimizer(module: Any, configure: Callable[[Any], Any]) -> Any:
    """The infinite model is that of the class itself, so the optimizer is changed as LightningCLI changes it."""
    vars(module)["configure_optimizers"] = lambda: configure(list(module.parameters()))
    return module


def decayed(optimizer: Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step)


def tokens() -> DataLoader[Any]:
    draws = torch.Generator().manual_seed(0)
    return DataLoader(torch.randint(7, (24, 9), generator=draws), batch_size=4, shuffle=True)  # type: ignore[arg-type]


def transformer(**settings: Any) -> CausalTransformer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"depth": 2, "embedding": 16, "heads": 4, "head_dim": 4, "mlp_hidden": 16}
    return CausalTransformer(7, 8, **sizes | {"norm_gains": False, "optimizer": "sgd", "lr": 0.3} | settings)
