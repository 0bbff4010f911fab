"""The recipe of the learning rate's transfer: which runs are the same, its YAML files, and quick studies."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.recipe_results import QUIET, RECIPES, cells, rows
from lightning.pytorch.loggers import WandbLogger
from torch.optim.lr_scheduler import CosineAnnealingLR

from recipes.lr_transfer import run as recipe
from recipes.lr_transfer import runs as work
from recipes.lr_transfer.runs import Run, Study

CPU = Study(**recipe.STUDIES["cpu"])
QUICK = Study(**recipe.STUDIES["cpu"] | recipe.STUDIES["quick"])
TINY = ["--model.steps=3", "--model.warmup=1", "--data.batches=3", "--data.validation_batches=1"]


def test_runs_that_are_the_same() -> None:
    """By the tables of the papers: what differs is depth in µP, and the std of what writes to the stream in MLU."""

    def ends(sizes: dict[str, list[int]]) -> dict[str, list[int]]:
        return {name: [values[0], values[2 if name == "depth" else -1]] for name, values in sizes.items()}

    small = replace(CPU, axes={axis: ends(sizes) for axis, sizes in CPU.axes.items()})
    shared = work.shared_runs(work.plans_of(small))
    assert {shared[small.base, name] for name in small.parameterizations} == {"mlu"}
    grown = {axis: list(small.shapes(axis).values())[1] for axis in small.axes}
    assert {axis: [shared[grown[axis], name] for name in small.parameterizations] for axis in grown} == {
        "depth": ["mlu", "mlu", "mup", "mup"],
        **{axis: ["mlu", "completep", "completep", "sp"] for axis in ("heads", "MLP width", "embedding")},
        "D with heads and MLP width": ["mlu", "mlu", "mlu", "sp"],
        "all together": ["mlu", "mlu", "mup", "sp"],
    }


def test_what_makes_runs_the_same() -> None:
    """Also a factor that belongs to no parameter, as that of a tied readout."""
    plan = work.plans_of(replace(QUICK, parameterizations=["mlu"]))[QUICK.shapes("all together")[2], "mlu"]
    loose = tuple(replace(one, folds=()) for one in plan.multipliers)
    other = (*loose[:-1], replace(loose[-1], value=0.3))
    assert work.numbers(replace(plan, multipliers=loose)) != work.numbers(replace(plan, multipliers=other))
    assert work.numbers(plan) == work.numbers(replace(plan, warnings=("a warning",)))


def test_runs_said_to_be_the_same_are() -> None:
    quick = replace(QUICK, axes={"depth": {"depth": [1, 2]}, "width": {"mlp_hidden": [16, 32]}})
    plans, deep, wide = work.plans_of(quick), quick.shapes("depth")[2], quick.shapes("width")[2]

    def losses(shape: Any, name: str) -> tuple[float, ...]:
        return work.train(quick, Run(shape, name, -3.0, 1), plans[shape, name]).losses

    assert losses(deep, "mlu") == losses(deep, "completep") != losses(deep, "mup") == losses(deep, "sp")
    assert losses(wide, "mlu") != losses(wide, "completep") == losses(wide, "mup") != losses(wide, "sp")


def test_schedule_is_that_of_torch() -> None:
    model = work.ScheduledTransformer(1, 1, 8, 8, lr=0.5, steps=20, warmup=4, context=8, head_dim=4)
    configured = model.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]

    def rates(optimizer: Any, schedule: Any, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    other = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), 0.5)
    cosine = rates(other, CosineAnnealingLR(other, T_max=16, eta_min=0.05), 17)
    assert rates(optimizer, schedule, 20) == pytest.approx([0.125, 0.25, 0.375, *cosine])
    constant = work.ScheduledTransformer(1, 1, 8, 8, 0.5, 20, 4, "constant", 8, 4)
    assert [constant._factor(step) for step in (0, 3, 4, 19, 500)] == [0.25, 1, 1, 1, 1]


def test_a_run_as_json() -> None:
    run = Run(CPU.base, "mlu", -6.5, 1, (2.5, math.nan), 1.25)
    again = Run.decode(json.loads(json.dumps(run.encode(), allow_nan=False)))
    assert replace(again, losses=()) == replace(run, losses=())
    assert again.losses[0] == 2.5 and math.isnan(again.losses[1])


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="'b' begins at depth = 3, and another at 2"):
        replace(CPU, axes={"b": {"depth": [3, 4]}, "a": {"depth": [2, 4]}})
    with pytest.raises(ValueError, match="'a' has arguments with different numbers of values"):
        replace(CPU, axes={"a": {"depth": [2, 4], "heads": [2]}})
    with pytest.raises(ValueError, match=r"no class 'nowhere.Model'"):
        work.plans_of(replace(CPU, model={"class_path": "nowhere.Model"}))


@pytest.fixture
def begun(in_this_process: None, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Runs in their order, which are trained in this process."""
    runs: list[Run] = []

    def train(study: Study, run: Run, plan: Any) -> Run:
        runs.append(run)
        return work.train(study, run, plan)

    monkeypatch.setattr(recipe, "train", train)
    planned: dict[str, Any] = {}  # a command that goes on plans all runs again
    monkeypatch.setattr(
        recipe, "plans_of", lambda s: planned.get(str(s)) or planned.setdefault(str(s), work.plans_of(s))
    )
    return runs


def test_quick_study(begun: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    command = ["study", "--quick", f"--output={tmp_path}"]
    tracked = recipe.train

    def interrupted(*args: Any) -> Any:
        if len(begun) == 10:
            raise KeyboardInterrupt
        return tracked(*args)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recipe.main(command)
    assert len(begun) == 10, "the others were not begun"
    recipe.main(command)
    printed = capsys.readouterr().out
    assert len(begun) == len(set(begun)), "no run is made twice"
    runs = [Run.decode(json.loads(line)) for line in (tmp_path / "runs.jsonl").read_text().splitlines()[1:]]
    assert {replace(run, losses=(), seconds=0.0) for run in runs} == set(begun)
    assert f"{len(runs)} runs, " in printed and "The time is over" not in printed
    assert min((tmp_path / f"lr_transfer{name}.png").stat().st_size for name in ("", "_curves")) > 20_000
    # a number of the table, from the losses of its runs
    wide = [run for run in runs if (run.shape, run.parameterization) == (QUICK.shapes("MLP width")[2], "sp")]
    losses = {x: [run.losses[0] for run in wide if run.exponent == x] for x in {run.exponent for run in wide}}
    least = min(losses, key=lambda x: float(np.mean(losses[x])))
    seeds = np.polyfit([-1, 0, 1], [losses[least + step] for step in (-1, 0, 1)], 2)  # a parabola in each column
    curvature, slope, _ = seeds.mean(1)
    at_vertex = [np.polyval(parabola, -slope / (2 * curvature)) for parabola in seeds.T]
    expected = f"{np.mean(at_vertex):.3f} ± {np.std(at_vertex, ddof=1) / 2**0.5:.3f}"
    line = next(line for line in printed.splitlines() if "MLP width" in line and "│ SP " in line and "× 2" in line)
    assert cells(line)[3::3] == [f"2^{least - slope / (2 * curvature):.1f}", expected]
    # again: nothing, the same report
    before = len(begun)
    recipe.main(command)
    again = capsys.readouterr().out
    assert len(begun) == before and again[again.index("┏") :] == printed[printed.index("┏") :]
    with pytest.raises(SystemExit, match="runs of a study with other settings"):
        recipe.main(["study", f"--output={tmp_path}"])


def test_time_that_is_over(begun: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.main(["study", "--quick", "--minutes=0", f"--output={tmp_path}"])
    said = "0 runs, 0.0 minutes of processor time. The time is over before these were complete"
    assert said in " ".join(capsys.readouterr().out.split()) and not begun and not list(tmp_path.glob("*.png"))


def test_quick_horizons(begun: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.main(["horizon", "--quick", f"--output={tmp_path}"])
    printed = capsys.readouterr().out
    sizes = [" ".join(cells(line)[:3]) for line in printed.splitlines() if "│" in line]
    assert sizes == [f"{run} × {depth}" for run in ("constant 2", "constant 4", "cosine 4") for depth in (1, 2)]
    assert (tmp_path / "lr_transfer_horizon.png").stat().st_size > 20_000
    file = next((tmp_path / "constant").glob("*.jsonl"))
    longest = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert all(len(run["losses"]) == 2 and run["losses"][0] != run["losses"][1] for run in longest)


def test_a_study_of_ones_own(begun: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = "vocabulary: 256, context: 8, embedding: 8, head_dim: 4, heads: 1, schedule_steps: 2"
    data = "context: 8, batches: 2, batch_size: 2, validation_batches: 1"
    path = tmp_path / "settings.yaml"
    path.write_text(f"""
axes: {{size: {{mlp_hidden: [8, 16], depth: [1, 2]}}}}
model: {{class_path: mlu_lightning.models.CausalTransformer, init_args: {{{model}}}}}
data: {{class_path: recipes.common.text.Text, init_args: {{{data}}}}}
horizons: [2]
exponents: [-3, -2]
spacing: 1
seeds: 1
parameterizations: [mlu, sp]
""")
    recipe.main(["study", f"--settings={path}", f"--output={tmp_path}"])
    printed = capsys.readouterr().out
    assert "│ size │ × 2  │ MLU " in printed and "│ size │ × 2  │ SP " in printed
    assert {run.parameterization for run in begun if dict(run.shape)["depth"] == 2} == {"mlu", "sp"}
    path.write_text("shapes: 3")
    with pytest.raises(SystemExit, match="is not the settings of a study: give some of axes, model, data, horizons"):
        recipe.main(["study", f"--settings={path}", f"--output={tmp_path}"])


def test_shipped_yaml_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    changes = ["--model.depth=2", "--model.embedding=16", "--trainer.callbacks.init_args.parameterization=mup"]
    recipe.main(["fit", "--config", str(RECIPES / "lr_transfer/config.yaml"), *changes, *TINY, *QUIET])
    assert float(rows(tmp_path / "lr-transfer" / "fit" / "metrics.csv")[-1]["val_loss"]) < 8
    used = yaml.safe_load((tmp_path / "lr-transfer" / "fit" / "config.yaml").read_text())
    assert used["trainer"]["callbacks"][0]["init_args"]["parameterization"] == "mup" and used["model"]["depth"] == 2


def test_shipped_yaml_is_a_run_of_the_study() -> None:
    settings = yaml.safe_load((RECIPES / "lr_transfer/config.yaml").read_text())
    sizes = dict(CPU.shapes("all together")[4])
    model = {**CPU.model["init_args"], **sizes, "lr": settings["model"]["lr"]}
    assert settings["model"] == model and settings["model"]["lr"] == pytest.approx(2**-5.5)
    assert settings["data"] == {**CPU.data["init_args"], "seed": 0}
    base = settings["trainer"]["callbacks"][0]["init_args"]["base"]["init_args"]
    assert base == {"vocabulary": 256, "context": 32, **dict(CPU.base)}


def test_shipped_sweep_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the agent of W&B does: one combination of the grid, as arguments of the command."""
    monkeypatch.chdir(RECIPES.parent)
    monkeypatch.setenv("WANDB_MODE", "offline")
    sweep = yaml.safe_load((RECIPES / "lr_transfer/sweep.yaml").read_text())
    grid = itertools.product(*(values["values"] for values in sweep["parameters"].values()))
    last = dict(zip(sweep["parameters"], list(grid)[-1], strict=True))
    fixed = {"trainer.callbacks.init_args.parameterization": "sp", "model.lr": 0.0625, "seed_everything": 2}
    assert last == {**fixed, "model.depth": 32}
    args = [f"--{name}={value}" for name, value in {**last, "model.depth": 4}.items()]
    template = [["python"] if part == "${interpreter}" else [part] for part in sweep["command"]]
    filled = [part for parts in template for part in (args if parts == ["${args}"] else parts)]
    assert filled[:5] == ["${env}", "python", "-m", "recipes.lr_transfer.run", "fit"]
    folder = [f"--trainer.default_root_dir={tmp_path}", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    logged: dict[str, Any] = {}
    monkeypatch.setattr(WandbLogger, "log_metrics", lambda self, metrics, step=None: logged.update(metrics))
    recipe.main([*filled[4:], *TINY, *QUIET, *folder])
    assert math.isfinite(logged[sweep["metric"]["name"]])
