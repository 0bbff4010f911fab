"""W&B without a network, and a small run that was recorded."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from helpers.logged_runs import record, wandb_offline
from lightning.pytorch.loggers import WandbLogger


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with wandb_offline(tmp_path_factory.mktemp("wandb")):
        yield


@pytest.fixture
def logger(tmp_path: Path) -> Iterator[WandbLogger]:
    yield WandbLogger(offline=True, save_dir=tmp_path)
    wandb.finish()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("reference"))
