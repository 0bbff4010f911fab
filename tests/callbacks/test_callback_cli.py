"""MLUCallback from the YAML of a LightningCLI."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.callback_runs import identical, loader
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from mlu_lightning import MLUCallback, Plan
from mlu_lightning.application.multipliers import residual_state
from mlu_lightning.models import ResNet

BASE = {"depth": 2, "hidden": 8, "embedding": 4, "inputs": 3, "outputs": 2}
WIDE = {"depth": 4, "hidden": 32, "embedding": 16, "inputs": 3, "outputs": 2}
OPTIMIZER = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.02, "weight_decay": 0.1}}


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return loader(False)


def run(tmp_path: Path, callback: dict[str, Any] | None, **config: Any) -> LightningCLI:
    """The command line `fit --config config.yaml`; without the callback if its arguments are None."""
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    entry = {"class_path": "mlu_lightning.callbacks.MLUCallback", "init_args": callback}
    settings = {"accelerator": "cpu", "max_epochs": 2, "callbacks": [] if callback is None else [entry]}
    content = {"seed_everything": 1, "trainer": settings | dict.fromkeys(silent, False), "model": WIDE, **config}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    return LightningCLI(ResNet, Data, save_config_callback=None, args=["fit", "--config", f"{tmp_path}/config.yaml"])


def by_hand(model: ResNet, callback: MLUCallback, adam: bool) -> ResNet:
    if adam:
        vars(model)["configure_optimizers"] = lambda: torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=0.1)
    Trainer(accelerator="cpu", max_epochs=2, barebones=True, callbacks=[callback]).fit(model, datamodule=Data())
    return model


@pytest.fixture
def plan() -> Plan:
    seed_everything(5)
    return Plan.from_model(ResNet(**WIDE), next(iter(loader())), base=ResNet(**BASE))


@pytest.mark.parametrize("adam", [False, True], ids=["own-optimizer", "--optimizer"])
@pytest.mark.parametrize("given", ["plan", "base"])
def test_saved_plan(given: str, adam: bool, plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.yaml")
    arguments: dict[str, Any] = {given: str(tmp_path / "plan.yaml"), "residual": "fold", "init": "normal"}
    cli = run(tmp_path, arguments, **({"optimizer": OPTIMIZER} if adam else {}))
    seed_everything(1)
    assert identical(cli.model, by_hand(ResNet(**WIDE), MLUCallback(**arguments), adam))
    state = residual_state(cli.model)
    assert state is not None and state.mode == "fold"


def test_base_by_class_path(tmp_path: Path) -> None:
    base = {"class_path": "mlu_lightning.models.ResNet", "init_args": BASE}
    overrides = {"embed.*": "embedding"}
    cli = run(tmp_path, {"base": base, "overrides": overrides, "alpha": 2.0, "seed": 3}, optimizer=OPTIMIZER)
    callback = next(callback for callback in cli.trainer.callbacks if isinstance(callback, MLUCallback))
    assert (callback.plan.alpha, callback.plan.streams[0].depth, callback.plan.streams[0].base_depth) == (2.0, 4, 2)
    assert isinstance(cli.model, LightningModule)
    # what LightningCLI made of --optimizer is there again, and makes a plain optimizer
    assert "configure_optimizers" in vars(cli.model)
    made: Any = cli.model.configure_optimizers()
    assert [group["lr"] for group in made.param_groups] == [0.02]


def test_base_by_class_path_draws_no_random_numbers(tmp_path: Path) -> None:
    base = {"class_path": "mlu_lightning.models.ResNet", "init_args": BASE}
    (plain, state), (ours, other) = (
        (run(tmp_path, callback, model=BASE).model, torch.get_rng_state()) for callback in (None, {"base": base})
    )
    assert identical(plain, ours) and torch.equal(state, other) and residual_state(ours) is not None
