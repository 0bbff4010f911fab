"""``mlu-lightning report``: one page of what a run has left, whichever logger has written it."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_check_verdicts import READ, noisy, points
from torch.utils.data import DataLoader, TensorDataset

from mlu_lightning import EmbeddingDistance, FeatureUpdate, MLUCallback, ReferenceRecorder, Shape, log_check
from mlu_lightning.checking.report import CheckReport
from mlu_lightning.checking.verdicts import fit_row
from mlu_lightning.cli import main
from mlu_lightning.models import ResNet
from mlu_lightning.reporting.page import run_page
from mlu_lightning.reporting.run_folder import RunRecord, read_run

SHAPE = {"depth": 2, "hidden": 8, "embedding": 4, "inputs": 3, "outputs": 2}
STEPS = 5


def report(slope: float) -> CheckReport:
    rows = tuple(fit_row(READ, axis, points(noisy(slope, 0.01))) for axis in ("depth", "hidden"))
    return CheckReport(Shape(2, 3, 4), (1, 2, 4, 8), 3, 5, rows, ("a <b>warning</b>",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders of one run in three loggers, with a checkpoint, a check and a reference beside the first."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
            patch.setenv(name, str(root / "wandb-files"))
        for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false", "CONSOLE": "off"}.items():
            patch.setenv(f"WANDB_{name}", value)
        os.makedirs(root / "wandb-files")
        wandb.finish()  # a run that another test has left would be taken
        wandb.teardown()
        draws = torch.Generator().manual_seed(0)
        data = TensorDataset(torch.randn(20, 3, generator=draws), torch.randn(20, 2, generator=draws))

        def fit(loggers: Any, *callbacks: Any, **shape: int) -> None:
            trainer = Trainer(
                accelerator="cpu",
                max_steps=STEPS,
                log_every_n_steps=1,
                logger=loggers,
                callbacks=[MLUCallback(lambda: ResNet(**SHAPE), init="coupled"), *callbacks],
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            )
            trainer.fit(ResNet(**SHAPE | shape), DataLoader(data, batch_size=4))

        run = root / "csv" / "version_0"
        recorder = ReferenceRecorder(run / "large.safetensors")
        fit(False, recorder, embedding=16, hidden=32)
        loggers = [
            CSVLogger(root, "csv", 0),
            TensorBoardLogger(root, "tensorboard", 0),
            WandbLogger(offline=True, save_dir=root),
        ]
        watches = [EmbeddingDistance(recorder.path), FeatureUpdate(), ModelCheckpoint(run / "checkpoints")]
        fit(loggers, *watches, depth=4)
        log_check(loggers, report(1.0))
        (root / "wandb-folder").write_text(str(Path(loggers[2].experiment.dir).parent))
        wandb.finish()
        wandb.teardown()
    (run / "check.json").write_text(report(1.0).to_json())
    yield root


def logged(folder: Path) -> dict[str, dict[int, float]]:
    """What the CSV file has."""
    found: dict[str, dict[int, float]] = {}
    with (folder / "csv" / "version_0" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    found.setdefault(name, {})[int(row["step"])] = float(value)
    return found


class Page(HTMLParser):
    """Text, images and links of a page; refuses what does not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.images: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        elif tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def wandb_folder(folder: Path) -> Path:
    return Path((folder / "wandb-folder").read_text())


def test_loggers_tell_the_same(folder: Path) -> None:
    values = logged(folder)
    assert {name.split("/")[1] for name in values if name.startswith("mlu/")} == {"distance", "update"}
    of_csv = read_run(folder / "csv" / "version_0").values
    assert {name: dict(curve) for name, curve in of_csv.items()} == values
    for other in (folder / "tensorboard" / "version_0", wandb_folder(folder)):
        found = read_run(other).values
        for name, curve in values.items():
            assert dict(found[name]) == pytest.approx(curve, rel=1e-6), (other.name, name)
    together = read_run(folder)
    assert not together.problems
    assert {name: dict(curve) for name, curve in together.values.items() if name in values} == values


def test_page_has_it_all_and_needs_nothing_else(folder: Path) -> None:
    record = read_run(folder / "csv" / "version_0")
    assert list(record.checks) == ["check.json"]
    assert list(record.references) == ["large.safetensors"]
    assert len(record.plans) == 1
    assert not record.problems
    text = run_page(record)
    page = Page(text)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert not re.search(r"(?:https?:)?//[a-z]", re.sub(r"base64,[^\"]*", "", text))
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.images)
    assert len(page.images) == 4  # check, features, distances, losses
    pictures = [base64.b64decode(source.partition(",")[2]).decode() for source in page.images]
    assert all(name in pictures[1] for name in ("blocks.0", "blocks.3", "s=0.25", "output"))
    assert all(name in pictures[2] for name in ("gram", "cka", "procrustes", "rms"))
    shown = "".join(page.text)
    assert str(next(iter(record.plans.values()))) in shown
    assert "FAIL: 0 pass, 2 fail, 0 undecided" in shown
    assert "branch_in: look at its lr or eps" in shown
    assert "a <b>warning</b>" in shown
    assert run_page(read_run(folder / "csv" / "version_0")) == text


def test_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pages" / "run.html"
    main(["report", str(folder / "csv" / "version_0"), "--out", str(out)])
    printed = capsys.readouterr().out
    assert re.search(r"run.html: 1 plan, 1 check, \d+ logged values, 1 reference\.", printed)
    assert out.read_text() == run_page(read_run(folder / "csv" / "version_0"))
    for wrong, message in ((tmp_path / "none", "There is no folder"), (tmp_path, "Nothing of a run was found")):
        if wrong == tmp_path:
            out.unlink()
        with pytest.raises(SystemExit) as end:
            main(["report", str(wrong)])
        assert end.value.code == 1
        assert message in capsys.readouterr().err


def test_what_is_missing_is_said() -> None:
    text = "".join(Page(run_page(RunRecord(Path("run")))).text)
    for says in (
        "No check.json was found",
        "No plan was found",
        "No reference was recorded",
        'with "loss" in its name',
    ):
        assert says in text
    assert "Nothing was logged under mlu/distance/" in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.csv", b"step,loss\nx,1\n"),
        ("metrics.csv", b"\xff\xfe"),
        ("check.json", b"{}"),
        ("plan.yaml", b"mlu_plan: 1\n"),
        ("model.ckpt", b"no checkpoint"),
        ("model.ckpt", b"PK\x03\x04"),
        ("run.wandb", b"something else"),
        ("reference.safetensors", b"\x17\x00\x00\x00\x00\x00\x00\x00mlu_lightning.reference"),
        ("reference.safetensors", b"\x01"),
    ],
)
def test_damaged_files_are_named_and_do_not_end_it(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "<i>").mkdir()
    (tmp_path / "<i>" / name).write_bytes(content)
    record = read_run(tmp_path)
    assert list(record.problems) == [f"<i>/{name}"]
    page = Page(run_page(record))
    assert "i" not in page.tags
    assert f"<i>/{name}" in "".join(page.text)


def test_names_and_numbers_from_files_stay_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> loss $x$ _"
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerows([["step", hostile, "mlu/update/<b>/&"], [1, "nan", 2], [2, "1e400", 3], [3, 1, 4]])
    page = Page(run_page(read_run(tmp_path)))
    assert page.tags.isdisjoint({"script", "b"})
    assert hostile in "".join(page.text)


def test_other_files_are_passed_by(tmp_path: Path) -> None:
    (tmp_path / "hparams.yaml").write_text("depth: 2")
    (tmp_path / "notes.txt").write_text("mlu_plan: 1")
    with pytest.raises(ValueError, match="Nothing of a run was found"):
        read_run(tmp_path)


def test_wandb_has_figure_verdict_and_rows(folder: Path) -> None:
    media = wandb_folder(folder) / "files" / "media"
    assert len(list((media / "images" / "mlu").glob("check_*.png"))) == 1
    (table,) = (media / "table" / "mlu" / "check").glob("rows_*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"][:4] == ["kind", "name", "role", "axis"]
    assert [row[:4] for row in content["data"]] == [
        ["update", "blocks.*.read.weight", "branch_in", axis] for axis in ("depth", "hidden")
    ]
    assert all(row[6] == "fail" for row in content["data"])
    binary = next(wandb_folder(folder).glob("*.wandb")).read_bytes()
    assert b"mlu/check/verdict" in binary or b"verdict" in binary


def test_tensorboard_has_figure_and_report(folder: Path) -> None:
    events = EventAccumulator(str(folder / "tensorboard" / "version_0")).Reload()
    assert "mlu/check" in events.Tags()["images"]
    (text,) = events.Tensors("mlu/check/text_summary")
    assert "FAIL: 0 pass, 2 fail" in text.tensor_proto.string_val[0].decode()
