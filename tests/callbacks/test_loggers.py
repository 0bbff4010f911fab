"""What loggers are given: values at their steps, and the plan."""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.logged_runs import BASE, NAMES, SMALL, Values, finish, fit, in_csv, mlu, records, rows
from helpers.watched_runs import EncoderDecoder
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from torch import nn, optim

from mlu_lightning import MLUCallback
from mlu_lightning.callbacks import EmbeddingDistance, ReferenceRecorder
from mlu_lightning.callbacks.loggers import log_plan
from mlu_lightning.models import ResNet
from mlu_lightning.observation.reference import Reference
from mlu_lightning.planning.plan import Plan
from mlu_lightning.table import OptimizerFamily

STEPS = [0, 1, 2, 4, 8, 10]  # "log", and the last one


pytestmark = pytest.mark.usefixtures("offline")


class Seen(Callback):  # keeps the distances that other callbacks can monitor, by step
    def __init__(self) -> None:
        self.values: Values = defaultdict(dict)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        for name in NAMES & set(trainer.callback_metrics):
            self.values[name][trainer.global_step] = trainer.callback_metrics[name].item()

    on_train_batch_start = on_train_batch_end


@dataclass(frozen=True)
class Run:  # a run with all loggers, all callbacks of the package, and the default log_every_n_steps
    folder: Path  # of W&B's run
    records: list[Any]  # that it wrote
    csv: Path  # folder of the CSVLogger
    events: EventAccumulator  # that TensorBoard reads
    seen: Values  # what could be monitored
    best: float  # score of a ModelCheckpoint that monitored a distance at even steps
    recorded: Path  # reference that was recorded during the run
    plan: Plan


@pytest.fixture(scope="module")
def run(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    wandb_logger, csv_logger = WandbLogger(offline=True, save_dir=folder), CSVLogger(folder / "csv")
    board, seen, callback = TensorBoardLogger(folder / "tensorboard"), Seen(), mlu()
    recorder = ReferenceRecorder(folder / "small, seed 1.safetensors", steps=[0, 5], positions=3)
    best = ModelCheckpoint(folder, monitor="mlu/distance/gram/s=1", mode="max", every_n_train_steps=2)
    callbacks = [callback, recorder, EmbeddingDistance(reference), seen, best]
    fit(folder, ResNet(**SMALL), *callbacks, logger=[wandb_logger, csv_logger, board])
    files = Path(wandb_logger.experiment.dir)
    finish()
    assert callback.plan is not None and best.best_model_score is not None
    events, score = EventAccumulator(board.log_dir).Reload(), best.best_model_score.item()
    found = list(records(files.parent))
    return Run(files, found, Path(csv_logger.log_dir), events, seen.values, score, recorder.path, callback.plan)


def config(found: list[Any]) -> dict[str, Any]:
    updates = [update for record in found if record.HasField("config") for update in record.config.update]
    return {update.key: json.loads(update.value_json) for update in updates}


def artifacts(found: list[Any], kind: str) -> list[Any]:
    return [record.artifact for record in found if record.HasField("artifact") and record.artifact.type == kind]


def text_of(events: EventAccumulator) -> str:
    (event,) = events.Tensors("mlu/plan/text_summary")
    text: str = event.tensor_proto.string_val[0].decode()
    return text


def table_in(folder: str | Path) -> tuple[Path, Any]:
    (path,) = Path(folder).glob("media/table/mlu/plan_*.table.json")
    return path, json.loads(path.read_text())


def test_values_are_logged_at_the_steps_of_the_reference(run: Run) -> None:
    """However rarely the Trainer logs: log_every_n_steps is 50, and there are 10 steps."""
    written = in_csv(run.csv)
    assert set(written) == NAMES and all(list(values) == STEPS for values in written.values())
    assert all(math.isfinite(value) for values in written.values() for value in values.values())


def test_values_are_logged_once_where_all_steps_are_logged(reference: Path, tmp_path: Path) -> None:
    logger, distance = CSVLogger(tmp_path), EmbeddingDistance(reference, metrics=["output"])
    fit(tmp_path, ResNet(**SMALL), mlu(), distance, logger=logger, log_every_n_steps=1)
    assert list(in_csv(logger.log_dir)["mlu/distance/output"]) == STEPS


def test_values_can_be_monitored_at_every_step_that_has_one(run: Run) -> None:
    for name, values in in_csv(run.csv).items():
        for step, value in values.items():
            assert run.seen[name][step] == pytest.approx(value, rel=2**-23, abs=1e-40)
        assert run.seen[name][5] == run.seen[name][4]  # the latest
    even = [value for step, value in in_csv(run.csv)["mlu/distance/gram/s=1"].items() if step % 2 == 0 and step]
    assert run.best == pytest.approx(max(even), rel=1e-6)


def test_config_has_shape_and_factors(run: Run) -> None:
    found = config(run.records)["mlu"]
    factors = found.pop("factors")
    assert found == {
        **{"depth": 4, "embedding": 8, "hidden": {"mlp": 16}},
        "base": {"depth": 2, "embedding": 4, "hidden": {"mlp": 4}},
        **{"parameterization": "mlu", "alpha": 1.0, "batch_ratio": 1.0, "token_ratio": 1.0},
        **{"distance_ratio": {"mlp": pytest.approx(0.5)}, "residual": "fold", "optimizer": "sgd"},
    }
    # theory.md, section 3, for SGD at l = 2, m = 4, d = 2
    keys = "multiplier", "std", "lr", "eps", "weight_decay"
    assert {role: tuple(factors[role][key] for key in keys) for role in factors} == {
        "embedding": (1, 1, 2, 1 / 2, 1 / 2),
        "branch_in": (1, pytest.approx(2**-0.5), 4, 1 / 8, 1 / 4),
        "branch_out": (1 / 2, pytest.approx(2**0.5 / 4), 1, 1 / 4, 1),
        "readout": (1 / 2, 1, 2, 1 / 2, 1 / 2),
    }


def test_table_has_a_row_for_each_kind_of_parameter(run: Run) -> None:
    path, table = table_in(run.folder)
    assert table["columns"][:5] == ["parameters", "tensors", "role", "shape", "optimizer"]
    assert [row[:5] for row in table["data"]] == [
        ["embed.weight", 1, "embedding", "8 x 3", "sgd"],
        ["blocks.*.read.weight", 4, "branch_in", "16 x 8", "sgd"],
        ["blocks.*.write.weight", 4, "branch_out", "8 x 16", "sgd"],
        ["readout.weight", 1, "readout", "2 x 8", "sgd"],
    ]
    assert dict(zip(table["columns"], table["data"][1], strict=True))["lr"] == 4
    (row,) = (row for row in rows(run.records) if "mlu/plan/path" in row)
    assert run.folder / row["mlu/plan/path"] == path


def test_tensorboard_shows_the_plan_as_printed(run: Run) -> None:
    assert "mlu/plan/text_summary" in run.events.Tags()["tensors"]
    assert text_of(run.events) == f"```\n{run.plan.table('sgd')}\n```"
    html = markdown_to_safe_html(text_of(run.events))
    assert "<code>MLU plan, relative to the base shape: factors for sgd\n" in html


def test_recorded_reference_is_an_artifact(run: Run) -> None:
    (artifact,) = artifacts(run.records, "reference")
    assert (artifact.name, list(artifact.aliases)) == ("small--seed-1", ["latest"])
    shape = {"depth": 4, "embedding": 8, "hidden": {"mlp": 16}}
    recorded = {"depths": [0, 0.25, 0.5, 0.75, 1], "steps": [0, 5], "positions": 3}
    assert json.loads(artifact.metadata) == shape | recorded
    (content,) = artifact.manifest.contents
    assert content.path == "small, seed 1.safetensors"
    kept = Reference.load(content.local_path)
    assert (kept.steps, kept.digests) == ((0, 5), Reference.load(run.recorded).digests)


class Mixed(ResNet):  # matrices of branches by one optimizer, the readout by another, and the embedding by none
    def configure_optimizers(self) -> Any:
        return [optim.SGD(self.blocks.parameters(), lr=0.1), optim.AdamW(self.readout.parameters())]

    def training_step(self, batch: Any) -> None:
        assert not self.automatic_optimization
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()


def test_each_parameter_has_the_factors_of_its_optimizer(logger: WandbLogger, tmp_path: Path) -> None:
    module, board = Mixed(**SMALL), TensorBoardLogger(tmp_path)
    module.automatic_optimization = False
    fit(tmp_path, module, MLUCallback(ResNet(**BASE), residual="fold"), logger=[logger, board], max_steps=2)
    found = logger.experiment.config["mlu"]
    assert (found["residual"], found["optimizer"]) == ("fold", ["sgd", "adamw"])
    rates = {role: factors["lr"] for role, factors in found["factors"].items()}
    assert rates == {"embedding": None, "branch_in": 4, "branch_out": 1, "readout": 1}
    _, table = table_in(logger.experiment.dir)
    assert [row[4] for row in table["data"]] == [None, "sgd", "sgd", "adamw"]
    text = text_of(EventAccumulator(board.log_dir).Reload())
    assert "factors for sgd" in text and "factors for adamw" in text


def test_config_lists_what_differs_within_the_module(logger: WandbLogger) -> None:
    words = torch.zeros(2, 3, dtype=torch.long)
    plan = Plan.from_model(EncoderDecoder((5, 6, 5), 8, 4), (words, words))
    log_plan([logger], plan, "hook", dict.fromkeys(plan.parameters, OptimizerFamily.ADAMW))
    found = logger.experiment.config["mlu"]
    assert found["base"] is None
    assert (found["depth"], found["embedding"]) == ([2, 3], [4, 8])  # of the decoder first, as in the plan
    assert {kind: sorted(widths) for kind, widths in found["hidden"].items() if kind == "mlp"} == {"mlp": [5, 6, 7]}
    assert found["hidden"]["attention"] == 2 and sorted(found["factors"]["branch_in"]["lr"]) == [1 / 8, 1 / 4]
    assert found["factors"]["branch_in"]["multiplier"] == 1
    assert found["factors"]["branch_out"]["multiplier"] == [1 / 3, 1 / 2]


def test_plan_is_logged_once_a_fit_and_can_change(logger: WandbLogger, tmp_path: Path) -> None:
    for alpha in (1.0, 2.0):
        fit(tmp_path, ResNet(**SMALL), MLUCallback(ResNet(**BASE), alpha=alpha), logger=logger, max_steps=1)
        assert logger.experiment.config["mlu"]["alpha"] == alpha
    folder = Path(logger.experiment.dir)
    finish()
    assert sum("mlu/plan/path" in row for row in rows(list(records(folder.parent)))) == 2


@pytest.mark.parametrize("settings", [{"barebones": True}, {"fast_dev_run": True}, {}])
def test_runs_without_a_place_for_values_go_on(settings: Any, reference: Path, tmp_path: Path) -> None:
    watches = [EmbeddingDistance(reference), ReferenceRecorder(tmp_path / "run.safetensors")]
    logger = None if settings else CSVLogger(tmp_path)
    fit(tmp_path, ResNet(**SMALL), mlu(), *watches, max_steps=2, logger=logger, **settings)
    # fast_dev_run leaves no files
    assert (tmp_path / "run.safetensors").exists() == ("fast_dev_run" not in settings)
