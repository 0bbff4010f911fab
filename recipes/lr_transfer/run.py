"""Is the learning rate that was tuned at a small size right at a large one? Transformers on text, along six axes.

Where two parameterizations have the same numbers at a shape, as MLU and CompleteP have along depth, their runs are the same
and are made once. ``search.py`` says what is searched for, and studies.yaml what is trained.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch.cli import LightningCLI
from rich.console import Console

from mlu_lightning import Plan
from recipes.common.studies import ResultFile, check_command, console, deadline, study_commands
from recipes.common.text import Text
from recipes.lr_transfer.figures import save_curves, save_figure, save_horizons
from recipes.lr_transfer.report import horizon_table, size_table, summary_table
from recipes.lr_transfer.runs import Run, ScheduledTransformer, Shape, Study, plans_of, shared_runs, train
from recipes.lr_transfer.search import Transfer, missing_runs, transfers

STUDIES = yaml.safe_load(Path(__file__).with_name("studies.yaml").read_text(encoding="utf-8"))


def study(
    output: str = "lr-transfer",
    preset: Literal["cpu", "accelerator"] = "cpu",
    settings: str | None = None,
    workers: int | None = None,
    minutes: float | None = None,
    quick: bool = False,
) -> None:
    """Train all shapes around their best learning rates, and report drift and regret.

    Args:
        output: folder of the runs and figures; runs that are in it are not made again.
        preset: sizes and steps in studies.yaml, for two CPU cores, or for one accelerator.
        settings: path of a YAML file with what is to be replaced in the preset.
        workers: number of runs at a time, each on one core; by default 2, and 1 on an accelerator.
        minutes: after which no run is begun, and what there is is reported; another call goes on.
    """
    own = {} if settings is None else _settings(settings)
    chosen = Study(**(STUDIES[preset] | (STUDIES["quick"] if quick else {}) | own))
    workers = (1 if preset == "accelerator" else 2) if workers is None else workers
    check_command(workers, chosen.seeds)
    terminal, folder = console(118), Path(output)
    plans, runs = make_runs(chosen, folder, workers, deadline(minutes), terminal)
    shared = shared_runs(plans)
    found = transfers(chosen, shared, runs)
    terminal.print(state_of(chosen, shared, runs), highlight=False)
    if not found:
        return
    terminal.print(size_table(chosen, shared, found), summary_table(chosen, found))
    save_figure(chosen, found, folder / "lr_transfer.png")
    save_curves(chosen, shared, runs, folder / "lr_transfer_curves.png")
    terminal.print(f"Wrote lr_transfer.png and lr_transfer_curves.png in {folder}.", highlight=False, soft_wrap=True)


def horizon(
    output: str = "lr-transfer-horizon", workers: int = 2, minutes: float | None = None, quick: bool = False
) -> None:
    """Train several depths with MLU at constant learning rates, and report how the drift grows with the horizon.

    The learning rate is constant after a short warm-up, so that one run is validated at all horizons. Runs with a cosine
    schedule, which need runs of their own for every horizon, are made at two of them.

    Args:
        output: folder of the runs and the figure; runs that are in it are not made again.
        workers: number of runs at a time, each on one core.
        minutes: after which no run is begun, and what there is is reported; another call goes on.
    """
    check_command(workers, Study.seeds)
    terminal, folder, end = console(118), Path(output), deadline(minutes)
    found: dict[str, list[Transfer]] = {}
    for name, content in STUDIES["quick horizon" if quick else "horizon"].items():
        part = Study(**content)
        plans, runs = make_runs(part, folder / name, workers, end, terminal)
        shared = shared_runs(plans)
        terminal.print(f"{name}: {state_of(part, shared, runs)}", highlight=False)
        found.setdefault(name.split("-")[0], []).extend(transfers(part, shared, runs))
    if not any(found.values()):
        return
    terminal.print(horizon_table(found))
    save_horizons(found, folder / "lr_transfer_horizon.png")
    terminal.print(f"Wrote lr_transfer_horizon.png in {folder}.", highlight=False, soft_wrap=True)


def _settings(path: str) -> dict[str, Any]:
    """Fields of a study that are in a YAML file."""
    given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    names = [field.name for field in fields(Study)]
    if not isinstance(given, dict) or not given.keys() <= set(names):
        sys.exit(f"{path} is not the settings of a study: give some of {', '.join(names)} in it.")
    return given


def make_runs(
    study: Study, folder: Path, workers: int, end: float, terminal: Console
) -> tuple[dict[tuple[Shape, str], Plan], list[Run]]:
    """Make the runs that a study still needs, the longest first, until it is complete or the time is over.

    Returns the plans of each shape and parameterization, and all runs that were made.
    """
    file = ResultFile(folder / "runs.jsonl", asdict(study), Run.decode, Run.encode)
    runs, plans = file.read(), plans_of(study)
    shared = shared_runs(plans)
    file.extend(
        runs,
        lambda: sorted(
            missing_runs(study, shared, runs), key=lambda run: -_cost(plans[run.shape, run.parameterization])
        ),
        lambda run: (study, run, plans[run.shape, run.parameterization]),
        train,
        workers,
        end,
        terminal,
    )
    return plans, runs


def _cost(plan: Plan) -> int:
    """About how long a run takes next to others: on a small scale, calls cost as much as numbers."""
    return sum(10_000 + math.prod(parameter.shape) for parameter in plan.parameters.values())


def state_of(study: Study, shared: Mapping[tuple[Shape, str], str], runs: Sequence[Run]) -> str:
    """How many runs there are, and what is missing."""
    made = f"{len(runs)} runs, {math.fsum(run.seconds for run in runs) / 60:.1f} minutes of processor time."
    cases = {(run.shape, run.parameterization) for run in missing_runs(study, shared, runs)}
    if not cases:
        return made
    changes = {shape: " ".join(f"{k}={v}" for k, v in shape if (k, v) not in study.base) for shape, _ in cases}
    names = ", ".join(sorted(f"{name} at {changes[shape] or 'the base'}" for shape, name in cases))
    return f"{made} The time is over before these were complete; the same command goes on: {names}."


def _lightning(arguments: list[str]) -> None:
    LightningCLI(ScheduledTransformer, Text, args=arguments, save_config_kwargs={"overwrite": True})


main = study_commands(study, horizon, program="python -m recipes.lr_transfer.run", default=_lightning)

if __name__ == "__main__":
    main()
