"""The quickstart: its study, what it says of the runs, and its command."""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from mlu_lightning.cli import main
from mlu_lightning.quickstart import study as quickstart
from mlu_lightning.quickstart.results import loss_table, save_figure, verdicts
from mlu_lightning.quickstart.study import SHAPES, Run, Study, best_exponent, load_text, read_runs, run_study

EXPONENTS = (-8, -7, -6, -5, -4)


def _valley(shape: str, mlu: bool, bottom: float, least: float = 2.0) -> list[Run]:
    return [Run(shape, mlu, exponent, least + 0.1 * (exponent - bottom) ** 2) for exponent in EXPONENTS]


@pytest.fixture
def study() -> Study:
    return Study(exponents=EXPONENTS)


@pytest.fixture
def runs() -> list[Run]:
    """Losses whose minima are known: at 2^-6 for the base and with MLU, elsewhere without."""
    found = _valley("base", False, -6.0)
    for shape, bottom in zip(list(SHAPES)[1:], (-7.0, -5.5, -9.0), strict=True):
        found += _valley(shape, True, -6.0, 1.9) + _valley(shape, False, bottom, 1.95)
    return found


def test_default_text_is_that_of_the_standard_library() -> None:
    text = load_text()
    assert len(text) > 400_000 and b"The standard type hierarchy" in text


def test_texts_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"The text .*missing.txt cannot be read: No such file or directory"):
        load_text(str(tmp_path / "missing.txt"))
    (tmp_path / "short.txt").write_text("to be or not to be")
    message = r"short.txt has 18 bytes, and there is nothing to learn from less than 10 000"
    with pytest.raises(ValueError, match=message):
        load_text(str(tmp_path / "short.txt"))

    for content in (b"x" * 10_000, b"the same line\n" * 9_000):
        (tmp_path / "same.txt").write_bytes(content)
        with pytest.raises(ValueError, match=r"same.txt says the same again and again: .* bytes of it can be"):
            load_text(str(tmp_path / "same.txt"))
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", str(tmp_path / "pipe"), str(tmp_path)):
        with pytest.raises(ValueError, match=f"The text {path} is no file, but"):
            load_text(path)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"sparse has 1,099,511,627,776 bytes, and at most 268,435,456 are read"):
        load_text(str(tmp_path / "sparse"))
    with pytest.raises(ValueError, match=r"cannot be read: File name too long"):
        load_text("x" * 5000)
    with pytest.raises(ValueError, match=r"no runs of 0 steps.*--steps 1 or more"):
        Study(steps=0)
    with pytest.raises(ValueError, match=r"seed -1 is none"):
        Study(seed=-1)


def test_best_learning_rate_is_the_vertex_of_a_parabola(runs: list[Run]) -> None:
    assert best_exponent(runs, "base", mlu=True) == pytest.approx(-6)
    assert best_exponent(_valley("x", True, -6.3), "x", mlu=True) == pytest.approx(-6.3)
    assert best_exponent(_valley("x", True, -9.0), "x", mlu=True) == -8, "at an end nothing is extrapolated"
    diverged = [*_valley("x", True, -5.0)[:-1], Run("x", True, -4, math.nan)]
    assert best_exponent(diverged, "x", mlu=True) == -5, "nor next to a run that diverged"


def test_table_and_verdicts_are_those_of_the_runs(study: Study, runs: list[Run], tmp_path: Path) -> None:
    console = Console(width=120, record=True, file=(tmp_path / "table.txt").open("w"))
    console.print(loss_table(study, runs))
    text = console.export_text()
    assert text.count("2.000*") == 2, "the base's runs stand for both parameterizations"
    assert text.count("1.900*") == 3
    assert verdicts(study, runs) == [
        "8 × depth: the best learning rate is 1.00 times the base's with MLU, and 0.50 times the base's without.",
        "8 × hidden width: the best learning rate is 1.00 times the base's with MLU, and 1.41 times the base's without.",
        "8 × embedding: the best learning rate is 1.00 times the base's with MLU, and at most 0.25 times the base's "
        "(the smallest that was tried) without.",
    ]


def test_verdicts_say_when_they_know_little(study: Study, runs: list[Run]) -> None:
    diverged = [replace(run, loss=math.nan) if run.shape == "8 × embedding" and not run.mlu else run for run in runs]
    assert verdicts(study, diverged)[-1].endswith("with MLU, and unknown (every run diverged) without.")
    without_base = [replace(run, loss=math.nan) if run.shape == "base" else run for run in runs]
    assert verdicts(study, without_base)[0] == (
        "8 × depth: the best learning rate is unknown (every run of the base diverged) with MLU, "
        "and unknown (every run of the base diverged) without."
    )
    at_end = _valley("base", False, -3.0) + runs[len(EXPONENTS) :]
    assert verdicts(study, at_end)[0].startswith("base: the best learning rate is at an end of those tried")
    assert len(verdicts(study, at_end)) == len(verdicts(study, runs)) + 1


def test_runs_are_saved_as_json_that_any_reader_takes(study: Study, runs: list[Run], tmp_path: Path) -> None:
    runs[-1] = replace(runs[-1], loss=math.nan)
    path = tmp_path / "runs.json"
    assert read_runs(study, b"a", path) == []
    quickstart.save_runs(study, b"a", runs, path)
    content = json.loads((tmp_path / "runs.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert content["study"]["exponents"] == list(EXPONENTS)
    assert content["runs"][0] == {"shape": "base", "mlu": False, "exponent": -8, "loss": runs[0].loss}
    assert content["runs"][-1]["loss"] is None
    assert read_runs(study, b"a", path)[:-1] == runs[:-1] and math.isnan(read_runs(study, b"a", path)[-1].loss)
    for other, text, what in ((study, b"b", "text"), (replace(study, steps=9), b"a", "study")):
        with pytest.raises(ValueError, match=rf"runs.json has the runs of another {what}\. Give --out another folder"):
            read_runs(other, text, path)
    for wrong in ("", "[]", "{}", '{"runs": [1]}', '{"runs": [{"loss": 1}]}'):
        path.write_text(wrong)
        with pytest.raises(
            ValueError, match=r"runs.json cannot be read as runs of a quickstart: .* or remove the file\."
        ):
            read_runs(study, b"a", path)


def test_figure_marks_the_best_and_names_the_curves(study: Study, runs: list[Run], monkeypatch: Any) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    save_figure(study, runs, Path(os.devnull))
    for axes, exponents in zip(figures[0].axes, [(-6, -6, -6, -6), (-6, -7, -5.5, -8)], strict=True):
        large = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
        assert large == pytest.approx([2.0**exponent for exponent in exponents])
        assert {text.get_text() for text in axes.texts} == set(SHAPES)
        places = sorted(text.xy[1] for text in axes.texts)
        gap = np.diff(axes.get_ylim())[0] / 20
        assert min(np.diff(places)) > 0.99 * gap, "names do not overlap"


def test_figure_is_drawn_also_of_runs_that_diverged(study: Study, runs: list[Run], tmp_path: Path) -> None:
    runs[-1] = Run(runs[-1].shape, runs[-1].mlu, runs[-1].exponent, math.nan)
    save_figure(study, runs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_small_study_trains_and_is_the_same_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = {"base": quickstart.TransformerShape(1, 1, 16, 16), "deeper": quickstart.TransformerShape(2, 1, 16, 16)}
    study = Study(shapes=shapes, exponents=(-7, -5), steps=20)
    reported: list[Run] = []
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # one worker, because a process imports everything anew
    runs = run_study(study, load_text(), reported.append)
    kinds = (("base", False), ("deeper", True), ("deeper", False))
    assert [((run.shape, run.mlu), run.exponent) for run in runs] == [*itertools.product(kinds, (-7, -5))]
    assert sorted(map(str, reported)) == sorted(map(str, runs))
    assert all(1.5 < run.loss < math.log(256) for run in runs), "better than guessing among 256 bytes"
    assert len({run.loss for run in runs}) == len(runs)
    assert [quickstart._train(study, load_text(), replace(run, loss=math.nan)) for run in runs] == runs


def test_a_run_that_fails_ends_the_study(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Run] = []

    def fail(study: Study, text: bytes, run: Run) -> Run:
        started.append(run)
        time.sleep(0.05)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(quickstart, "_train", fail)
    monkeypatch.setattr("mlu_lightning.utilities.workers.ProcessPoolExecutor", lambda *args: ThreadPoolExecutor(1))
    with pytest.raises(RuntimeError, match="out of luck"):
        run_study(study, b"")
    assert len(started) < 10, "the other runs of 35 were not begun"


def said_by(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says when it refuses its arguments."""
    with pytest.raises(SystemExit) as exit_:
        main(["quickstart", *arguments])
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("mlu-lightning: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize("out", ["file", "file/folder"])
def test_a_folder_that_cannot_be_is_refused(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    error = said_by(capsys, "--out", str(tmp_path / out))
    assert f"{out} cannot be made: " in error and "Give --out the path of a folder" in error


def test_command_line_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = said_by(capsys, "--text", str(tmp_path / "missing.txt"), "--out", str(tmp_path / "out"))
    assert error.startswith("mlu-lightning: The text ") and not (tmp_path / "out").exists()


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is not installed: pip install 'mlu-lightning[plots]'" in said_by(capsys)


def test_interrupted_quickstart_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    trained: list[Run] = []

    def train(study: Study, text: bytes, run: Run) -> Run:
        trained.append(run)
        if len(trained) == 5:
            raise KeyboardInterrupt
        return replace(run, loss=2.0 + len(trained) / 1000)

    monkeypatch.setattr(quickstart, "_train", train)
    monkeypatch.setattr("mlu_lightning.utilities.workers.ProcessPoolExecutor", lambda *args: ThreadPoolExecutor(1))
    with pytest.raises(SystemExit) as exit_:
        main(["quickstart", "--out", str(tmp_path)])
    said, saved = capsys.readouterr().out, json.loads((tmp_path / "runs.json").read_text())["runs"]
    assert exit_.value.code == 130 and "Interrupted after 4 of 49 runs; the same command goes on" in said
    assert len(saved) == 4 and "2.001*" in said and "2.004" in said and not (tmp_path / "quickstart.png").exists()
    before = len(trained)
    main(["quickstart", "--out", str(tmp_path)])
    assert f"Going on in {tmp_path}, which has 4 of them already." in capsys.readouterr().out.replace("\n", "")
    assert len(trained) == before + 45 and len({*trained}) == 49
    main(["quickstart", "--out", str(tmp_path)])
    assert "has 49 of them already" in capsys.readouterr().out and len(trained) == before + 45


@pytest.mark.slow
def test_quickstart_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlu_lightning", "quickstart", "--out", str(tmp_path), "--steps", "5"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "49 runs of 5 steps" in result.stdout and "8 × depth: the best learning rate is" in result.stdout
    assert len(json.loads((tmp_path / "runs.json").read_text())["runs"]) == 49
    assert (tmp_path / "quickstart.png").stat().st_size > 20_000
