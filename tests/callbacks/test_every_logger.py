"""Every logger of Lightning that works without a network is given the same values, under names that all of them can have."""

import math
import re
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.logged_runs import SMALL, Values, finish, fit, in_csv, mlu, records, rows
from helpers.watched_runs import Memory
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from mlu_lightning import EmbeddingDistance, FeatureUpdate
from mlu_lightning.callbacks import Limit
from mlu_lightning.callbacks.loggers import log_values
from mlu_lightning.models import CausalTransformer, ResNet


class Files(DummyLogger):
    """Keeps each value in a file of its name, as MLflow's file store does."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def log_metrics(self, metrics: Any, step: Any = None) -> None:  # type: ignore[override]
        for name, value in metrics.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(f"{step} {value!r}\n")

    def save(self) -> None: ...


def in_files(logger: Files) -> Values:
    files = [path for path in logger.folder.rglob("*") if path.is_file()]
    lines = {path: [line.split() for line in path.read_text().splitlines()] for path in files}
    return {
        str(path.relative_to(logger.folder)): {int(step): float(value) for step, value in found}
        for path, found in lines.items()
    }


def in_tensorboard(logger: TensorBoardLogger) -> Values:
    events = EventAccumulator(logger.log_dir).Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


def in_wandb(logger: WandbLogger) -> Values:
    folder = Path(logger.experiment.dir).parent
    finish()
    found: Values = defaultdict(dict)
    for row in rows(list(records(folder))):
        for name in [name for name in row if "trainer/global_step" in row and not name.startswith("_")]:
            found[name][row["trainer/global_step"]] = row[name]
    return found


def in_mlflow(logger: MLFlowLogger) -> Values:
    names = logger.experiment.get_run(logger.version).data.metrics
    history = {name: logger.experiment.get_metric_history(logger.version, name) for name in names}
    return {name: {metric.step: metric.value for metric in metrics} for name, metrics in history.items()}


LOGGERS: dict[str, tuple[Callable[[Path], Any], Callable[[Any], Values]]] = {
    "files": (Files, in_files),
    "csv": (CSVLogger, lambda logger: in_csv(logger.log_dir)),
    "tensorboard": (TensorBoardLogger, in_tensorboard),
    "wandb": (lambda path: WandbLogger(offline=True, save_dir=path), in_wandb),
    "mlflow": (lambda path: MLFlowLogger(tracking_uri=f"file:{path}/mlruns"), in_mlflow),
    "mlflow in sqlite": (lambda path: MLFlowLogger(tracking_uri=f"sqlite:///{path}/mlflow.db"), in_mlflow),
}


@pytest.fixture(scope="module")
def logged(offline: None, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Values]:
    """What each logger has of one run with every callback, and a value that is not finite."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.chdir(tmp_path_factory.mktemp("run"))
        installed = [kind for kind in LOGGERS if "mlflow" not in kind or find_spec("mlflow")]
        loggers = {kind: LOGGERS[kind][0](tmp_path_factory.mktemp(kind)) for kind in installed}
        two: Any = {"one": str(reference), "two": str(reference)}
        distances = EmbeddingDistance(two, ["rms", "gram"]), EmbeddingDistance(reference, ["cka", "procrustes"])
        limit = EmbeddingDistance(Limit(depth=4, units=8), ["output"])
        trainer = fit(
            Path(), ResNet(**SMALL), mlu(), FeatureUpdate(), *distances, limit, logger=[*loggers.values()], max_steps=2
        )
        log_values(trainer, {"mlu/distance/output/nan": math.nan})
        return {kind: LOGGERS[kind][1](logger) for kind, logger in loggers.items()}


@pytest.mark.parametrize("kind", LOGGERS)
def test_values_are_the_same_in_every_logger(kind: str, logged: dict[str, Values]) -> None:
    pytest.importorskip("mlflow" if "mlflow" in kind else "torch")
    found, expected = (
        {name: values for name, values in logged[each].items() if re.match("mlu/(?!plan)", name)}
        for each in (kind, "files")
    )
    assert {name.split("/")[1] for name in expected} == {"distance", "update"} and len(expected) == 38
    if "mlflow" in kind:  # Lightning takes "=" out of its names
        expected = {name.replace("=", ""): values for name, values in expected.items()}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        digits = 2**-23 if kind == "tensorboard" else 0
        assert found[name] == pytest.approx(values, rel=digits, abs=1e-40, nan_ok=True), name


def test_no_name_is_the_folder_of_another(logged: dict[str, Values]) -> None:
    memory, tokens = Memory(), torch.randint(9, (8, 7))
    model = CausalTransformer(vocabulary=9, context=6, depth=2, embedding=12, heads=2, head_dim=4)
    fit(Path(), model, FeatureUpdate(), logger=memory, max_steps=1, data=DataLoader(tokens, batch_size=4))  # type: ignore[arg-type]
    for names in ({*logged["csv"]}, {*memory.logged[1]}):
        assert "mlu/update/all/mlp" in names
        for name in names:
            assert not any(other.startswith(f"{name}/") for other in names), name


def test_many_values_at_once_are_parted_for_mlflow() -> None:
    calls: list[Any] = []

    class Recording(MLFlowLogger):
        def __init__(self) -> None: ...

        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            calls.append(metrics)

    trainer = fit(Path(), ResNet(**SMALL), logger=False, max_steps=1)
    trainer.loggers = [Recording()]
    log_values(trainer, {f"mlu/update/mlp/s={i}": float(i) for i in range(2500)})
    assert [len(call) for call in calls] == [1000, 1000, 500]
    assert {name: value for call in calls for name, value in call.items()} == {
        f"mlu/update/mlp/s{i}": float(i) for i in range(2500)
    }
