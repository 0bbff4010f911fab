"""``mlu-lightning tune``: from a configuration to files that its next run takes, and the sweep that does the same."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.check_command import BASE, RESNET, command, plugin, write
from helpers.logged_runs import wandb_offline
from helpers.trainers import SILENT
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

from mlu_lightning.cli import main
from mlu_lightning.planning.tuned import read_tuned

ALONG_DEPTH = ["--depth=depth", "--hidden=null", "--embedding=null"]
LARGE = BASE | {"depth": 4}
SLOW = {"lr": 2**-7}  # a learning rate that is far too small
SHORT = ["--trials=2", "--seeds=1", "--steps=8"]


class Validated(LightningDataModule):  # products to be learned
    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, torch.stack((x[:, 0] * x[:, 1], x[:, 2]), 1)), batch_size=8)

    val_dataloader = train_dataloader


def config(folder: Path, **changes: Any) -> str:
    model = {"class_path": RESNET, "init_args": LARGE | SLOW}
    trainer = {"max_steps": 100, "accelerator": "cpu", "callbacks": [plugin(**BASE, **SLOW)]}
    settings = {"model": model, "data": {"class_path": f"{__name__}.Validated"}, "trainer": trainer}
    return write(folder, **settings | changes)


def test_what_it_writes_goes_into_the_next_run_of_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path, out = config(tmp_path), tmp_path / "out"
    options = f"--roles null --out {out} --hidden=null --embedding=null --confirm".split()
    main(["tune", path, *SHORT, *options, "{depth: 2}"])
    shown = capsys.readouterr().out
    assert {"tuned.yaml", "tune.txt", "tune.png", "sweep.yaml", "study.db"} <= {file.name for file in out.iterdir()}
    assert "At 2 × depth: gain of the factors" in shown and "Wrote tuned.yaml" in shown
    assert (out / "tune.txt").read_text().splitlines()[3].split("│")[1].strip() == "lr"
    factors = read_tuned(out / "tuned.yaml")
    callback = plugin(**BASE, **SLOW)
    callback["init_args"]["tuned"] = str(out / "tuned.yaml")
    trainer = {**SILENT, "max_steps": 1, "callbacks": [callback], "limit_val_batches": 0}
    content = {"model": {"class_path": RESNET, "init_args": LARGE}, "data": {"class_path": f"{__name__}.Validated"}}
    made = LightningCLI(args={"fit": {**content, "trainer": trainer}, "subcommand": "fit"}, save_config_callback=None)
    assert made.trainer.callbacks[0].plan.tuned == factors  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"trainer": {"max_steps": 8}}, [], "no MLUCallback in this training"),
        ({"trainer": {"max_steps": 8, "callbacks": [{"class_path": "mlu_lightning.MLUCallback"}]}}, [], "has no base"),
        ({"trainer": {"callbacks": [plugin(**BASE)]}}, [], "does not say how long.*--steps"),
        ({}, ["--confirm", "{depth: 0}", *ALONG_DEPTH], r"--confirm has depth: 0"),
        ({}, ["--trial", "{speed: 2}"], "--trial has speed, which is not searched. What is searched is lr, embed"),
    ],
)
def test_bad_configurations_are_errors_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], options: list[str], message: str
) -> None:
    assert command("tune", config(tmp_path, **changes), "--out", str(tmp_path / "out"), *options) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error


def test_interrupted_it_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlu_lightning.models import ResNet

    def interrupted(self: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ResNet, "on_train_start", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
    try:
        assert command("tune", config(tmp_path), *SHORT, "--out", str(tmp_path / "out")) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "What was tried is kept, and the same command goes on" in capsys.readouterr().out


def test_an_agent_of_the_sweep_trains_a_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"save_dir": str(tmp_path)}}
    trainer = {"max_steps": 100, "accelerator": "cpu", "callbacks": [plugin(**BASE)], "logger": logger}
    path, out = config(tmp_path, trainer=trainer), tmp_path / "out"
    logged: list[dict[str, Any]] = []
    with wandb_offline(tmp_path):
        options = f"--steps=8 --seeds=1 --trials=1 --roles=embedding --log=trials --out {out}".split()
        main(["tune", path, *options])
        assert len([*tmp_path.rglob("offline-run-*.wandb")] or [*tmp_path.rglob("run-*.wandb")]) == 2  # study and trial
        sweep = yaml.safe_load((out / "sweep.yaml").read_text())
        assert {*sweep["parameters"]} == {"lr", "embedding.std", "embedding.lr"}
        assert sweep["metric"] == {"name": "val_loss", "goal": "minimize"}
        assert sweep["command"][:4] == ["${env}", "${interpreter}", "-m", "mlu_lightning"]
        assert sweep["command"][-2:] == ["--trial", "${args_json}"]
        monkeypatch.setattr("wandb.sdk.wandb_run.Run.log", lambda run, values, **kwargs: logged.append(values))
        point = json.dumps({"lr": 8.0, "embedding.std": 1.0, "embedding.lr": 0.5})
        main([point if word == "${args_json}" else word for word in sweep["command"][4:]])
    assert [values["percent"] for values in logged] == [25, 50, 75, 100]
    assert logged[-1]["val_loss"] < logged[0]["val_loss"]
