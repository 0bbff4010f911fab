"""Is the learning rate that was tuned at a small size right at a large one? Transformers on text, along five axes.

All runs of the study, those of long horizons at a constant learning rate, and one run by the YAML next to this file and
whatever is changed in it (a LightningCLI):

    python -m recipes.lr_transfer.run study
    python -m recipes.lr_transfer.run horizon
    python -m recipes.lr_transfer.run fit --config recipes/lr_transfer/config.yaml --model.depth=16

``sweep.yaml`` makes such runs as a sweep of Weights & Biases. From one base, the study changes depth,
heads, MLP width and embedding, each on its own, and all of them together, with MLU, CompleteP, µP and the standard
parameterization (SP). Validation loss against learning rate is searched for its least value at each shape, on
the mean over seeds. It reports the *drift*, decades from the base's best learning rate to the best one, and the *regret*,
the loss at the base's best learning rate less the least one. Where two of them have the same numbers at a shape, as MLU and
CompleteP have along depth, their runs are the same and are made once.

With MLU and CompleteP the drift is within 0.17 decades along every axis, mostly within its error, and the regret within 0.02
nats per byte. Where M/D changes the two differ in the initial size of ``branch_out``, and at these sizes and 128 steps of
AdamW that is not seen: both keep their optimum. SP drifts by a decade as the embedding grows sixteenfold (regret 0.43), and
with µP by a third of one as depth does. At learning rates that are tuned anew at each size, SP is a little better where the
embedding grows, and worst where depth does.

At a constant learning rate the best one falls with the horizon, and at 64 to 512 steps it does so at every depth alike: the
drift with depth, of which others warn at long horizons, is largest at the shortest one, 32 steps.

A study of another architecture, or of other sizes, is a YAML file with what is to be replaced in a preset (the fields of
``Study`` in ``lr_transfer_runs.py``), as

    model: {class_path: my_package.MyModel, init_args: {dropout: 0.1}}
    axes:
      depth: {layers: [2, 4, 8, 16]}
      width: {width: [64, 128, 256, 512], heads: [2, 4, 8, 16]}

for ``study --settings my_study.yaml``. The model is any LightningModule with ``lr`` among its arguments that logs
``val_loss``; without ``data``, it is given the bytes of the preset's text, ``[samples, context + 1]`` of them in a batch.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch.cli import LightningCLI
from rich.console import Console
from rich.progress import Progress

from mlu_lightning import Plan
from recipes.common.gradient_descent import check_command, command
from recipes.lr_transfer.report import horizon_table, save_curves, save_figure, save_horizons, size_table, summary_table
from recipes.lr_transfer.runs import (
    Run,
    RunFile,
    ScheduledTransformer,
    Shape,
    Study,
    plans_of,
    shared_runs,
    start_process,
    train,
)
from recipes.lr_transfer.search import Transfer, missing_runs, transfers
from recipes.reference_run.run import Text

__all__ = ["PRESETS", "horizon", "main", "study"]


def main(args: Sequence[str] | None = None) -> None:
    """Run ``study`` or ``horizon``, or else a command of LightningCLI.

    Args:
        args: of the command line; by default those of the process.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    functions: dict[str, Callable[..., None]] = {"study": study, "horizon": horizon}
    if arguments[:1] and arguments[0] in functions:
        command(functions[arguments[0]], f"python -m recipes.lr_transfer.run {arguments[0]}", arguments[1:])
    else:
        LightningCLI(ScheduledTransformer, Text, args=arguments, save_config_kwargs={"overwrite": True})


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
        preset: sizes and steps for two CPU cores, or for one accelerator.
        settings: path of a YAML file with what is to be replaced in the preset.
        workers: number of runs at a time, each on one core; by default 2, and 1 on an accelerator.
        minutes: after which no run is begun, and what there is is reported; another call goes on.
        quick: whether to try the machinery only, with tiny runs of few steps (``--quick``).
    """
    chosen = PRESETS[preset]
    if quick:
        chosen = replace(chosen, **QUICK)
    if settings is not None:
        chosen = _replaced(chosen, settings)
    workers = (1 if preset == "accelerator" else 2) if workers is None else workers
    check_command(workers, chosen.seeds)
    console, folder = _console(), Path(output)
    shared, runs = _make_runs(chosen, folder, workers, _end(minutes), console)
    found = transfers(chosen, shared, runs)
    console.print(_state(chosen, shared, runs), highlight=False)
    if not found:
        return
    console.print(size_table(chosen, shared, found), summary_table(chosen, found))
    save_figure(chosen, found, folder / "lr_transfer.png")
    save_curves(chosen, shared, runs, folder / "lr_transfer_curves.png")
    console.print(f"Wrote lr_transfer.png and lr_transfer_curves.png in {folder}.", highlight=False, soft_wrap=True)


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
        quick: whether to try the machinery only, with tiny runs of few steps (``--quick``).
    """
    check_command(workers, PRESETS["cpu"].seeds)
    console, folder, end = _console(), Path(output), _end(minutes)
    found: dict[str, list[Transfer]] = {}
    for name, one in _long_studies(quick).items():
        shared, runs = _make_runs(one, folder / name, workers, end, console)
        console.print(f"{name}: {_state(one, shared, runs)}", highlight=False)
        found.setdefault(name.split("-")[0], []).extend(transfers(one, shared, runs))
    if not any(found.values()):
        return
    console.print(horizon_table(found))
    save_horizons(found, folder / "lr_transfer_horizon.png")
    console.print(f"Wrote lr_transfer_horizon.png in {folder}.", highlight=False, soft_wrap=True)


def _text(steps: int, context: int = 32, batch_size: int = 16, validation: int = 16) -> dict[str, Any]:
    arguments = {"context": context, "batches": steps, "batch_size": batch_size, "validation_batches": validation}
    return {"class_path": "reference_run.Text", "init_args": arguments}


def _transformer(steps: int, warmup: int, schedule: str = "cosine", **sizes: Any) -> dict[str, Any]:
    init_args = {"steps": steps, "warmup": warmup, "schedule": schedule, **sizes}
    return {"class_path": "lr_transfer_runs.ScheduledTransformer", "init_args": init_args}


_SMALL: dict[str, Any] = {"depth": 2, "heads": 2, "mlp_hidden": 128, "embedding": 32}
_TINY: dict[str, Any] = {"depth": 1, "heads": 1, "mlp_hidden": 16, "embedding": 8, "context": 8, "head_dim": 4}

PRESETS = {
    "cpu": Study(
        axes={
            "depth": {"depth": [2, 4, 8, 16, 32]},
            "heads": {"heads": [2, 4, 8, 16, 32]},
            "MLP width": {"mlp_hidden": [128, 256, 512, 1024, 2048]},
            "embedding": {"embedding": [32, 64, 128, 256, 512]},
            "all together": {
                "depth": [2, 3, 4, 6, 8],
                "heads": [2, 3, 4, 6, 8],
                "mlp_hidden": [128, 192, 256, 384, 512],
                "embedding": [32, 48, 64, 96, 128],
            },
        },
        model=_transformer(steps=128, warmup=12, **_SMALL),
        data=_text(128),
        horizons=[128],
        exponents=[-7.0, -6.5, -6.0, -5.5, -5.0, -4.5, -4.0],
    ),
    # no more than two epochs of the text, which larger models would learn by heart
    "accelerator": Study(
        axes={
            "depth": {"depth": [4, 8, 16, 32, 64]},
            "heads": {"heads": [4, 8, 16, 32, 64]},
            "MLP width": {"mlp_hidden": [512, 1024, 2048, 4096, 8192]},
            "embedding": {"embedding": [128, 256, 512, 1024, 2048]},
            "all together": {
                "depth": [4, 8, 12, 16, 32],
                "heads": [4, 8, 12, 16, 32],
                "mlp_hidden": [512, 1024, 1536, 2048, 4096],
                "embedding": [128, 256, 384, 512, 1024],
            },
        },
        model=_transformer(
            steps=400, warmup=40, depth=4, heads=4, mlp_hidden=512, embedding=128, context=64, head_dim=32
        ),
        data=_text(400, context=64, batch_size=32),
        horizons=[400],
        exponents=[-8.5, -8.0, -7.5, -7.0, -6.5, -6.0, -5.5],
        trainer={"accelerator": "auto", "devices": 1, "precision": "bf16-mixed"},
    ),
}
"""Studies by name: one for two CPU cores, and one for an accelerator, of larger sizes, of which only ``--quick`` has been
tried, on a CPU."""

QUICK: dict[str, Any] = {
    "axes": {
        "MLP width": {"mlp_hidden": [16, 32]},
        "all together": {"depth": [1, 2], "heads": [1, 2], "mlp_hidden": [16, 32], "embedding": [8, 16]},
    },
    "model": _transformer(steps=4, warmup=1, **_TINY),
    "data": _text(4, context=8, batch_size=4, validation=2),
    "horizons": [4],
    "exponents": [-3.0, -2.5, -2.0],
    "seeds": 2,
}
"""What a quick study has instead."""


def _long_studies(quick: bool) -> dict[str, Study]:
    """Studies of long horizons by the name of their folders, schedule first."""
    depths, horizons, cosines = ([1, 2], [2, 4], [4]) if quick else ([2, 4, 8, 16], [32, 64, 128, 256, 512], [64, 256])
    sizes = _TINY if quick else _SMALL
    # validation is half as long as in the other study, for there are 16 of them in a run
    batches = {"context": 8, "batch_size": 4, "validation": 2} if quick else {"validation": 8}

    def depth_study(horizons: list[int], warmup: int, schedule: str) -> Study:
        return replace(
            PRESETS["cpu"],
            axes={"depth": {"depth": depths}},
            model=_transformer(horizons[-1], warmup, schedule, **sizes),
            data=_text(horizons[-1], **batches),
            horizons=horizons,
            exponents=[-6.0, -5.0, -4.0],
            spacing=1.0,
            parameterization=["mlu"],
        )

    cosine = {f"cosine-{steps}": depth_study([steps], max(1, steps // 10), "cosine") for steps in cosines}
    return {"constant": depth_study(horizons, max(1, horizons[0] // 10), "constant"), **cosine}


def _replaced(preset: Study, path: str) -> Study:
    """A preset with the fields that are in a YAML file replaced."""
    given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    names = [field.name for field in fields(Study)]
    if not isinstance(given, dict) or not given.keys() <= set(names):
        sys.exit(f"{path} is not the settings of a study: give some of {', '.join(names)} in it.")
    return replace(preset, **given)


def _make_runs(
    study: Study, folder: Path, workers: int, end: float, console: Console
) -> tuple[dict[tuple[Shape, str], str], list[Run]]:
    """Make the runs that a study still needs, the longest first, until it is complete or the time is over.

    Returns:
        Parameterizations whose runs stand for those of each shape and parameterization, and all runs that were made.
    """
    file = RunFile(folder / "runs.jsonl", study)
    try:
        runs = file.read()
    except ValueError as error:
        sys.exit(str(error))
    plans = plans_of(study)
    shared = shared_runs(plans)
    pending: dict[Future[Run], Run] = {}
    with (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_process) as pool,
        Progress(console=console) as progress,
    ):
        bar = progress.add_task(f"runs in {folder}")
        try:
            while True:
                missing = missing_runs(study, shared, runs)
                progress.update(bar, completed=len(runs), total=len(runs) + len(missing))
                begun = set(pending.values())
                ready = sorted((run for run in missing if run not in begun), key=lambda run: _cost(plans, run))
                while ready and len(pending) < workers and time.monotonic() < end:
                    run = ready.pop()
                    pending[pool.submit(train, study, run, plans[run.shape, run.parameterization])] = run
                if not pending:
                    return shared, runs
                done = wait(pending, return_when=FIRST_COMPLETED).done
                for future in sorted(
                    done, key=lambda future: future.exception() is not None
                ):  # none is lost by an error
                    del pending[future]
                    runs.append(future.result())
                    file.append(future.result())
        except BaseException:
            # else those that were begun would be waited for
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _cost(plans: Mapping[tuple[Shape, str], Plan], run: Run) -> int:
    """About how long a run takes next to others: on a small scale, calls cost as much as numbers."""
    parameters = plans[run.shape, run.parameterization].parameters.values()
    return sum(10_000 + math.prod(parameter.shape) for parameter in parameters)


def _end(minutes: float | None) -> float:
    return math.inf if minutes is None else time.monotonic() + 60 * minutes


def _state(study: Study, shared: Mapping[tuple[Shape, str], str], runs: Sequence[Run]) -> str:
    """How many runs there are, and what is missing."""
    made = f"{len(runs)} runs, {math.fsum(run.seconds for run in runs) / 60:.1f} minutes of processor time."
    cases = {(run.shape, run.parameterization) for run in missing_runs(study, shared, runs)}
    if not cases:
        return made
    names = ", ".join(sorted(f"{parameterization} at {_changes(study, shape)}" for shape, parameterization in cases))
    return f"{made} The time is over before these were complete; the same command goes on: {names}."


def _changes(study: Study, shape: Shape) -> str:
    """What of a shape is not the base's."""
    return " ".join(f"{name}={size}" for name, size in shape if (name, size) not in study.base) or "the base"


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 110)


if __name__ == "__main__":
    main()
