"""Callbacks with Trainers, modules, loggers and checkpoints of ``pytorch_lightning``, as with ``lightning.pytorch``."""

import copy
import csv
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import pytorch_lightning
import torch
from helpers.trainers import identical
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mlu_lightning import EmbeddingDistance, FeatureUpdate, MLUCallback, ReferenceRecorder
from mlu_lightning.models import ResidualBlock

PACKAGES = [lightning.pytorch, pytorch_lightning]
BOTH = (lightning.pytorch.Callback, pytorch_lightning.Callback)


def network(package: ModuleType, depth: int = 2) -> Any:
    class Net(package.LightningModule):  # type: ignore[name-defined]  # one of two modules
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.readout = nn.Linear(3, 8), nn.Linear(8, 2)
            self.blocks = nn.ModuleList(ResidualBlock(16, 8, "tanh") for _ in range(depth))

        def forward(self, x: Any) -> Any:
            x = self.embed(x)
            for block in self.blocks:
                x = x + block(x)
            return self.readout(x)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = nn.functional.mse_loss(self(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    return Net()


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(*(torch.randn(16, size, generator=generator) for size in (3, 2))), 8)


def run(package: ModuleType, folder: Path, *callbacks: Any, depth: int = 4, steps: int = 4, **fit: Any) -> Any:
    module = network(package, depth)
    logger: Any = package.loggers.CSVLogger(folder, version="run")
    settings: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = package.Trainer(
        max_steps=steps, log_every_n_steps=1, default_root_dir=folder, logger=logger, callbacks=[*callbacks], **settings
    )
    trainer.fit(module, data(), **fit)
    return module


def watched(package: ModuleType, folder: Path) -> tuple[Any, list[dict[str, str]]]:
    base = network(package)
    run(package, folder / "reference", MLUCallback(base), ReferenceRecorder(str(folder / "reference.safetensors")))
    distance = EmbeddingDistance(str(folder / "reference.safetensors"), metrics=("gram", "output"))
    checkpoint = package.callbacks.ModelCheckpoint(folder, "half", every_n_train_steps=2, save_top_k=-1)
    run(package, folder, MLUCallback(base), distance, FeatureUpdate(), checkpoint)
    with next(folder.glob("lightning_logs/run/metrics.csv")).open() as file:
        return torch.load(folder / "half.ckpt", weights_only=True), list(csv.DictReader(file))


def test_runs_are_the_same(tmp_path: Path) -> None:
    (ours, rows), (theirs, others) = (watched(package, tmp_path / package.__name__) for package in PACKAGES)
    assert rows == others and {name.split("/")[1] for name in rows[0] if name.startswith("mlu/")} >= {"update"}
    assert ours["callbacks"]["MLUCallback"] == theirs["callbacks"]["MLUCallback"]
    half = tmp_path / "pytorch_lightning" / "half.ckpt"
    whole = run(pytorch_lightning, tmp_path / "whole", MLUCallback(network(pytorch_lightning)))
    resumed = run(pytorch_lightning, tmp_path / "on", MLUCallback(network(pytorch_lightning)), ckpt_path=str(half))
    plain = run(pytorch_lightning, tmp_path / "plain")
    assert identical(whole, resumed) and not identical(whole, plain)


def test_a_run_at_the_base_shape_is_the_plain_one(tmp_path: Path) -> None:
    ours = run(pytorch_lightning, tmp_path, MLUCallback(network(pytorch_lightning)), depth=2)
    assert identical(ours, run(pytorch_lightning, tmp_path / "plain", depth=2))


def test_a_callback_is_one_of_both_packages() -> None:
    callback = MLUCallback(alpha=2.0)
    for found in (callback, copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert all(isinstance(found, each) for each in (MLUCallback, *BOTH))
        assert vars(found).keys() == vars(callback).keys() and found.state_key == callback.state_key
        assert type(found).__qualname__ == "MLUCallback"


def test_a_callback_that_is_not_in_a_list(tmp_path: Path) -> None:
    trainer = pytorch_lightning.Trainer(default_root_dir=tmp_path, callbacks=MLUCallback(), accelerator="cpu")  # type: ignore[arg-type]
    assert any(isinstance(callback, MLUCallback) for callback in trainer.callbacks)
