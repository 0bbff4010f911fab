"""``mlu-lightning report``: one page of what a run has left, whatever is in its files."""

import base64
import json
import os
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from helpers.check_command import command
from helpers.check_reports import failing_report
from helpers.html_pages import Page
from helpers.logged_runs import BASE, fit, mlu
from helpers.recipe_results import rows
from helpers.run_folders import plan_yaml, text_of, write_csv
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.lines import Line2D

from mlu_lightning import EmbeddingDistance, FeatureUpdate, Plan, ReferenceRecorder
from mlu_lightning.cli import main
from mlu_lightning.models import ResNet
from mlu_lightning.reporting import RunRecord, read_run, run_page
from mlu_lightning.reporting.curves import panel_figure, panels_of

STEPS = 5
CHECK = failing_report(("a <b>warning</b>",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    run = root / "csv" / "version_0"
    recorder = ReferenceRecorder(run / "large.safetensors")
    fit(root, ResNet(**BASE | {"embedding": 16, "hidden": 32}), mlu(), recorder, max_steps=STEPS)
    watches = [EmbeddingDistance(recorder.path), FeatureUpdate(), ModelCheckpoint(run / "checkpoints")]
    loggers = [CSVLogger(root, "csv", 0), TensorBoardLogger(root, "tensorboard", 0)]
    module = ResNet(**BASE | {"depth": 4})
    fit(root, module, mlu(), *watches, logger=loggers, log_every_n_steps=1, max_steps=STEPS)
    (run / "check.json").write_text(CHECK.to_json())
    return root


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return run_page(read_run(folder / "csv" / "version_0"))


def test_failures_come_first(text: str, tmp_path: Path) -> None:
    check = json.loads(CHECK.to_json())
    rows = [{**row, "verdict": "pass"} for row in check["rows"]]
    for name, content in (("a", check | {"verdict": "pass", "causes": [], "rows": rows}), ("b", check)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "check.json").write_text(json.dumps(content))
    (tmp_path / "broken.ckpt").write_bytes(b"x")
    shown = text_of(read_run(tmp_path))
    order = ["FAIL", "PASS", "broken.ckpt", "b/check.json", "Slopes that fail", "a/check.json", "Slopes that pass"]
    places = [shown.upper().index(part.upper()) for part in order]
    assert places == sorted(places)


def logged(folder: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for row in rows(folder / "csv" / "version_0" / "metrics.csv"):
        for name in [name for name, value in row.items() if value and name not in ("step", "epoch")]:
            found.setdefault(name, {})[int(row["step"])] = float(row[name])
    return found


def test_loggers_tell_the_same(folder: Path) -> None:
    values = logged(folder)
    assert {name.split("/")[1] for name in values if name.startswith("mlu/")} == {"distance", "update"}
    of_csv = read_run(folder / "csv" / "version_0").values
    assert {name: dict(curve) for name, curve in of_csv.items()} == values
    of_tensorboard = read_run(folder / "tensorboard" / "version_0").values
    for name, curve in values.items():
        assert dict(of_tensorboard[name]) == pytest.approx(curve, rel=1e-6), name
    together = read_run(folder)
    assert not together.problems
    assert {name: dict(curve) for name, curve in together.values.items() if name in values} == values


def test_page_has_it_all_and_needs_nothing_else(folder: Path, text: str) -> None:
    record = read_run(folder / "csv" / "version_0")
    assert list(record.checks) == ["check.json"] and list(record.references) == ["large.safetensors"]
    assert len(record.plans) == 1 and not record.problems
    page = Page(text)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert not re.search(r"(?:https?:)?//[a-z]", re.sub(r"base64,[^\"]*", "", text))
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.images)
    pictures = [base64.b64decode(source.partition(",")[2]).decode() for source in page.images]
    axes, features, distances = 2, ["all", "mlp", "output", "stream"], ["cka", "gram", "output", "procrustes", "rms"]
    panels = [re.findall("<text[^>]*>([^<]*)</text>", picture) for picture in pictures]
    assert len(pictures) == axes + len(features) + len(distances) + 1
    for names, title, label in zip(
        panels[axes:],
        [*features, *distances, "losses"],
        [*["RMS of the change"] * len(features), *["distance"] * len(distances), "loss"],
        strict=True,
    ):
        assert {title, label, "optimizer step"} <= {*names}
    assert {"blocks.0", "blocks.3"} <= {*panels[axes + 1]} and "s=0.25" in panels[axes + 3]
    shown = "".join(page.text)
    assert str(next(iter(record.plans.values()))) in shown and "FAIL: 0 pass, 2 fail, 0 undecided" in shown
    assert "branch_in: look at its lr or eps" in shown and "a <b>warning</b>" in shown


def test_command(folder: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pages" / "run.html"
    main(["report", str(folder / "csv" / "version_0"), "--out", str(out)])
    printed = capsys.readouterr().out
    assert re.search(r"run.html: 1 plan, 1 check, \d+ logged values, 1 reference\.", printed)
    assert out.read_text() == text, "the same page again"
    out.unlink()
    for wrong, message in ((tmp_path / "none", "There is no folder"), (tmp_path, "Nothing of a run was found")):
        assert command("report", str(wrong)) == 1 and message in capsys.readouterr().err


def test_what_is_missing_is_said() -> None:
    text = "".join(Page(run_page(RunRecord(Path("run")))).text)
    missing = "No check.json was found", "No plan was found", "No reference was recorded", 'with "loss" in its name'
    assert [says for says in (*missing, "Nothing was logged under mlu/distance/") if says not in text] == []


def test_names_and_numbers_from_files_stay_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script> loss $x$ _"
    (tmp_path / "metrics.csv").write_text(f"step,{hostile},mlu/update/<b>/&\n1,nan,2\n2,1e400,3\n3,1,4\n")
    page = Page(run_page(read_run(tmp_path)))
    assert page.tags.isdisjoint({"script", "b"}) and hostile in "".join(page.text)


@pytest.mark.parametrize("warning", ["\ud800", "a\x00b", "[/red] :smile:", "$x^{$", "\u202e", "</li><script>"])
def test_any_text_can_be_shown(warning: str, tmp_path: Path) -> None:
    check = json.loads(CHECK.to_json())
    check["warnings"] = [warning]
    (tmp_path / "check.json").write_text(json.dumps(check))
    shown = text_of(read_run(tmp_path))
    assert "FAIL: 0 pass, 2 fail" in shown
    visible = warning if warning.isprintable() else warning.encode("unicode_escape").decode()
    assert f"Warning: {visible}." in shown


def test_printed_plans_have_warnings_as_they_are() -> None:
    plan = Plan.from_yaml(plan_yaml().replace("warnings: []", "warnings: ['[/red] :smile:']"), "plan")
    assert "Warning: [/red] :smile:." in str(plan)


def test_a_plan_is_shown_for_all_optimizers(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(plan_yaml())
    shown = text_of(read_run(tmp_path))
    for family in ("sgd", "adam", "adamw", "muon"):
        assert f"relative to the base shape: factors for {family}\n" in shown


def test_numbers_of_any_size_are_drawn_or_counted(tmp_path: Path) -> None:
    numbers = [1e308, -1e308, "nan", "inf", 0, 1e-320, 0.5, 2]
    for name in ("loss", "mlu/update/output"):
        write_csv(tmp_path / name.replace("/", "-") / "metrics.csv", dict(enumerate(numbers)), name)
    shown = text_of(read_run(tmp_path))
    assert "not drawn because they are not finite: 4" in shown  # but 0, 1e-320, 0.5 and 2
    assert "not drawn because they are not finite, or not above 0, as a logarithmic axis has them: 6" in shown


def lines_of(values: dict[str, Any]) -> dict[str, Line2D]:
    ((title, curves),) = panels_of(values, "mlu/distance/").items()
    (axes,) = panel_figure(title, curves, "distance", logarithmic=True).axes
    return dict(zip(curves, axes.get_lines(), strict=True))


def test_floors_are_dotted_in_the_color_of_their_depth() -> None:
    names = ["s=0/a", "s=0/b", "s=0/floor", "s=1/a", "s=1/highfloor", "s=1/floor"]
    lines = lines_of({f"mlu/distance/gram/{name}": ((1, 0.5), (2, 0.25)) for name in names})
    dotted = {name for name, line in lines.items() if line.get_linestyle() == ":"}
    assert dotted == {"s=0/floor", "s=1/floor"}
    color = {name: mpl.colors.to_hex(line.get_color()) for name, line in lines.items()}
    assert color["s=0/floor"] == color["s=0/a"] and color["s=1/floor"] == color["s=1/a"]
    assert color["s=0/a"] != color["s=1/a"] and sum(line.get_label() == "floor" for line in lines.values()) == 1


def test_rounding_does_not_flatten_a_panel() -> None:
    lines = lines_of({"mlu/distance/rms/s=0": ((0, 1e-16), (1, 1e-2)), "mlu/distance/rms/s=1": ((0, 0.1), (1, 1.0))})
    axes = next(iter(lines.values())).axes
    assert axes is not None and axes.get_ylim()[0] == pytest.approx(1e-6)


def test_the_command_says_what_it_could_not_read_or_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    write_csv(run / "metrics.csv", {0: 1.0})
    Path(os.fsdecode(os.fsencode(run) + b"/\xff.ckpt")).write_bytes(b"x")  # a name that is no text
    main(["report", str(run), "--out", str(tmp_path / "page.html")])
    assert "\\udcff.ckpt: It is no checkpoint" in capsys.readouterr().out
    assert "\\udcff.ckpt" in (tmp_path / "page.html").read_text()
    assert command("report", str(run), "--out", str(run)) == 1
    assert f"The page cannot be written to {run}: Is a directory. Give --out" in capsys.readouterr().err


def test_long_curves_keep_their_course() -> None:
    values = [1 / (1 + step) for step in range(50_000)]
    values[40_000] = 7.0
    (axes,) = panel_figure("x", {"all": tuple(enumerate(values))}, "update", logarithmic=True).axes
    (line,) = axes.lines
    steps, drawn = (np.asarray(data) for data in (line.get_xdata(), line.get_ydata()))
    assert len(steps) < 2100 and (np.diff(steps) > 0).all() and [steps[0], drawn.max()] == [0, 7.0]
    assert np.interp([10, 1000, 30_000], steps, drawn) == pytest.approx(
        [values[at] for at in (10, 1000, 30_000)], rel=1e-2
    )
