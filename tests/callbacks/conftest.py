"""W&B without a network."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """W&B without a network, and without files anywhere but in a folder of the test."""
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
            patch.setenv(name, str(folder))
        for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false", "CONSOLE": "off"}.items():
            patch.setenv(f"WANDB_{name}", value)
        yield
        wandb.teardown()


@pytest.fixture
def logger(offline: None, tmp_path: Path) -> Iterator[WandbLogger]:
    yield WandbLogger(offline=True, save_dir=tmp_path)
    wandb.finish()
