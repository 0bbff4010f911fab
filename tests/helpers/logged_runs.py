"""Small runs whose values and plans go to loggers, and what W&B has written of them."""

import csv
import json
import os
import struct
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from wandb.proto.wandb_internal_pb2 import Record

from helpers.trainers import pairs, quiet
from mlu_lightning import MLUCallback, ReferenceRecorder
from mlu_lightning.models import ResNet

Values = dict[str, dict[int, float]]
"""Logged values by name and step."""
BASE = {"depth": 2, "hidden": 4, "embedding": 4, "inputs": 3, "outputs": 2}
SMALL = BASE | {"depth": 4, "hidden": 16, "embedding": 8}
LARGE = SMALL | {"embedding": 32}
NAMES = {f"mlu/distance/{kind}/s={s}" for kind in ("rms", "gram", "cka", "procrustes") for s in ("0", "0.5", "1")}
NAMES.add("mlu/distance/output")


def data() -> DataLoader[Any]:
    return DataLoader(pairs(20), batch_size=4)


def fit(folder: Path, module: LightningModule, *callbacks: Callback, **settings: Any) -> Trainer:
    saving = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    defaults: dict[str, Any] = {
        "max_steps": 10,
        "max_epochs": -1,
        "enable_checkpointing": saving,
        "default_root_dir": folder,
    }
    batches = settings.pop("data", data())
    trainer = quiet(*callbacks, **defaults | settings)
    trainer.fit(module, batches)
    return trainer


def mlu(**settings: Any) -> MLUCallback:
    return MLUCallback(lambda: ResNet(**BASE), init="coupled", **settings)


def finish() -> None:
    """End the run, and wait until its file is written, which W&B does not do when it is offline."""
    wandb.finish()
    wandb.teardown()


def records(folder: Path) -> Iterator[Any]:
    """Records of W&B's file, a LevelDB log: in blocks of 32 KiB, parts with checksum, length, and whether it is the last."""
    (path,) = folder.glob("*.wandb")
    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (rest := 2**15 - at % 2**15) < 7:
            at += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def rows(found: list[Any]) -> list[dict[str, Any]]:
    """What was logged with wandb.log, one dict for each call."""
    history = [record.history.item for record in found if record.HasField("history")]
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in history]


def record(folder: Path) -> Path:
    fit(folder, ResNet(**LARGE), mlu(), ReferenceRecorder(folder / "large.safetensors", depths=[0, 0.5, 1]))
    return folder / "large.safetensors"


def in_csv(folder: str | Path) -> Values:
    """What a CSVLogger has written, each value once."""
    found: Values = defaultdict(dict)
    for row in csv.DictReader((Path(folder) / "metrics.csv").read_text().splitlines()):
        for name in [name for name, value in row.items() if name.startswith("mlu/") and value]:
            assert int(row["step"]) not in found[name]
            found[name][int(row["step"])] = float(row[name])
    return found


@contextmanager
def wandb_offline(folder: Path) -> Iterator[None]:
    """W&B without a network, and without files anywhere but in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        settings = {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false", "CONSOLE": "off"}
        folders = dict.fromkeys(("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR", "ARTIFACT_DIR"), str(folder))
        for name, value in (settings | folders).items():
            patch.setenv(f"WANDB_{name}", value)
        yield
        wandb.teardown()
