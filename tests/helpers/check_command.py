"""Configurations of a LightningCLI for ``mlu-lightning check``, and the classes that they name."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from mlu_lightning.cli import main

RESNET = "mlu_lightning.models.ResNet"
BASE = {"inputs": 3, "outputs": 2, "depth": 2, "hidden": 32, "embedding": 8}
LARGE = BASE | {"depth": 24, "hidden": 512, "embedding": 64}
KEYS = {"depth": ["depth"], "hidden": ["hidden"], "embedding": ["embedding"]}
ALONG_DEPTH = ["--hidden", "null", "--embedding", "null"]
QUICK = ["--factors", "[1,2,4]", "--seeds", "2", "--steps", "2", *ALONG_DEPTH]
SHORTEST = ["--factors", "[1,2]", "--seeds", "1", "--steps", "1", *ALONG_DEPTH]


class Pairs(LightningDataModule):  # products and sizes to be learned
    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(128, 3, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, torch.stack((x[:, 0] * x[:, 1], x[:, 2].abs()), 1)), batch_size=16)


class Twice(Callback):  # a user's callback that changes the training: it makes the gradients twice as large
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad *= 2


def plugin(base_class: str = RESNET, **base: Any) -> dict[str, Any]:
    section = {"class_path": base_class, "init_args": base}
    return {"class_path": "mlu_lightning.MLUCallback", "init_args": {"base": section}}


def content(**changes: Any) -> dict[str, Any]:
    return {
        "seed_everything": 1,
        "trainer": {"max_steps": 100, "callbacks": [plugin(**BASE)]},
        "model": {"class_path": RESNET, "init_args": LARGE},
        "data": {"class_path": f"{__name__}.Pairs"},
    } | changes


def write(folder: Path, **changes: Any) -> str:
    (folder / "config.yaml").write_text(yaml.safe_dump(content(**changes)))
    return str(folder / "config.yaml")


def command(*args: str) -> int:
    with pytest.raises(SystemExit) as end:
        main([*args])
    return int(end.value.code or 0)
