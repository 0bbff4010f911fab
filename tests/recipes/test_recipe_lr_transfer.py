"""The recipe of the learning rate's transfer: its search, its fits, its YAML files, and quick studies."""

from __future__ import annotations

import csv
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.recipe_modules import RECIPES, load
from matplotlib.figure import Figure
from torch.optim.lr_scheduler import CosineAnnealingLR

recipe, work = load("recipes.lr_transfer.run"), load("recipes.lr_transfer.runs")
searching, report = load("recipes.lr_transfer.search"), load("recipes.lr_transfer.report")

TINY = ["--model.steps=3", "--model.warmup=1", "--data.batches=3", "--data.validation_batches=1"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]

Loss = Callable[[dict[str, int], str, float, int], float]


def made_up(study: Any, shared: dict[Any, str], loss: Loss) -> list[Any]:
    """Runs of a complete search, with losses by a formula."""
    runs: list[Any] = []
    while missing := searching.missing_runs(study, shared, runs):
        runs += [
            replace(
                run, losses=(loss(dict(run.shape), run.parameterization, run.exponent, run.seed),) * len(study.horizons)
            )
            for run in missing
        ]
    return runs


@pytest.fixture
def study() -> Any:
    """One axis of three sizes, two parameterizations."""
    return replace(
        recipe.PRESETS["cpu"],
        axes={"depth": {"depth": [2, 4, 8]}},
        exponents=[-7.0, -6.5, -6.0, -5.5, -5.0],
        parameterization=["mlu", "sp"],
    )


@pytest.fixture
def shared(study: Any) -> dict[Any, str]:
    """At the base, runs of both parameterizations are the same."""
    return {
        (shape, parameterization): "mlu" if shape == study.base else parameterization
        for shape in study.shapes("depth")
        for parameterization in study.parameterizations
    }


def valley(shape: dict[str, int], parameterization: str, exponent: float, seed: int) -> float:
    """Least at 2^-6.1 for the base; with SP 0.7 octaves lower each time that depth doubles.

    Seeds are 0.1 octaves apart at the base, and by 0.2 more each time.
    """
    doublings = math.log2(shape["depth"] / 2)
    bottom = -6.1 - (0.7 * doublings if parameterization == "sp" else 0) + (0.1 + 0.2 * doublings) * (seed - 1)
    return 2 - 0.1 * doublings + 0.05 * (exponent - bottom) ** 2 + 0.01 * seed


def test_best_learning_rate_is_the_vertex_that_numpy_finds() -> None:
    draws = np.random.default_rng(0)
    exponents = np.array([-8.0, -7.0, -6.0, -5.0])
    losses = 2 + 0.1 * (exponents[:, None] + 6.2) ** 2 + 0.01 * draws.standard_normal((4, 3))
    found = searching.best({x: tuple(values) for x, values in zip(exponents, losses, strict=True)})
    curvature, slope, constant = np.polyfit(exponents[1:], losses[1:].mean(1), 2)
    vertex = -slope / (2 * curvature)
    each = [np.polyfit(exponents[1:], losses[1:, seed], 2) for seed in range(3)]
    assert (found.tried, found.bound) == (-6.0, "")
    assert found.exponent == pytest.approx(vertex)
    assert found.seeds == pytest.approx([-b / (2 * a) for a, b, _ in each])
    assert found.losses == pytest.approx([np.polyval(parabola, vertex) for parabola in each])
    assert np.mean(found.losses) == pytest.approx(constant - slope**2 / (4 * curvature))


def test_nothing_is_extrapolated() -> None:
    falling = searching.best({-7.0: (3.0,), -6.0: (2.0,), -5.0: (1.0,)})
    assert (falling.exponent, falling.bound, falling.losses) == (-5.0, "≥", (1.0,))
    rising = searching.best({-7.0: (1.0,), -6.0: (2.0,), -5.0: (3.0,)})
    assert (rising.exponent, rising.bound) == (-7.0, "≤")
    diverged = searching.best({-7.0: (3.0, 3.0), -6.0: (2.0, 2.0), -5.0: (1.0, math.nan)})
    assert (diverged.exponent, diverged.bound) == (-6.0, ""), "that some of its runs diverged says where it ends"
    # a seed whose own losses fall: no further than an octave
    assert searching.best({-7.0: (3.0, 3.0), -6.0: (2.0, 1.0), -5.0: (1.5, 4.0)}).seeds[0] == -5.0


def test_error_is_that_of_numpy() -> None:
    values = (0.3, -0.1, 0.7, 0.2)
    found = searching.Estimate.over(1.0, values)
    assert (found.value, found.error) == (1.0, pytest.approx(np.std(values, ddof=1) / 2))
    assert math.isnan(searching.Estimate.over(1.0, (0.3,)).error) and str(searching.Estimate(1.0, math.nan)) == "1.00"


def test_search_and_its_result(study: Any, shared: dict[Any, str]) -> None:
    runs = made_up(study, shared, valley)
    tried: dict[tuple[int, str], set[float]] = {}
    for run in runs:
        tried.setdefault((dict(run.shape)["depth"], run.parameterization), set()).add(run.exponent)
    assert tried == {
        (2, "mlu"): {-7.0, -6.5, -6.0, -5.5, -5.0},
        (4, "mlu"): {-7.0, -6.0, -5.0},
        (8, "mlu"): {-7.0, -6.0, -5.0},
        (4, "sp"): {-8.0, -7.0, -6.0, -5.0},
        (8, "sp"): {-9.0, -8.0, -7.0, -6.0, -5.0},
    }
    assert len(runs) == len(set(runs)) == 3 * 20

    found = {(one.factor, one.parameterization): one for one in searching.transfers(study, shared, runs)}
    assert found.keys() == set(itertools.product((1, 2, 4), ("mlu", "sp")))
    for (factor, parameterization), one in found.items():
        doublings = math.log2(factor)
        lower = 0.7 * doublings if parameterization == "sp" else 0
        assert one.exponent == pytest.approx(-6.1 - lower)
        assert one.drift.value == pytest.approx(-lower * math.log10(2), abs=1e-9)
        # each seed is compared with itself, so that what they are apart at the base is not in the error
        assert one.drift.error == pytest.approx(0.2 * doublings * math.log10(2) / math.sqrt(3), abs=1e-9)
        assert one.regret.value == pytest.approx(0.05 * (0.1 + lower) ** 2), "at 2^-6, the base's best of those tried"
        assert one.loss.value == pytest.approx(2.01 - 0.1 * doublings + 0.05 * (0.1 + 0.2 * doublings) ** 2 * 2 / 3)
    assert report.slope_of([found[factor, "sp"] for factor in (1, 2, 4)]).value == pytest.approx(-0.7)


def test_search_ends_where_losses_fall_for_ever(study: Any, shared: dict[Any, str]) -> None:
    def loss(shape: dict[str, int], parameterization: str, exponent: float, seed: int) -> float:
        return valley(shape, parameterization, exponent, seed) if shape["depth"] == 2 else 2 + 0.1 * exponent

    found = searching.transfers(study, shared, made_up(study, shared, loss))
    grown = [one for one in found if one.factor > 1]
    assert {(one.exponent, one.bound) for one in grown} == {(-7.0 - searching.LIMIT, "≤")}
    assert all(one.drift.value < -1.9 for one in grown)


def test_best_learning_rates_of_all_horizons_are_searched(study: Any, shared: dict[Any, str]) -> None:
    """The best learning rate is 2^-5.5 at 1 step, 2^-8.5 at 4: one run gives both."""
    long = replace(study, horizons=[1, 4], spacing=1.0)
    runs: list[Any] = []
    while missing := searching.missing_runs(long, shared, runs):
        runs += [replace(run, losses=((run.exponent + 5.4) ** 2, (run.exponent + 8.4) ** 2)) for run in missing]
    found = searching.transfers(long, shared, runs)
    assert {(one.horizon, round(one.exponent, 6)) for one in found} == {(1, -5.4), (4, -8.4)}


def test_runs_that_are_the_same() -> None:
    """By the tables of the papers: what differs is depth in µP, and the std of what writes to the stream in MLU."""
    cpu = recipe.PRESETS["cpu"]
    ends = {
        axis: {name: [values[0], values[2 if name == "depth" else -1]] for name, values in sizes.items()}
        for axis, sizes in cpu.axes.items()
    }
    small = replace(cpu, axes=ends)
    shared = work.shared_runs(work.plans_of(small))
    assert {shared[small.base, parameterization] for parameterization in small.parameterization} == {"mlu"}
    same = {
        axis: [shared[small.shapes(axis)[1], parameterization] for parameterization in small.parameterization]
        for axis in small.axes
    }
    assert same == {
        "depth": ["mlu", "mlu", "mup", "mup"],
        "heads": ["mlu", "completep", "completep", "sp"],
        "MLP width": ["mlu", "completep", "completep", "sp"],
        "embedding": ["mlu", "completep", "completep", "sp"],
        "all together": ["mlu", "mlu", "mup", "sp"],
    }


def test_what_makes_runs_the_same() -> None:
    """Also a factor that belongs to no parameter, as that of a tied readout."""
    quick = replace(recipe.PRESETS["cpu"], **recipe.QUICK)
    plan = work.plans_of(replace(quick, parameterization=["mlu"]))[quick.shapes("all together")[1], "mlu"]
    loose = tuple(replace(one, folds=()) for one in plan.multipliers)
    other = (*loose[:-1], replace(loose[-1], value=0.3))
    assert work.numbers(replace(plan, multipliers=loose)) != work.numbers(replace(plan, multipliers=other))
    assert work.numbers(plan) == work.numbers(replace(plan, warnings=("a warning",)))


def test_runs_said_to_be_the_same_are() -> None:
    quick = replace(recipe.PRESETS["cpu"], **recipe.QUICK)
    quick = replace(quick, axes={"depth": {"depth": [1, 2]}, "width": {"mlp_hidden": [16, 32]}})
    plans, deep, wide = work.plans_of(quick), quick.shapes("depth")[1], quick.shapes("width")[1]

    def losses(shape: Any, parameterization: str) -> tuple[float, ...]:
        return tuple(
            work.train(quick, work.Run(shape, parameterization, -3.0, 1), plans[shape, parameterization]).losses
        )

    assert losses(deep, "mlu") == losses(deep, "completep") != losses(deep, "mup") == losses(deep, "sp")
    assert losses(wide, "mlu") != losses(wide, "completep") == losses(wide, "mup") != losses(wide, "sp")


def test_schedule_is_that_of_torch() -> None:
    model = work.ScheduledTransformer(1, 1, 8, 8, lr=0.5, steps=20, warmup=4, context=8, head_dim=4)
    configured = model.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    mine = []
    for _ in range(20):
        mine.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    other = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), 0.5)
    cosine, theirs = CosineAnnealingLR(other, T_max=16, eta_min=0.05), []
    for _ in range(16):
        other.step()
        cosine.step()
        theirs.append(other.param_groups[0]["lr"])
    assert mine == pytest.approx([0.125, 0.25, 0.375, 0.5, *theirs])
    constant = work.ScheduledTransformer(1, 1, 8, 8, 0.5, 20, 4, "constant", 8, 4)
    assert [constant._factor(step) for step in (0, 3, 4, 19, 500)] == [0.25, 1, 1, 1, 1]


def test_file_of_runs(study: Any, tmp_path: Path) -> None:
    file = work.RunFile(tmp_path / "new" / "runs.jsonl", study)
    assert file.read() == []
    runs = [work.Run(study.base, "mlu", -6.5, seed, (2.5,), 1.25) for seed in (0, 1)]
    for run in [*runs, replace(runs[0], losses=(math.nan,))]:
        file.append(run)
    assert file.read()[:2] == runs and math.isnan(file.read()[2].losses[0])
    for line in file.path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    with file.path.open("a") as half:
        half.write('{"shape": {"dep')
    assert len(file.read()) == 3
    file.append(runs[1])
    assert len(file.read()) == 4, "what was cut off is not in the way"
    with pytest.raises(ValueError, match=r"other settings \(parameterizations, seeds\).*another folder"):
        replace(file, study=replace(study, seeds=2, parameterization=["mlu"])).read()


def test_settings_that_contradict_each_other() -> None:
    cpu = recipe.PRESETS["cpu"]
    with pytest.raises(ValueError, match="'b' begins at depth = 3, and another at 2"):
        replace(cpu, axes={"b": {"depth": [3, 4]}, "a": {"depth": [2, 4]}})
    with pytest.raises(ValueError, match="'a' has arguments with different numbers of values"):
        replace(cpu, axes={"a": {"depth": [2, 4], "heads": [2]}})
    with pytest.raises(ValueError, match=r"no class 'nowhere.Model'"):
        work.plans_of(replace(cpu, model={"class_path": "nowhere.Model"}))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Training without new processes, each of which imports everything again; gives the runs in their order."""
    begun: list[Any] = []

    def train(study: Any, run: Any, plan: Any) -> Any:
        begun.append(run)
        return work.train(study, run, plan)

    monkeypatch.setattr(recipe, "ProcessPoolExecutor", lambda *args: ThreadPoolExecutor(1))
    monkeypatch.setattr(recipe, "train", train)
    return begun


def test_quick_study(
    in_this_process: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["study", "--quick", f"--output={tmp_path}"]
    tracked, count = recipe.train, 0

    def interrupted(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count > 10:
            raise KeyboardInterrupt
        return tracked(*args)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recipe.main(command)
    begun = list(in_this_process)
    assert len(begun) == 10, "the others were not begun"

    recipe.main(command)
    printed = capsys.readouterr().out
    assert len(in_this_process) == len(set(in_this_process)), "no run is made twice"
    quick = replace(recipe.PRESETS["cpu"], **recipe.QUICK)
    runs = work.RunFile(tmp_path / "runs.jsonl", quick).read()
    assert {replace(run, losses=(), seconds=0.0) for run in runs} == set(in_this_process)
    assert f"{len(runs)} runs, " in printed and "The time is over" not in printed
    for name in ("lr_transfer.png", "lr_transfer_curves.png"):
        assert (tmp_path / name).stat().st_size > 20_000

    # a number of the table, from the losses of its runs
    wide = quick.shapes("MLP width")[1]
    losses: dict[float, list[float]] = {}
    for run in runs:
        if (run.shape, run.parameterization) == (wide, "sp"):
            losses.setdefault(run.exponent, []).append(run.losses[0])
    means = {exponent: np.mean(values) for exponent, values in losses.items()}
    least = min(means, key=lambda exponent: means[exponent])
    curvature, slope, _ = np.polyfit([-1, 0, 1], [means[least + step] for step in (-1, 0, 1)], 2)
    line = next(line for line in printed.splitlines() if "MLP width" in line and "│ SP " in line and "× 2" in line)
    assert line.split("│")[4].strip() == f"2^{least - slope / (2 * curvature):.1f}"
    assert line.split("│")[7].strip().startswith(f"{means[least] - slope**2 / (4 * curvature):.3f} ± ")

    # again: nothing, the same report
    before = len(in_this_process)
    recipe.main(command)
    assert len(in_this_process) == before
    again = capsys.readouterr().out
    assert again[again.index("┏") :] == printed[printed.index("┏") :]
    with pytest.raises(SystemExit, match="runs of a study with other settings"):
        recipe.main(["study", f"--output={tmp_path}"])


def test_time_that_is_over(in_this_process: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.main(["study", "--quick", "--minutes=0", f"--output={tmp_path}"])
    assert (
        "0 runs, 0.0 minutes of processor time. The time is over before these were complete" in capsys.readouterr().out
    )
    assert not in_this_process and not list(tmp_path.glob("*.png"))


def test_quick_horizons(in_this_process: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.main(["horizon", "--quick", f"--output={tmp_path}"])
    printed = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:4]] for line in printed.splitlines() if "│" in line]
    assert cells == [["constant", *row] for row in (["2", "× 1"], ["2", "× 2"], ["4", "× 1"], ["4", "× 2"])] + [
        ["cosine", "4", "× 1"],
        ["cosine", "4", "× 2"],
    ]
    assert (tmp_path / "lr_transfer_horizon.png").stat().st_size > 20_000
    file = next((tmp_path / "constant").glob("*.jsonl"))
    longest = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert all(len(run["losses"]) == 2 and run["losses"][0] != run["losses"][1] for run in longest)


def test_a_study_of_ones_own(in_this_process: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {
        "class_path": "mlu_lightning.models.CausalTransformer",
        "init_args": {"vocabulary": 256, "context": 8, "embedding": 8, "head_dim": 4, "heads": 1, "schedule_steps": 2},
    }
    data = {
        "class_path": "reference_run.Text",
        "init_args": {"context": 8, "batches": 2, "batch_size": 2, "validation_batches": 1},
    }
    settings = {
        "axes": {"size": {"mlp_hidden": [8, 16], "depth": [1, 2]}},
        "model": model,
        "data": data,
        "horizons": [2],
        "exponents": [-3, -2],
        "spacing": 1,
        "seeds": 1,
        "parameterization": ["mlu", "sp"],
    }
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    recipe.main(["study", f"--settings={path}", f"--output={tmp_path}"])
    printed = capsys.readouterr().out
    assert "│ size │ × 2  │ MLU " in printed and "│ size │ × 2  │ SP " in printed
    assert {run.parameterization for run in in_this_process if dict(run.shape)["depth"] == 2} == {"mlu", "sp"}
    path.write_text("shapes: 3")
    with pytest.raises(SystemExit, match="is not the settings of a study: give some of axes, model, data, horizons"):
        recipe.main(["study", f"--settings={path}", f"--output={tmp_path}"])


def test_summary_is_of_the_largest_size_and_marks_the_least(study: Any, shared: dict[Any, str]) -> None:
    def loss(shape: dict[str, int], parameterization: str, exponent: float, seed: int) -> float:
        return valley(shape, parameterization, exponent, 1) - (
            0.5 if parameterization == "sp" and shape["depth"] == 8 else 0
        )

    def cells(found: Any) -> list[list[str]]:
        columns = report.summary_table(study, found).columns
        return [[str(cell) for cell in row] for row in zip(*(column.cells for column in columns), strict=True)]

    # the least loss of SP is 2.01 - 0.2 - 0.5, its best learning rate 2^-7.5 instead of 2^-6.1
    found = searching.transfers(study, shared, made_up(study, shared, loss))
    mlu, sp = cells(found)
    assert mlu[:4] == ["depth", "MLU", "3 of 3", "[bold]+0.00 ± 0.00*[/bold]"]
    assert sp[:5] == ["depth", "SP", "3 of 3", "-0.42 ± 0.00 ", "-0.70 ± 0.00"]
    assert mlu[5:] == ["[bold]0.001 ± 0.000*[/bold]", "1.810 ± 0.000 "]
    assert sp[5:] == ["0.113 ± 0.000 ", "[bold]1.310 ± 0.000*[/bold]"]

    # nothing is said of a largest size that there was no time for
    partial = cells([one for one in found if (one.factor, one.parameterization) != (4, "sp")])
    assert partial[1][2:3] + partial[1][5:] == ["2 of 3", "-", "-"] and partial[0][6] == "[bold]1.810 ± 0.000*[/bold]"


def test_figure_shows_what_was_measured(
    study: Any, shared: dict[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    runs = made_up(study, shared, valley)
    report.save_figure(study, searching.transfers(study, shared, runs), tmp_path / "a.png")
    drift, regret, loss = figures[0].axes
    octave = math.log10(2)
    assert [bars[0].get_ydata().tolist() for bars in drift.containers] == [
        pytest.approx([0, 0, 0], abs=1e-9),
        pytest.approx([0, -0.7 * octave, -1.4 * octave], abs=1e-9),
    ]
    assert regret.containers[1][0].get_ydata() == pytest.approx([0.0005, 0.032, 0.1125])
    assert loss.containers[0][0].get_xdata().tolist() == [1, 2, 4]
    report.save_curves(study, shared, runs, tmp_path / "b.png")
    dots = [line.get_xdata()[0] for line in figures[1].axes[1].lines if line.get_marker() == "o"]
    assert dots == pytest.approx([2**-6.1, 2**-6.8, 2**-7.5])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_shipped_yaml_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = [
        "--model.depth=2",
        "--model.embedding=16",
        "--trainer.callbacks.init_args.parameterization=mup",
        *TINY,
        *QUIET,
    ]
    recipe.main(["fit", "--config", str(RECIPES / "lr_transfer/config.yaml"), *options])
    assert float(rows(tmp_path / "lr-transfer" / "fit" / "metrics.csv")[-1]["val_loss"]) < 8
    used = yaml.safe_load((tmp_path / "lr-transfer" / "fit" / "config.yaml").read_text())
    assert used["trainer"]["callbacks"][0]["init_args"]["parameterization"] == "mup" and used["model"]["depth"] == 2


def test_shipped_yaml_is_a_run_of_the_study() -> None:
    settings, cpu = yaml.safe_load((RECIPES / "lr_transfer/config.yaml").read_text()), recipe.PRESETS["cpu"]
    sizes = dict(cpu.shapes("all together")[-1])
    model = {**cpu.model["init_args"], **sizes, "lr": settings["model"]["lr"]}
    assert settings["model"] == model and settings["model"]["lr"] == pytest.approx(2**-5.5)
    assert settings["data"] == {**cpu.data["init_args"], "seed": 0}
    base = settings["trainer"]["callbacks"][0]["init_args"]["base"]["init_args"]
    assert base == {"vocabulary": 256, "context": 32, **dict(cpu.base)}


def test_shipped_sweep_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the agent of W&B does: one combination of the grid, as arguments of the command."""
    monkeypatch.chdir(RECIPES.parent)
    monkeypatch.setenv("WANDB_MODE", "offline")
    sweep = yaml.safe_load((RECIPES / "lr_transfer/sweep.yaml").read_text())
    grid = itertools.product(*(values["values"] for values in sweep["parameters"].values()))
    last = dict(zip(sweep["parameters"], list(grid)[-1], strict=True))
    assert last == {
        "trainer.callbacks.init_args.parameterization": "sp",
        "model.depth": 32,
        "model.lr": 0.0625,
        "seed_everything": 2,
    }
    args = [f"--{name}={value}" for name, value in {**last, "model.depth": 4}.items()]
    template = [["python"] if part == "${interpreter}" else [part] for part in sweep["command"]]
    filled = [part for parts in template for part in (args if parts == ["${args}"] else parts)]
    assert filled[:4] == ["${env}", "python", "${program}", "fit"] and sweep["program"] == "recipes/lr_transfer/run.py"
    folder = [f"--trainer.default_root_dir={tmp_path}", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    logged: dict[str, Any] = {}
    monkeypatch.setattr(
        "lightning.pytorch.loggers.WandbLogger.log_metrics", lambda self, metrics, step=None: logged.update(metrics)
    )
    recipe.main([*filled[3:], *TINY, *QUIET, *folder])
    assert math.isfinite(logged[sweep["metric"]["name"]])


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["cpu", "accelerator"])
def test_quick_study_as_a_command(preset: str, tmp_path: Path) -> None:
    command = [sys.executable, str(RECIPES / "lr_transfer/run.py"), "study", "--quick"]
    command += [f"--preset={preset}", f"--output={tmp_path}"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "regret at the largest" in printed.replace("\n", " ") or "largest drift" in printed
    assert (tmp_path / "lr_transfer.png").stat().st_size > 20_000
