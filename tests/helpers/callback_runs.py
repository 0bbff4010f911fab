"""A residual network for MLUCallback in the Trainer, its data and its runs, and what updates saw of their groups."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader

from helpers.trainers import identical as identical
from helpers.trainers import pairs, quiet
from mlu_lightning.models import ResidualBlock, ResNet
from mlu_lightning.planning.plan import Plan
from mlu_lightning.utilities.lightning_private import configured_optimizers

INPUTS, OUTPUTS, SAMPLES, BATCH = 3, 2, 32, 8
BASE = {"depth": 2, "hidden": 8, "embedding": 4}
WIDE = {"depth": 4, "hidden": 32, "embedding": 16}
Optimizers = Callable[[nn.Module], Any]


def adamw(module: nn.Module) -> Any:
    optimizer = optim.AdamW(module.parameters(), lr=0.02, weight_decay=0.1)
    schedule = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=16)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Net(LightningModule):  # a residual network whose training draws random numbers
    def __init__(self, depth: int = 2, hidden: int = 8, embedding: int = 4, optimizers: Optimizers = adamw) -> None:
        super().__init__()
        self.shape = (depth, hidden, embedding)
        self.optimizers_of = optimizers
        self.losses: list[float] = []
        self.build()

    def build(self) -> None:
        depth, hidden, embedding = self.shape
        with isolate_rng():
            torch.manual_seed(7)
            self.embed = nn.Linear(INPUTS, embedding)
            self.blocks = nn.ModuleList(ResidualBlock(hidden, embedding, "tanh") for _ in range(depth))
            self.readout = nn.Linear(embedding, OUTPUTS)

    forward = ResNet.forward

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self(nn.functional.dropout(inputs, 0.2)), targets + 0.1 * self.noise())

    def noise(self) -> Tensor:
        return torch.randn(())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.validation_step(batch)

    def predict_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return self.optimizers_of(self)


class InSetup(Net):
    def build(self) -> None: ...

    def setup(self, stage: str) -> None:
        if not hasattr(self, "embed"):
            assert self.trainer.max_epochs
            Net.build(self)


class InConfigureModel(Net):
    def build(self) -> None: ...

    def configure_model(self) -> None:
        if not hasattr(self, "embed"):
            Net.build(self)


class InConfigureModelAfterSetup(InConfigureModel):
    def setup(self, stage: str) -> None: ...


MODULES = [Net, InSetup, InConfigureModel, InConfigureModelAfterSetup]


def loader(shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(pairs(SAMPLES), BATCH, shuffle=shuffle)


def trainer(*callbacks: Callback, epochs: int = 2, **settings: Any) -> Trainer:
    return quiet(*callbacks, max_epochs=epochs, **settings)


def fit(module: Net, *callbacks: Callback, data: Any = None, ckpt_path: Any = None, **settings: Any) -> Trainer:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    run = trainer(*callbacks, **settings)
    run.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return run


class WatchedOptimizers:
    """Makes optimizers, and notes the numbers in their groups as the update sees them, by parameter."""

    def __init__(self, optimizers: Optimizers = adamw) -> None:
        self.optimizers = optimizers
        self.numbers: list[dict[str, dict[str, Any]]] = []

    def __call__(self, module: nn.Module) -> Any:
        names = {id(parameter): name for name, parameter in module.named_parameters()}

        def note(optimizer: optim.Optimizer, *_: Any) -> None:
            groups = optimizer.param_groups
            self.numbers.append({names[id(p)]: {**group} for group in groups for p in group["params"]})

        configured = self.optimizers(module)
        for optimizer in configured_optimizers(configured)[0]:
            optimizer.register_step_post_hook(note)
        return configured


def factors(plan: Plan, family: str, folded: bool = True) -> dict[str, float]:
    scales = plan.scales(family)
    folds = {name: scale.folded(family) if folded else scale for name, scale in scales.items()}
    return {name: scale.lr for name, scale in folds.items()}
