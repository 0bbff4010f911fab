"""What is read from the folder of a run, also where files are damaged, made up, or of another run."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.check_reports import failing_report
from helpers.html_pages import Page
from helpers.run_folders import plan_yaml, text_of, write_csv, write_events

from mlu_lightning.planning.plan import Plan
from mlu_lightning.reporting import read_run, run_page

LOSSES = {step: 2.0**-step for step in range(60)}  # which float32 has exactly


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.csv", b"step,loss\nx,1\n"),
        ("metrics.csv", b"\xff\xfe"),
        ("check.json", b"{}"),
        ("plan.yaml", b"mlu_plan: 1\n"),
        ("model.ckpt", b"no checkpoint"),
        ("model.ckpt", b"PK\x03\x04"),
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
    assert "i" not in page.tags and f"<i>/{name}" in "".join(page.text)


def test_other_files_are_passed_by(tmp_path: Path) -> None:
    for name, text in {"hparams.yaml": "depth: 2", "notes.txt": "mlu_plan: 1"}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="Nothing of a run was found"):
        read_run(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_what_was_logged_before_the_damage_is_kept(damage: str, tmp_path: Path) -> None:
    path = write_events(tmp_path, LOSSES)
    content = path.read_bytes()
    at = len(content) * 2 // 3
    path.write_bytes(content[:at] + (bytes([content[at] ^ 0xFF]) + content[at + 1 :] if damage == "flipped" else b""))
    record = read_run(tmp_path)
    kept = dict(record.values["loss"])
    assert 0 < len(kept) < len(LOSSES) and kept == {step: LOSSES[step] for step in range(len(kept))}
    assert list(record.problems) == [path.name]
    says = f"of its {path.stat().st_size:,} bytes can be read: it is damaged, or its run was killed or goes on"
    assert says in text_of(record)


def test_a_log_of_nothing_but_noise_is_named(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1.host").write_bytes(bytes(range(256)) * 9)
    record = read_run(tmp_path)
    assert list(record.problems) == ["events.out.tfevents.1.host"] and not record.values


@pytest.mark.parametrize(
    ("name", "text"), [("metrics.csv", ""), ("metrics.csv", "step,loss\n"), ("events.out.tfevents.1.host", "")]
)
def test_an_empty_log_is_named(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    write_csv(tmp_path / "other" / "metrics.csv", {0: 1.0})
    record = read_run(tmp_path)
    assert record.problems == {name: "Nothing is logged in it: its run was killed before that, or goes on"}
    assert record.values == {"loss": ((0, 1.0),)}
    assert f"{name}Nothing is logged in it: its run was killed" in text_of(record)  # two cells of a row


def test_logs_of_another_run_are_left_out(tmp_path: Path) -> None:
    write_csv(tmp_path / "version_0" / "metrics.csv", {0: 1.0, 1: 0.5})
    write_csv(tmp_path / "version_1" / "metrics.csv", {1: 0.75, 2: 0.25})
    record = read_run(tmp_path)
    assert record.values == {"loss": ((0, 1.0), (1, 0.5))} and list(record.problems) == ["version_1/metrics.csv"]
    says = "version_1/metrics.csv", "another run", "Give the folder of one run."
    assert all(part in text_of(record) for part in says)


def test_logs_of_one_run_agree_though_one_is_in_float32(tmp_path: Path) -> None:
    values = {0: 1 / 3, 1: float("nan"), 2: 1e-30}
    write_csv(tmp_path / "csv" / "metrics.csv", values)
    write_events(tmp_path / "events", values | {3: 4.0})
    record = read_run(tmp_path)
    assert not record.problems and [step for step, _ in record.values["loss"]] == [0, 1, 2, 3]


def test_a_resumed_run_goes_over_some_steps_again(tmp_path: Path) -> None:
    write_events(tmp_path, {0: 8.0, 1: 4.0, 2: 3.0})
    write_events(tmp_path, {2: 2.0, 3: 1.0})
    record = read_run(tmp_path)
    assert not record.problems and dict(record.values["loss"]) == {0: 8.0, 1: 4.0, 2: 2.0, 3: 1.0}


def test_a_cell_that_is_no_number_leaves_the_others(tmp_path: Path) -> None:
    write_csv(tmp_path / "metrics.csv", {0: "<b>", 1: 0.5})
    record = read_run(tmp_path)
    assert record.values == {"loss": ((1, 0.5),)} and "loss at step 0 is '<b>'" in text_of(record)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c, row: row.update(verdict='"><script>alert(1)</script>'), "is none of pass, fail, undecided"),
        (lambda c, row: row.update(axis="<b>"), "is none of depth, hidden, embedding, width, together"),
        (lambda c, row: row["quantity"].update(kind=["start"]), "is none of start, update"),
        (lambda c, row: row["quantity"].update(name=1), "1 should be text"),
        (lambda c, row: row["points"][0].update(factor="<b>"), "should be a whole number"),
        (lambda c, row: row["points"][0].update(value="<b>"), "could not convert string to float"),
        (lambda c, row: c.update(warnings=[None]), "None should be text"),
        (lambda c, row: c.update(seeds=True), "True should be a whole number"),
        (lambda c, row: c.update(rows=[1]), "This is no report of a check"),
    ],
)
def test_a_check_that_is_none_is_named(change: Callable[[Any, Any], Any], says: str, tmp_path: Path) -> None:
    content = json.loads(failing_report().to_json())
    change(content, content["rows"][0])
    (tmp_path / "check.json").write_text(json.dumps(content))
    record = read_run(tmp_path)
    assert not record.checks and says in text_of(record)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [("value: 1.0", "value: '<b>'", "should be a number"), ("shape: [4, 3]", "shape: 'abc'", "should be a list")],
)
def test_a_plan_that_makes_no_sense_is_named_and_the_rest_shown(old: str, new: str, says: str, tmp_path: Path) -> None:
    plan = plan_yaml()
    assert old in plan
    (tmp_path / "a.yaml").write_text(plan.replace(old, new))
    (tmp_path / "b.yaml").write_text(plan)
    record = read_run(tmp_path)
    assert f"{new} {says}" in record.problems["a.yaml"] and str(Plan.from_yaml(plan, "b.yaml")) in text_of(record)


@dataclass
class Command:
    path: str

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_a_checkpoint_runs_nothing(tmp_path: Path) -> None:
    made = tmp_path / "made"
    torch.save({"callbacks": Command(str(made))}, tmp_path / "a.ckpt")
    record = read_run(tmp_path)
    (problem,) = record.problems.items()
    assert not made.exists() and problem == ("a.ckpt", "It is not a checkpoint of a Trainer: it has no callbacks")


def test_a_checkpoint_with_objects_beside_the_plan_is_read(tmp_path: Path) -> None:
    made, plan = tmp_path / "made", plan_yaml()
    torch.save(
        {"hyper_parameters": Command(str(made)), "callbacks": {"MLUCallback": {"plan": plan}}}, tmp_path / "a.ckpt"
    )
    record = read_run(tmp_path)
    assert record.plans == {"a.ckpt": Plan.from_yaml(plan, "a.ckpt")} and not record.problems and not made.exists()


@pytest.mark.parametrize("content", [[1], {"weight": torch.ones(1)}, {"callbacks": 1}])
def test_other_files_of_torch_are_named(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.ckpt")
    assert read_run(tmp_path).problems == {"a.ckpt": "It is not a checkpoint of a Trainer: it has no callbacks"}


def test_checkpoints_in_the_old_format_and_without_the_callback_are_read(tmp_path: Path) -> None:
    for name, state in {"MLUCallback": {"plan": plan_yaml(), "mode": "hook"}, "EarlyStopping": {"plan": 1}}.items():
        torch.save({"callbacks": {name: state}}, tmp_path / f"{name}.ckpt", _use_new_zipfile_serialization=False)
    record = read_run(tmp_path)
    assert list(record.plans) == ["MLUCallback.ckpt"] and not record.problems


def test_without_tensorboard_it_is_said_how_to_read_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_events(tmp_path / "run", {0: 1.0})
    (tmp_path / "tensorboard.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "pip install tensorboard" in read_run(tmp_path / "run").problems[path.name]
