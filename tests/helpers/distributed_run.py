"""Runs in one or two processes: each records a large model, and measures a small one against it and the infinite model."""

import csv
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from helpers.ranks import rank
from helpers.trainers import pairs, quiet
from mlu_lightning import EmbeddingDistance, FeatureUpdate, Limit, MLUCallback, Plan, ReferenceRecorder
from mlu_lightning.models import ResNet

SMALL = {"depth": 4, "hidden": 16, "embedding": 8, "inputs": 3, "outputs": 2}
LARGE = SMALL | {"hidden": 64, "embedding": 32}
BASE = SMALL | {"depth": 2}
LIMIT = Limit(depth=6, units=32)
SAMPLES = 8  # in a batch of all processes together


class Sharded(ResNet):  # shards its blocks and itself
    def configure_model(self) -> None:
        mesh = self.device_mesh
        assert mesh is not None
        for block in self.blocks:
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(self, mesh=mesh["data_parallel"])


class Data(LightningDataModule):  # the same samples in every batch of all processes together, however many they are
    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        data = pairs(48)
        sampler: DistributedSampler[Any] = DistributedSampler(data, processes, rank, shuffle=False)
        return DataLoader(data, SAMPLES // processes, sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(pairs(48, seed=1), batch_size=6)


def fit(strategy: str, shape: dict[str, int], folder: Path, *callbacks: Any) -> None:
    processes = 1 if strategy == "single" else 2
    seed_everything(0, verbose=False)
    model = (Sharded if strategy == "fsdp2" else ResNet)(**shape)
    strategies: dict[str, Any] = {"single": "auto", "ddp": "ddp"}
    if strategy == "fsdp2":
        strategies[strategy] = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    torch.manual_seed(1)
    base = ResNet(**BASE)
    plan = Plan.from_model(ResNet(**shape), (torch.ones(2, 3), torch.ones(2, 2)), base=base)
    logger = CSVLogger(folder, name=str(shape["embedding"]), version=0)
    settings = {"devices": processes, "strategy": strategies[strategy], "logger": logger, "max_epochs": 2}
    mlu = MLUCallback(plan=plan, init="coupled")
    trainer = quiet(mlu, *callbacks, use_distributed_sampler=False, **settings)
    trainer.fit(model, datamodule=Data())


def run(strategy: str, folder: Path) -> None:
    fit(strategy, LARGE, folder, ReferenceRecorder(folder / "large.safetensors"), FeatureUpdate())
    fit(strategy, SMALL, folder, EmbeddingDistance(folder / "large.safetensors"))
    if strategy != "fsdp2":  # infinite models are not sharded
        fit(strategy, SMALL, folder / "limit", EmbeddingDistance(LIMIT))


def run_all(folder: Path) -> None:
    """With both strategies; and with one in a folder that has a reference, whose error ends both processes."""
    for strategy in ("ddp", "fsdp2"):
        run(strategy, folder / strategy)
    try:
        run("ddp", folder / "again")
    except FileExistsError as error:
        (folder / f"error-{rank()}").write_text(str(error))


def logged(folder: Path, prefix: str) -> dict[int, dict[str, float]]:
    with (folder / "version_0" / "metrics.csv").open() as file:
        return {
            int(row["step"]): {name: float(value) for name, value in row.items() if name.startswith(prefix)}
            for row in csv.DictReader(file)
            if row.get(f"{prefix}output") or row.get(f"{prefix}output/limit")
        }
