"""The recipe of the paper's nonlinear experiment, with few and tiny networks."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from recipes.paper_rates import report
from recipes.paper_rates import run as recipe

QUICK = {"depth": 4, "sizes": 3, "smallest": 2, "largest": 17, "seeds": 2, "limit_depth": 8, "limit_units": 32}


def arguments(folder: Path, *more: str) -> list[str]:
    study = [f"--study.{name}={value}" for name, value in QUICK.items()]
    return [*study, f"--output={folder}", "--workers=1", *more]


def points_in(folder: Path) -> dict[tuple[int, int, int], dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "points.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    found = {(point["hidden"], point["embedding"], point["seed"]): point for point in lines}
    assert len(found) == len(lines), "no network is trained twice"
    return found


def test_widths_are_the_papers() -> None:
    """20 log-spaced values from 1.5 to 2000, rounded down."""
    by_hand = [math.floor(1.5 * (2000 / 1.5) ** (i / 19) + 1e-9) for i in range(20)]
    assert recipe.Study().widths == by_hand and by_hand[:4] == [1, 2, 3, 4] and by_hand[-1] == 2000
    jobs = recipe.Study().jobs
    assert len(jobs) == 20 * 20 * 5 == len(set(jobs)) and jobs == sorted(jobs, key=lambda job: job[0] * job[1])


def test_loss_is_that_of_the_paper() -> None:
    """Σ(f − Y)²/(2·N·d_out) at η = 1 is half the mean squared error that ResNet has."""
    problem = recipe.paper_problem()
    assert problem.inputs.shape == problem.targets.shape == (10, 5) and problem.module_lr == pytest.approx(0.5)
    assert [problem.embedding_std**2, problem.readout_std**2, problem.steps] == pytest.approx([1 / 5, 5, 15])


@pytest.mark.slow
def test_run_that_is_cut_off_goes_on(in_this_process: None, monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    recipe.main(arguments(tmp_path))
    whole = points_in(tmp_path)
    assert set(whole) == {(m, d, s) for m in (2, 5, 17) for d in (2, 5, 17) for s in (0, 1)}
    assert "left for another call" not in capsys.readouterr().out
    for (_, _, seed), point in whole.items():
        assert 0 < point["stream"] < 10 and 0 < point["output"] < 10
        assert (point["reference_stream"] is None) == (seed == 1), "only the first is coupled to the largest network"
    assert (tmp_path / "paper_rates.png").read_bytes().startswith(b"\x89PNG")
    made = (tmp_path / "limits.safetensors").stat().st_mtime_ns
    path = tmp_path / "points.jsonl"
    monkeypatch.setattr(recipe, "save_figure", lambda *_: None)
    path.write_text("", encoding="utf-8")
    recipe.main(arguments(tmp_path, "--minutes=0"))
    assert "18 of 18 networks are left for another call" in capsys.readouterr().out
    study = path.read_text(encoding="utf-8").splitlines()[0]
    lines = [json.dumps(point) for point in list(whole.values())[:16]]
    path.write_text("\n".join([study, *lines, lines[-1][:-30]]), encoding="utf-8")  # as a run that is killed leaves it
    recipe.main(arguments(tmp_path, "--minutes=0"))
    assert "2 of 18 networks are left for another call" in capsys.readouterr().out
    monkeypatch.undo()  # the last two in a process that is started for them
    monkeypatch.setattr(recipe, "save_figure", lambda *_: None)  # which takes longer than the runs
    recipe.main(arguments(tmp_path))
    again = points_in(tmp_path)
    for point in (*whole.values(), *again.values()):
        del point["seconds"]
    assert again == whole, "the same network has the same errors"
    assert (tmp_path / "limits.safetensors").stat().st_mtime_ns == made, "the limit is not made again"
    with pytest.raises(SystemExit, match=r"runs of a study with other settings \(seeds\).*--output another folder"):
        recipe.main(arguments(tmp_path, "--study.seeds=3"))


def test_report_recovers_the_constants_of_synthetic_networks() -> None:
    def error(m: int, d: int, output: bool) -> float:
        second = 3 * d / (50 * m) if output else 0.8 * math.sqrt(d / (50 * m))
        return math.hypot(second, 2.5 / math.sqrt(d), 0.01)

    sizes = (4, 16, 64, 256, 1024)
    errors = {(m, d): (error(m, d, False), error(m, d, True)) for m in sizes for d in sizes}
    factors = {0: math.sqrt(0.5), 1: math.sqrt(1.5)}  # whose mean square is one
    points = [report.Point(*at, s, f * a, f * b) for at, (a, b) in errors.items() for s, f in factors.items()]
    assert report.means(points, "stream") == pytest.approx({at: stream for at, (stream, _) in errors.items()})
    console = Console(width=140, record=True, file=io.StringIO())
    limits = {"1": {"stream": 1e-3, "output": 2e-3}}
    limits |= {f"L={depth}": {"stream": 0.3 / depth, "output": 0.2 / depth} for depth in (2, 4)}
    console.print(*report.report(points, 50, limits))
    text = console.export_text()
    wanted = {"stream": ["0.80", "2.50 ± 0.00", "0.0100 ± 0.0000", "0%"], "output": ["3.00", "2.50 ± 0.00"]}
    for what, parts in wanted.items():
        lines = [line for line in text.splitlines() if f"{what}, to the infinite model" in line]
        assert any(all(part in line for part in parts) for line in lines), what
    assert "c1 = 0.30 to 0.30 in the stream and 0.20 to 0.20 on the output" in " ".join(text.split())
