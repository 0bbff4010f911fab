"""What a fit says of itself, and the plan that it leaves beside its logs."""

import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from helpers.logged_runs import BASE, SMALL, fit
from helpers.processes import environment
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import optim

from mlu_lightning import MLUCallback, Plan
from mlu_lightning.models import ResNet
from mlu_lightning.reporting.page import run_page
from mlu_lightning.reporting.run_folder import read_run
from mlu_lightning.table import OptimizerFamily

pytestmark = pytest.mark.usefixtures("offline")
LOGGERS: dict[str, Callable[[Path], Logger]] = {
    "csv": CSVLogger,
    "tensorboard": lambda path: TensorBoardLogger(path, sub_dir="events"),
    "wandb": lambda path: WandbLogger(offline=True, save_dir=path),
    "mlflow": lambda path: MLFlowLogger(tracking_uri=f"file:{path}/mlruns"),
}


def base() -> ResNet:
    seed_everything(3, verbose=False)
    return ResNet(**BASE)


def mlu(**settings: Any) -> MLUCallback:
    return MLUCallback(base, **settings)


@pytest.mark.parametrize("kind", LOGGERS)
def test_where_the_plan_is(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip({"mlflow": "mlflow"}.get(kind, "torch"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    callback, logger = mlu(), LOGGERS[kind](tmp_path)
    fit(tmp_path, ResNet(**SMALL), callback, logger=[logger], max_steps=1)
    wandb.finish()
    (path,) = tmp_path.rglob("plan.yaml")
    plan = Plan.load(path)
    assert plan == callback.plan and plan.optimizers == (OptimizerFamily.SGD,)
    assert path.parent == Path(
        getattr(logger, "log_dir", None) or tmp_path / str(logger.name) / str(logger.version)
    ) or (kind == "mlflow" and str(logger.version) in str(path))


class Elsewhere(CSVLogger):
    """Has its files on another machine, or nobody knows where."""

    log_dir: Any = None
    save_dir: Any = None
    experiment: Any = None
    name: Any = "runs"
    version: Any = "a1"

    def __init__(self, folder: Any = None) -> None:
        self.save_dir = folder

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def save(self) -> None: ...

    def finalize(self, status: str) -> None: ...


def test_several_loggers_have_it_each(tmp_path: Path) -> None:
    """One without a folder has it where Lightning saves its checkpoints."""
    loggers = [
        Elsewhere(),
        CSVLogger(tmp_path / "csv"),
        Elsewhere("s3://bucket"),
        TensorBoardLogger(tmp_path / "board"),
    ]
    fit(tmp_path, ResNet(**SMALL), callback := mlu(), ModelCheckpoint(), logger=loggers, max_steps=1)
    folders = {"runs/a1", "csv/lightning_logs/version_0", "board/lightning_logs/version_0"}
    assert {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("plan.yaml")} == folders
    assert {str(Plan.load(path)) for path in tmp_path.rglob("plan.yaml")} == {str(callback.plan)}
    assert (tmp_path / "runs" / "a1" / "checkpoints").is_dir()
    assert len(read_run(tmp_path).plans) == 1


def test_where_there_is_none(tmp_path: Path) -> None:
    fit(tmp_path, ResNet(**SMALL), mlu(), logger=False)
    fit(tmp_path, ResNet(**SMALL), mlu(), logger=CSVLogger(tmp_path), fast_dev_run=True, max_steps=-1)
    assert not [*tmp_path.rglob("plan.yaml")]


def test_a_folder_that_cannot_be_made_ends_no_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.warns(UserWarning, match="The plan could not be saved as .*plan.yaml"):
        fit(tmp_path, ResNet(**SMALL), mlu(), logger=Elsewhere(tmp_path / "file" / "run"), max_steps=1)


def test_a_resumed_run_leaves_the_plan_in_effect(tmp_path: Path) -> None:
    def run(depth: int) -> Path:
        fit(tmp_path, ResNet(**SMALL | {"depth": depth}), mlu(), logger=CSVLogger(tmp_path, version=0), max_steps=1)
        return tmp_path / "lightning_logs" / "version_0" / "plan.yaml"

    written = run(4).stat()
    assert (run(4).stat().st_ino, run(4).stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    assert Plan.load(run(8)).streams[0].depth == 8


@pytest.mark.parametrize("residual", ["fold", "hook"])
def test_one_line(residual: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addHandler(caplog.handler)
    fit(tmp_path, ResNet(**SMALL), mlu(residual=residual), logger=False, max_steps=1)
    (line,) = {record.getMessage() for record in caplog.records if record.getMessage().startswith("MLU")}
    assert line == (
        "MLU: depth 4 (base 2), embedding 8 (base 4), mlp 16 (base 4); distance ratio mlp 0.5; roles 1 embedding, 4 "
        "branch_in, 4 branch_out, 1 readout; optimizer sgd; multipliers 5 in "
        f"{'weights' if residual == 'fold' else 'hooks'}; no warnings."
    )


class Adam(ResNet):
    def configure_optimizers(self) -> Any:
        return optim.Adam(self.parameters(), self.lr)


def test_factors_are_those_of_the_optimizer(tmp_path: Path) -> None:
    for module, family in ((ResNet(**SMALL), "sgd"), (Adam(**SMALL), "adam")):
        folder = tmp_path / family
        fit(folder, module, callback := mlu(), logger=CSVLogger(folder), max_steps=1, enable_checkpointing=True)
        assert callback.plan is not None and str(callback.plan) == callback.plan.table(family)
        page = run_page(read_run(folder))
        assert f"factors for {family}" in page and "factors for adamw" not in page
    assert "optimizers" in Plan.load(next(tmp_path.rglob("plan.yaml"))).to_yaml()
    assert str(Plan.from_model(ResNet(**SMALL), base=base())).startswith(
        "MLU plan, relative to the base shape: factors for adamw"
    )


def test_only_plans_of_fits_have_optimizers(tmp_path: Path) -> None:
    plan = Plan.from_model(ResNet(**SMALL), base=base())
    assert "optimizers" not in plan.to_yaml()
    fitted = replace(plan, optimizers=(OptimizerFamily.SGD, OptimizerFamily.MUON))
    assert Plan.from_yaml(fitted.to_yaml(), "plan").optimizers == fitted.optimizers


def test_lightning_cli(tmp_path: Path) -> None:
    entry = {
        "class_path": "mlu_lightning.MLUCallback",
        "init_args": {"base": {"class_path": "mlu_lightning.models.ResNet"}},
    }
    entry["init_args"]["base"]["init_args"] = BASE  # type: ignore[index]
    trainer = {"callbacks": [entry], "max_steps": 1, "accelerator": "cpu", "default_root_dir": str(tmp_path)}
    data = {"class_path": "helpers.distributed_run.Data"}
    config = {
        "model": {"class_path": "mlu_lightning.models.ResNet", "init_args": SMALL},
        "trainer": trainer,
        "data": data,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    LightningCLI(args=["fit", "--config", str(tmp_path / "config.yaml")])
    (path,) = tmp_path.rglob("plan.yaml")
    assert (path.parent / "config.yaml").exists() and Plan.load(path).streams[0].depth == SMALL["depth"]


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    code = (
        "import sys; from lightning.pytorch.loggers import CSVLogger; from helpers.logged_runs import *\n"
        "folder = Path(sys.argv[1]); settings = dict(strategy='ddp', devices=2, max_steps=1, logger=CSVLogger(folder))\n"
        "trainer = fit(folder, ResNet(**SMALL), mlu(), **settings)\n"
        "print('sizes', trainer.world_size, trainer.callbacks[0].plan.optimizers)"
    )
    (tmp_path / "script.py").write_text(f"if __name__ == '__main__':\n    {code.replace(chr(10), chr(10) + '    ')}\n")
    command = [sys.executable, "-W", "ignore", str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sizes 2 (<OptimizerFamily.SGD") == 2
    assert done.stderr.count("MLU: depth 4 (base 2)") == 1 and len([*tmp_path.rglob("plan.yaml")]) == 1
