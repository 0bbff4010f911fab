"""Reports of checks: as tables, as JSON and back, as files, as a figure, and where runs are shown."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.check_reports import FACTORS, READ, failing_report, noisy, points
from helpers.logged_runs import finish, wandb_offline
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlu_lightning import CheckReport, Shape, log_check
from mlu_lightning.checking.quantities import Kind, Quantity
from mlu_lightning.checking.sizes import AXES
from mlu_lightning.checking.verdicts import Row, fit_row


@pytest.fixture
def report() -> CheckReport:
    def rows() -> Iterator[Row]:
        for axis in AXES:
            yield fit_row(READ, axis, points(noisy(1.0 if axis == "hidden" else 0.0, 0.01)))
            yield fit_row(Quantity(Kind.FEATURES, "blocks.* (mlp)"), axis, points(lambda f, s: math.nan))
            yield fit_row(Quantity(Kind.EFFECT_ON_STREAM, "branch_in", "branch_in"), axis, points(noisy(0.1, 0.01)))

    return CheckReport(Shape(2, 3, 4), FACTORS, 3, 5, tuple(rows()), ("post-norm",))


def test_report_as_json_and_back(report: CheckReport, tmp_path: Path) -> None:
    report.save(tmp_path / "folder")
    text = (tmp_path / "folder" / "check.json").read_text()
    again = CheckReport.from_json(text)
    assert str(again) == str(report) and again.to_json() == text
    check, content = failing_report(), json.loads(text)
    assert CheckReport.from_json(check.to_json()) == check and content["verdict"] == "fail"
    assert set(content["rows"][0]["points"][0]) == {"factor", "seed", "value", "lowest", "highest"}
    assert content["rows"][1]["points"][0]["value"] is None, "JSON has no NaN"
    assert (tmp_path / "folder" / "check.txt").read_text() == f"{report}\n"
    assert (tmp_path / "folder" / "check.png").read_bytes()[:4] == b"\x89PNG"
    for wrong in ("", "[]", "{}", text.replace('"rows"', '"lines"')):
        with pytest.raises(ValueError, match="This is no report of a check"):
            CheckReport.from_json(wrong)


def test_report_says_what_fails(report: CheckReport) -> None:
    text = str(report)
    assert "FAIL: 9 pass, 6 fail, 0 undecided" in text
    assert "branch_in: look at its lr or eps; update of blocks.*.read.weight (branch_in) grows as hidden^1.0" in text
    assert "Failing too, which may follow from that: blocks.* (mlp)" in text and "Warning: post-norm." in text
    assert max(map(len, text.splitlines())) <= 125
    assert "Warning: [/red] :smile:." in str(failing_report(("[/red] :smile:",))), "as they are"


def test_figure_names_what_fails(report: CheckReport) -> None:
    figure = report.draw()
    assert {axes.get_title(loc="left") for axes in figure.axes} >= set(AXES)
    named = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert named == {"branch_in"} and figure._suptitle.get_text().startswith("FAIL")


def test_wandb_has_figure_verdict_and_rows(tmp_path: Path) -> None:
    logger, other = WandbLogger(offline=True, save_dir=tmp_path), CSVLogger(tmp_path)
    with wandb_offline(tmp_path):
        log_check([logger, other], failing_report())
        summary, media = dict(logger.experiment.summary), Path(logger.experiment.dir) / "media"
        finish()
    assert summary["mlu/check/verdict"] == "fail"
    (cause,) = summary["mlu/check/causes"]
    assert cause.startswith("branch_in: look at its lr or eps; update of blocks.*.read.weight (branch_in) grows as")
    assert len(list((media / "images" / "mlu").glob("check_*.png"))) == 1
    (table,) = (media / "table" / "mlu" / "check").glob("rows_*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"][:4] == ["kind", "name", "role", "axis"]
    wanted = [["update", "blocks.*.read.weight", "branch_in", axis] for axis in ("depth", "hidden")]
    assert [row[:4] for row in content["data"]] == wanted
    assert all(row[6] == "fail" for row in content["data"]) and not Path(other.log_dir).exists()


def test_tensorboard_has_figure_and_report(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    log_check([logger], failing_report())
    events = EventAccumulator(logger.log_dir).Reload()
    assert "mlu/check" in events.Tags()["images"]
    (text,) = events.Tensors("mlu/check/text_summary")
    assert "FAIL: 0 pass, 2 fail" in text.tensor_proto.string_val[0].decode()
