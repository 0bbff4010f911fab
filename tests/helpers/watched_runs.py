"""Small runs that callbacks watch, and what keeps their weights and logged values."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from helpers.paper_network import stream_of as stream_of
from helpers.trainers import SILENT as SILENT
from helpers.trainers import pairs as samples
from helpers.trainers import quiet
from mlu_lightning import MLUCallback
from mlu_lightning.application.state_mark import without_mark
from mlu_lightning.callbacks import EmbeddingDistance, ReferenceRecorder
from mlu_lightning.models import ResidualBlock, ResNet

SHAPE = {"depth": 4, "hidden": 16, "embedding": 8, "inputs": 3, "outputs": 2}
LARGE = SHAPE | {"embedding": 32, "hidden": 64}


def loader(count: int = 24, seed: int = 0, shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(samples(count, seed), batch_size=4, shuffle=shuffle)


def fit(module: LightningModule, *callbacks: Callback, steps: int = 6, ckpt_path: Any = None, **more: Any) -> Trainer:
    data, validation = more.pop("data", loader()), more.pop("validation", None)
    trainer = quiet(*callbacks, **{"max_steps": steps, "max_epochs": -1} | more)
    trainer.fit(module, data, validation, ckpt_path=ckpt_path)
    return trainer


class Descent(LightningModule):
    """Trains by gradient descent."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class EncoderDecoder(Descent):
    """A decoder that attends to an encoder's stream, or to the embedded source if the encoder has no branches."""

    def __init__(self, encoder: tuple[int, ...], source: int = 8, target: int = 8) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(9, source), nn.Embedding(9, target)
        self.encoder = nn.ModuleList(ResidualBlock(hidden, source) for hidden in encoder)
        self.context, self.cross = nn.Linear(source, target), nn.MultiheadAttention(target, 2, batch_first=True)
        self.decoder, self.readout = ResidualBlock(7, target), nn.Linear(target, 9)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.source(source)
        for block in self.encoder:
            memory = memory + block(memory)
        context, stream = self.context(memory), self.target(target)
        stream = stream + self.cross(stream, context, context)[0]
        return torch.as_tensor(self.readout(stream + self.decoder(stream)))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(*batch).flatten(0, 1), batch[1].flatten())


class Weights(Callback):  # keeps the weights after every optimizer step, and the losses
    def __init__(self) -> None:
        self.at: dict[int, dict[str, Tensor]] = {}
        self.losses: list[Tensor] = []

    def keep(self, trainer: Trainer, module: LightningModule) -> None:
        self.at[trainer.global_step] = {
            name: value.clone() for name, value in without_mark(module.state_dict()).items()
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.keep(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self.keep(trainer, pl_module)
        self.losses.append(outputs["loss"])


class Busy(ResNet):
    """Has whatever a pass in between could change: dropout, running statistics, metrics, attributes, random numbers."""

    def __init__(self) -> None:
        super().__init__(**SHAPE)
        self.norm, self.drop, self.average = nn.BatchNorm1d(3), nn.Dropout(0.3), MeanMetric()
        self.seen: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self(self.drop(self.norm(x)) + 0.1 * torch.randn_like(x)), y)
        self.average.update(loss)
        self.seen.append(float(self.average.compute()))
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.average.update(nn.functional.mse_loss(self(self.norm(batch[0])), batch[1]))


class Memory(DummyLogger):  # a logger that keeps what it is given
    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: Any = None) -> None:  # type: ignore[override]
        self.logged.setdefault(step, {}).update(metrics)

    def save(self) -> None: ...

    def distances(self) -> dict[int, dict[str, float]]:
        found = {}
        for step, values in self.logged.items():
            if distances := {name: value for name, value in values.items() if name.startswith("mlu/distance/")}:
                found[step] = distances
        return found


def build_base() -> nn.Module:
    return ResNet(**SHAPE | {"depth": 2})


def couple(seed: int = 0) -> MLUCallback:
    return MLUCallback(build_base, init="coupled", seed=seed)


def record(path: Path, module: LightningModule | None = None, *callbacks: Callback, **settings: Any) -> Path:
    own = {key: settings.pop(key) for key in ("steps", "probe", "depths", "positions", "dtype") if key in settings}
    recorder = ReferenceRecorder(path, **own)
    fit(ResNet(**LARGE) if module is None else module, recorder, *callbacks, **settings)
    return path


def measure(reference: Any, *callbacks: Callback, module: Any = None, metrics: Any = None, **settings: Any) -> Memory:
    memory = Memory()
    distance = EmbeddingDistance(reference, **({} if metrics is None else {"metrics": metrics}))
    fit(ResNet(**SHAPE) if module is None else module, distance, *callbacks, logger=memory, **settings)
    return memory
