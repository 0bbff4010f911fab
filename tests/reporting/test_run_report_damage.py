"""Reports of folders in which something is damaged, made up, or of another run, and checks that W&B is given."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
import wandb
from helpers.logged_runs import records
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from matplotlib.lines import Line2D
from test_check_verdicts import READ, noisy, points
from test_run_report import Page
from torch.utils.tensorboard import SummaryWriter

from mlu_lightning import Shape, log_check
from mlu_lightning.checking.report import CheckReport
from mlu_lightning.checking.verdicts import fit_row
from mlu_lightning.cli import main
from mlu_lightning.models import ResNet
from mlu_lightning.planning.plan import Plan
from mlu_lightning.reporting.curves import curves_figure, panels_of
from mlu_lightning.reporting.page import run_page
from mlu_lightning.reporting.run_folder import RunRecord, read_run

LOSSES = {step: 2.0**-step for step in range(60)}  # which float32 has exactly


def a_check() -> CheckReport:
    rows = tuple(fit_row(READ, axis, points(noisy(1.0, 0.01))) for axis in ("depth", "hidden"))
    return CheckReport(Shape(2, 3, 4), (1, 2, 4, 8), 3, 5, rows)


def a_plan() -> str:
    module = ResNet(depth=2, hidden=8, embedding=4, inputs=3, outputs=2)
    return Plan.from_model(module, (torch.ones(4, 3), torch.ones(4, 2)), base=module).to_yaml()


def text_of(record: RunRecord) -> str:
    page = Page(run_page(record))
    assert page.tags.isdisjoint({"script", "b", "i"})
    shown = "".join(page.text)
    shown.encode()  # as a file has it
    return shown


def write_csv(path: Path, values: dict[int, Any], name: str = "loss") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"step,{name}\n" + "".join(f"{step},{value}\n" for step, value in values.items()))


def write_events(folder: Path, values: dict[int, float]) -> Path:
    before = set(folder.glob("*"))
    writer = SummaryWriter(str(folder), filename_suffix=f".{len(before)}")
    for step, value in values.items():
        writer.add_scalar("loss", value, step)
    writer.close()
    (path,) = set(folder.glob("*")) - before
    return path


@pytest.fixture(scope="module")
def in_wandb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an offline run that was given losses, and a check, which a CSVLogger was given as well."""
    root = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
            patch.setenv(name, str(root))
        for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false", "CONSOLE": "off"}.items():
            patch.setenv(f"WANDB_{name}", value)
        logger, other = WandbLogger(offline=True, save_dir=root), CSVLogger(root)
        for step, value in LOSSES.items():
            logger.log_metrics({"loss": value, "epoch": 0}, step=step)
        log_check([logger, other], a_check())
        folder = Path(logger.experiment.dir).parent
        wandb.finish()
        wandb.teardown()
        assert not Path(other.log_dir).exists()
        yield folder


def test_wandb_has_the_verdict_in_the_summary(in_wandb: Path) -> None:
    updates = [update for one in records(in_wandb) if one.HasField("summary") for update in one.summary.update]
    found = {"/".join(update.nested_key) or update.key: json.loads(update.value_json) for update in updates}
    assert found["mlu/check/verdict"] == "fail"
    (cause,) = found["mlu/check/causes"]
    assert cause.startswith("branch_in: look at its lr or eps; update of blocks.*.read.weight (branch_in) grows as")


def test_values_of_wandb_are_those_that_were_logged_and_no_sizes_of_media(in_wandb: Path) -> None:
    record = read_run(in_wandb)
    assert {name: dict(curve) for name, curve in record.values.items()} == {"loss": LOSSES}
    assert not record.problems


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) * 2 // 3],
    "flipped": lambda content: flipped(content, len(content) * 2 // 3),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("logger", ["wandb", "tensorboard"])
def test_what_was_logged_before_the_damage_is_kept(logger: str, damage: str, in_wandb: Path, tmp_path: Path) -> None:
    if logger == "wandb":
        (intact,) = in_wandb.glob("*.wandb")
        path = tmp_path / intact.name
    else:
        path = intact = write_events(tmp_path, LOSSES)
    content = intact.read_bytes()
    path.write_bytes(DAMAGES[damage](content))
    record = read_run(tmp_path)
    kept = dict(record.values["loss"])
    assert 0 < len(kept) < len(LOSSES)
    assert kept == {step: LOSSES[step] for step in range(len(kept))}
    assert list(record.problems) == [path.name]
    size = f"{path.stat().st_size:,}"
    assert f"of its {size} bytes can be read: it is damaged, or its run was killed or goes on" in text_of(record)


@pytest.mark.parametrize("name", ["run.wandb", "events.out.tfevents.1.host"])
def test_a_log_of_nothing_but_noise_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b":W&B\xe1\xbe\x00" + bytes(range(256)) * 9)
    record = read_run(tmp_path)
    assert list(record.problems) == [name]
    assert not record.values


@pytest.mark.parametrize(
    ("name", "text"),
    [("metrics.csv", ""), ("metrics.csv", "step,loss\n"), ("events.out.tfevents.1.host", "")],
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
    assert record.values == {"loss": ((0, 1.0), (1, 0.5))}
    assert list(record.problems) == ["version_1/metrics.csv"]
    assert "version_1/metrics.csv" in text_of(record)
    assert "another run" in text_of(record) and "Give the folder of one run." in text_of(record)


def test_logs_of_one_run_agree_though_one_is_in_float32(tmp_path: Path) -> None:
    values = {0: 1 / 3, 1: float("nan"), 2: 1e-30}
    write_csv(tmp_path / "csv" / "metrics.csv", values)
    write_events(tmp_path / "events", values | {3: 4.0})
    record = read_run(tmp_path)
    assert not record.problems
    assert [step for step, _ in record.values["loss"]] == [0, 1, 2, 3]


def test_a_resumed_run_goes_over_some_steps_again(tmp_path: Path) -> None:
    write_events(tmp_path, {0: 8.0, 1: 4.0, 2: 3.0})
    write_events(tmp_path, {2: 2.0, 3: 1.0})
    record = read_run(tmp_path)
    assert not record.problems
    assert dict(record.values["loss"]) == {0: 8.0, 1: 4.0, 2: 2.0, 3: 1.0}


def test_a_cell_that_is_no_number_leaves_the_others(tmp_path: Path) -> None:
    write_csv(tmp_path / "metrics.csv", {0: "<b>", 1: 0.5})
    record = read_run(tmp_path)
    assert record.values == {"loss": ((1, 0.5),)}
    assert "loss at step 0 is '<b>'" in text_of(record)


def first(content: Any) -> Any:
    return content["rows"][0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: first(c).update(verdict='"><script>alert(1)</script>'), "is none of pass, fail, undecided"),
        (lambda c: first(c).update(axis="<b>"), "is none of depth, hidden, embedding, together"),
        (lambda c: first(c)["quantity"].update(kind=["start"]), "is none of start, update"),
        (lambda c: first(c)["quantity"].update(name=1), "1 should be text"),
        (lambda c: first(c)["points"][0].update(factor="<b>"), "should be a whole number"),
        (lambda c: first(c)["points"][0].update(value="<b>"), "could not convert string to float"),
        (lambda c: c.update(warnings=[None]), "None should be text"),
        (lambda c: c.update(seeds=True), "True should be a whole number"),
        (lambda c: c.update(rows=[1]), "This is not a report of a check"),
    ],
)
def test_a_check_that_is_none_is_named(change: Callable[[Any], Any], says: str, tmp_path: Path) -> None:
    content = json.loads(a_check().to_json())
    change(content)
    (tmp_path / "check.json").write_text(json.dumps(content))
    record = read_run(tmp_path)
    assert not record.checks
    assert says in text_of(record)


def test_a_check_is_what_it_was() -> None:
    check = a_check()
    assert CheckReport.from_json(check.to_json()) == check


@pytest.mark.parametrize("warning", ["\ud800", "a\x00b", "[/red] :smile:", "$x^{$", "\u202e", "</li><script>"])
def test_any_text_can_be_shown(warning: str, tmp_path: Path) -> None:
    check = json.loads(a_check().to_json())
    check["warnings"] = [warning]
    (tmp_path / "check.json").write_text(json.dumps(check))
    shown = text_of(read_run(tmp_path))
    assert "FAIL: 0 pass, 2 fail" in shown
    visible = warning if warning.isprintable() else warning.encode("unicode_escape").decode()
    if warning == "a\x00b":
        visible = r"a\x00b"
    assert f"Warning: {visible}." in shown


def test_printed_tables_have_warnings_as_they_are() -> None:
    check = json.loads(a_check().to_json()) | {"warnings": ["[/red] :smile:"]}
    assert "Warning: [/red] :smile:." in str(CheckReport.from_json(json.dumps(check)))
    plan = Plan.from_yaml(a_plan().replace("warnings: []", "warnings: ['[/red] :smile:']"), "plan")
    assert "Warning: [/red] :smile:." in str(plan)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("depth: 1.0", "depth: '<b>'", "ratios, depth: '<b>' should be a number"),
        ("shape: [4, 3]", "shape: abc", "shape: 'abc' should be a list"),
    ],
)
def test_a_plan_that_makes_no_sense_is_named_and_the_rest_shown(old: str, new: str, says: str, tmp_path: Path) -> None:
    plan = a_plan()
    assert old in plan
    (tmp_path / "a.yaml").write_text(plan.replace(old, new))
    (tmp_path / "b.yaml").write_text(plan)
    record = read_run(tmp_path)
    assert says in record.problems["a.yaml"]
    shown = text_of(record)
    assert str(Plan.from_yaml(plan, "b.yaml")) in shown


def test_a_plan_is_shown_for_all_optimizers(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(a_plan())
    shown = text_of(read_run(tmp_path))
    for family in ("sgd", "adam", "adamw", "muon"):
        assert f"relative to the base shape: factors for {family}\n" in shown


class Command:
    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)

    def __init__(self, path: str) -> None:
        self.path = path


def test_a_checkpoint_runs_nothing(tmp_path: Path) -> None:
    made = tmp_path / "made"
    torch.save({"callbacks": Command(str(made))}, tmp_path / "a.ckpt")
    record = read_run(tmp_path)
    assert not made.exists()
    assert list(record.problems) == ["a.ckpt"]
    assert "could execute code, which is not done here" in record.problems["a.ckpt"]
    assert "weights_only" not in record.problems["a.ckpt"]  # torch's way around it


@pytest.mark.parametrize("content", [[1], {"weight": torch.ones(1)}, {"callbacks": 1}])
def test_other_files_of_torch_are_named(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.ckpt")
    assert read_run(tmp_path).problems == {"a.ckpt": "It is not a checkpoint of a Trainer: it has no callbacks"}


def test_checkpoints_in_the_old_format_and_without_the_callback_are_read(tmp_path: Path) -> None:
    for name, state in {"MLUCallback": {"plan": a_plan(), "mode": "hook"}, "EarlyStopping": {"plan": 1}}.items():
        torch.save({"callbacks": {name: state}}, tmp_path / f"{name}.ckpt", _use_new_zipfile_serialization=False)
    record = read_run(tmp_path)
    assert list(record.plans) == ["MLUCallback.ckpt"]
    assert not record.problems


def test_numbers_of_any_size_are_drawn_or_counted(tmp_path: Path) -> None:
    numbers = [1e308, -1e308, "nan", "inf", 0, 1e-320, 0.5, 2]
    for name in ("loss", "mlu/update/output"):
        write_csv(tmp_path / name.replace("/", "-") / "metrics.csv", dict(enumerate(numbers)), name)
    shown = text_of(read_run(tmp_path))
    assert "not drawn because they are not finite: 4" in shown  # but 0, 1e-320, 0.5 and 2
    assert "not drawn because they are not finite, or not above 0, as a logarithmic axis has them: 6" in shown


def lines_of(values: dict[str, Any]) -> dict[str, Line2D]:
    panels = panels_of(values, "mlu/distance/")
    (axes,) = curves_figure(panels, logarithmic=True).axes
    return dict(zip(next(iter(panels.values())), axes.get_lines(), strict=True))


def test_floors_are_dotted_in_the_color_of_their_depth() -> None:
    names = ["s=0/a", "s=0/b", "s=0/floor", "s=1/a", "s=1/highfloor", "s=1/floor"]
    lines = lines_of({f"mlu/distance/gram/{name}": ((1, 0.5), (2, 0.25)) for name in names})
    dotted = {name for name, line in lines.items() if line.get_linestyle() == ":"}
    assert dotted == {"s=0/floor", "s=1/floor"}
    color = {name: mpl.colors.to_hex(line.get_color()) for name, line in lines.items()}
    assert color["s=0/floor"] == color["s=0/a"] and color["s=1/floor"] == color["s=1/a"]
    assert color["s=0/a"] != color["s=1/a"]
    assert sum(line.get_label() == "floor" for line in lines.values()) == 1


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
    with pytest.raises(SystemExit) as end:
        main(["report", str(run), "--out", str(run)])
    assert end.value.code == 1
    assert f"The page cannot be written to {run}: Is a directory. Give --out" in capsys.readouterr().err


def test_without_tensorboard_it_is_said_how_to_read_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_events(tmp_path, {0: 1.0})
    monkeypatch.setitem(__import__("sys").modules, "tensorboard.backend.event_processing.event_accumulator", None)
    assert "pip install tensorboard" in read_run(tmp_path).problems[path.name]
