"""References as W&B artifacts: logged, downloaded, and refused."""

from pathlib import Path
from shutil import copyfile
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
from helpers.logged_runs import NAMES, SMALL, fit, mlu
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, WandbLogger

from mlu_lightning.callbacks import EmbeddingDistance, ReferenceRecorder
from mlu_lightning.callbacks.loggers import fetch_reference, log_reference
from mlu_lightning.models import ResNet

pytestmark = pytest.mark.usefixtures("offline")


def test_disabled_wandb_is_silent(reference: Path, tmp_path: Path) -> None:
    logger = WandbLogger(save_dir=tmp_path, mode="disabled")
    recorder = ReferenceRecorder(tmp_path / "run.safetensors")
    fit(tmp_path, ResNet(**SMALL), mlu(), EmbeddingDistance(reference), recorder, logger=logger)
    with pytest.raises(ValueError, match="online"):
        fetch_reference(trainer_of(logger, tmp_path), "team/project/large:v0")
    wandb.finish()


@pytest.mark.parametrize("upload", [True, False])
def test_it_is_an_artifact_if_wanted(upload: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Path] = []
    monkeypatch.setattr("mlu_lightning.callbacks.reference_recorder.log_reference", lambda _, path: logged.append(path))
    recorder = ReferenceRecorder(tmp_path / "run.safetensors", upload=upload)
    fit(tmp_path, ResNet(**SMALL), recorder, logger=False, max_steps=1)
    assert logged == [recorder.path] * upload


def test_artifact_that_cannot_be_staged_is_warned_of(reference: Path, logger: Any, monkeypatch: Any) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wandb.Artifact, "add_file", full)
    with pytest.warns(UserWarning, match=r"large.safetensors did not become.*No space left.*Upload the file later"):
        log_reference([logger], reference)


class Logged(wandb.Artifact):  # an artifact that need not be uploaded to be downloaded
    def download(self, root: Any = None, path_prefix: Any = None, **kwargs: Any) -> Any:
        for name, entry in self.manifest.entries.items():
            if name.startswith(path_prefix) and entry.local_path is not None:
                assert name.endswith(".safetensors")  # and not what else is in the artifact
                Path(root, name).parent.mkdir(parents=True, exist_ok=True)
                copyfile(entry.local_path, Path(root, name))
        return root


class Online:  # the side of a run, and of the API, that needs the network
    offline = disabled = False

    def __init__(self, stored: dict[str, wandb.Artifact]) -> None:
        self.stored = stored
        self.used: list[str] = []

    def use_artifact(self, name: str) -> wandb.Artifact:
        if name not in self.stored:
            raise wandb.errors.CommError(f"artifact '{name}' not found")
        self.used.append(name)
        return self.stored[name]

    artifact = use_artifact


def stored(*paths: Path) -> wandb.Artifact:
    artifact = Logged("large", "reference")
    for path in paths:
        artifact.add_file(str(path))
    return artifact


def trainer_of(logger: Logger | bool, folder: Path) -> Trainer:
    return Trainer(logger=logger, default_root_dir=folder, accelerator="cpu")


def test_path_of_a_file_is_that_file(reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch_reference(trainer_of(False, tmp_path), str(reference)) == reference
    name = tmp_path / "team" / "project" / "large:v0"  # the form of an artifact does not matter
    name.parent.mkdir(parents=True)
    copyfile(reference, name)
    monkeypatch.chdir(tmp_path)
    assert fetch_reference(trainer_of(False, tmp_path), "team/project/large:v0").resolve() == name


@pytest.mark.parametrize("through", ["run", "api"])
def test_artifact_is_downloaded(through: str, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "readme.md"
    readme.write_text("a wide run")
    online = Online({"team/project/large:v0": stored(reference, readme), "large:best": stored(reference)})
    monkeypatch.delenv("WANDB_MODE")
    if through == "api":
        monkeypatch.setattr(wandb, "Api", lambda: online)
        logger: Logger | bool = False
    else:
        logger = WandbLogger(experiment=online)  # type: ignore[arg-type]
    trainer, folder = trainer_of(logger, tmp_path), tmp_path / "mlu_references"
    for source, place in {"team/project/large:v0": "team/project/large-v0", "large:best": "large-best"}.items():
        for _ in range(2):
            path = fetch_reference(trainer, source)
            assert path == folder / place / "large.safetensors" and path.read_bytes() == reference.read_bytes()
            assert list(path.parent.iterdir()) == [path]
    assert online.used == ["team/project/large:v0"] * 2 + ["large:best"] * 2


def test_artifact_of_another_version_takes_the_place(reference: Path, tmp_path: Path) -> None:
    other = tmp_path / "large.safetensors"
    other.write_bytes(b"other")
    online = Online({"large:latest": stored(other)})
    trainer = trainer_of(WandbLogger(experiment=online), tmp_path / "runs")  # type: ignore[arg-type]
    assert fetch_reference(trainer, "large:latest").read_bytes() == b"other"
    online.stored["large:latest"] = stored(reference)
    assert fetch_reference(trainer, "large:latest").read_bytes() == reference.read_bytes()


def test_a_run_is_compared_with_an_artifact(reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "Api", lambda: Online({"team/project/large:v0": stored(reference)}))
    monkeypatch.delenv("WANDB_MODE")
    logged = []
    for source in (str(reference), "team/project/large:v0"):
        torch.manual_seed(0)
        trainer = fit(tmp_path, ResNet(**SMALL), mlu(), EmbeddingDistance(source))
        logged.append({name: trainer.callback_metrics[name] for name in NAMES})
    assert logged[0] == logged[1]


def test_artifacts_that_cannot_be_used_are_refused(reference: Path, tmp_path: Path) -> None:
    second = tmp_path / "second.safetensors"
    copyfile(reference, second)
    online = Online({"a/b/two:v0": stored(reference, second), "a/b/none:v0": stored()})
    trainer = trainer_of(WandbLogger(experiment=online), tmp_path)  # type: ignore[arg-type]
    for name, problem in {
        "two": "holds 2 safe",
        "none": "holds 0 safe",
        "missing": "'a/b/missing:v0' not found",
    }.items():
        with pytest.raises(ValueError, match=rf"a/b/{name}:v0.*{problem}.*path of its local file"):
            fetch_reference(trainer, f"a/b/{name}:v0")
    assert not list(tmp_path.glob("mlu_references/**/*.safetensors"))


def test_artifacts_need_wandb_online(logger: WandbLogger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = pytest.raises(ValueError, match=r"need W&B online, and it is offline here.*path of the local file")
    for present in (logger, False):
        with refused:
            fetch_reference(trainer_of(present, tmp_path), "team/project/large:v0")
    monkeypatch.delenv("WANDB_MODE")
    absent = "mlu_lightning.callbacks.loggers.find_spec"
    for spec in (None, SimpleNamespace(origin=None)):  # not at all, or only a folder of runs of this name
        monkeypatch.setattr(absent, lambda name, spec=spec: spec)
        with pytest.raises(ValueError, match="need W&B online, and it is not installed here"):
            fetch_reference(trainer_of(False, tmp_path), "team/project/large:v0")


@pytest.mark.parametrize(
    ("local_rank", "first", "everywhere", "expected"),
    [
        (1, Path("there/large.safetensors"), True, Path("there/large.safetensors")),
        (1, ValueError("of the first process"), False, "of the first process"),
        (1, Path("there/large.safetensors"), False, "on another machine"),
        (0, Path("there/large.safetensors"), False, "offline"),  # its own error, in the first process of a machine
    ],
)
def test_all_processes_have_the_path_or_an_error(
    local_rank: int, first: Any, everywhere: bool, expected: Any, tmp_path: Path
) -> None:
    trainer: Any = SimpleNamespace(
        local_rank=local_rank,
        is_global_zero=False,
        loggers=[],
        default_root_dir=tmp_path,
        strategy=SimpleNamespace(broadcast=lambda found: first, reduce_boolean_decision=lambda found: everywhere),
    )
    if isinstance(expected, Path):
        assert fetch_reference(trainer, "team/project/large:v0") == expected
        return
    with pytest.raises(ValueError, match=expected):
        fetch_reference(trainer, "team/project/large:v0")


@pytest.mark.parametrize("source", ["missing.safetensors", "runs/missing", "/a/b/c/d:v0", "C:/runs/large", "large:"])
def test_neither_a_file_nor_an_artifact(source: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"no file {source}, and.*entity/project/name:alias.*Give the path"):
        fetch_reference(trainer_of(False, tmp_path), source)
