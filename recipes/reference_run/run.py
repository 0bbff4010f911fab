"""How far small Transformers are from a large one, in embedding space, all along training.

The study trains the reference with two seeds, then smaller shapes on the same data in the same order, each by the YAML next
to this file (a LightningCLI). It reads the logs of these runs back, and draws and fits their distance from the reference.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningCLI

from mlu_lightning.models import CausalTransformer
from mlu_lightning.observation.reference import Reference
from recipes.common.fits import root_mean_square
from recipes.common.studies import check_command, console, in_processes, study_commands
from recipes.common.text import Text
from recipes.reference_run.report import METRICS, SWEEPS, Distances, Run, distance_table, save_figure, slope_table

CONFIG = Path(__file__).with_name("config.yaml")
QUICK = {"model.depth": 4, "model.heads": 4, "model.embedding": 16, "model.context": 8, "model.schedule_steps": 6}
QUICK |= {"data.context": 8, "data.batches": 6}
"""Settings of a quick study, which also leaves out the divisors above 4."""


def study(output: str = "reference-run", workers: int = 2, quick: bool = False) -> None:
    """Train the reference and small runs that are not trained yet, and report their distance.

    Args:
        output: folder of runs and figure; runs that are complete in it are not made again, so that another is needed
            when settings in the YAML were changed.
        workers: number of runs at a time, each on one core.
    """
    check_command(workers, seeds=1)
    folder, changes, terminal = Path(output), QUICK if quick else {}, console()
    settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    for key, value in changes.items():
        section, name = key.split(".")
        settings[section][name] = value
    runs = _runs(settings["model"], most=4 if quick else 16)
    references, small = [run for run in runs if not run.axis], [run for run in runs if run.axis]
    last = settings["data"]["batches"]
    for title, group in (("references", references), ("small runs", small)):
        missing = [run for run in group if not _is_complete(folder, run, last)]
        terminal.print(f"{title}: {len(missing)} of {len(group)} to be trained", highlight=False)
        for run in missing:
            _reference_file(folder, run).unlink(missing_ok=True)
        commands = [_arguments(folder, run, references, settings, changes) for run in missing]
        if commands:
            in_processes(_train, commands, workers, title, terminal)
    found = [_read(folder, run) for run in small]
    terminal.print(distance_table([_read(folder, run) for run in references], found), slope_table(found))
    save_figure(found, folder / "reference_run.png")
    terminal.print(f"Wrote {folder / 'reference_run.png'}.", highlight=False, soft_wrap=True)


def _runs(model: Mapping[str, Any], most: int) -> list[Run]:
    """The reference with two seeds, then the small runs, each with a seed of its own, the shortest first."""
    sizes = {"depth": model["depth"], "heads": model["heads"], "embedding": model["embedding"]}
    axes = {"L": ["depth"], "M": ["heads"], "D": ["embedding"], "L, M, D": list(sizes)}
    cases = [(axis, divisor) for axis, divisors in SWEEPS.items() for divisor in divisors if divisor <= most]
    small = [
        Run(axis, divisor, **{k: v // divisor if k in axes[axis] else v for k, v in sizes.items()}, seed=seed)
        for seed, (axis, divisor) in enumerate(cases, start=2)
    ]
    small.sort(key=lambda run: run.depth * run.heads * (run.embedding + 32))
    return [Run("", 1, **sizes, seed=seed) for seed in (0, 1)] + small


def _arguments(
    folder: Path, run: Run, references: Sequence[Run], settings: Mapping[str, Any], changes: Mapping[str, Any]
) -> list[str]:
    """Command line of a run."""
    files = {f"seed{reference.seed}": str(_reference_file(folder, reference)) for reference in references}
    watcher = {"class_path": "mlu_lightning.EmbeddingDistance", "init_args": {"reference": files}}
    if not run.axis:
        watcher = {"class_path": "mlu_lightning.ReferenceRecorder", "init_args": {"path": files[f"seed{run.seed}"]}}
    place = {"save_dir": str(folder), "name": run.name, "version": ""}
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": place}
    sizes = {f"model.{name}": getattr(run, name) for name in ("depth", "heads", "embedding")}
    options = {
        **changes,
        **sizes,
        "seed_everything": run.seed,
        "trainer.logger": json.dumps(logger),
        "trainer.callbacks": json.dumps([settings["trainer"]["callbacks"][0], watcher]),
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }
    return ["fit", "--config", str(CONFIG), *(f"--{name}={value}" for name, value in options.items())]


def _reference_file(folder: Path, run: Run) -> Path:
    return folder / run.name / "reference.safetensors"


def _rows(folder: Path, run: Run) -> list[dict[str, str]]:
    """Log of a run, without values that were not logged at a step."""
    path = folder / run.name / "metrics.csv"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [{key: value for key, value in row.items() if value} for row in csv.DictReader(lines)]


def _is_complete(folder: Path, run: Run, last: int) -> bool:
    """Whether a run was validated after its last step, and the file of a reference goes up to it."""
    if not any("val_loss" in row and int(row["step"]) >= last - 1 for row in _rows(folder, run)):
        return False
    file = _reference_file(folder, run)
    return bool(run.axis) or (file.exists() and Reference.load(file).steps[-1] == last)


def _train(arguments: list[str]) -> None:
    """Run a command of LightningCLI, which would warn of arguments of this process."""
    sys.argv = sys.argv[:1]
    main(arguments)


def _read(folder: Path, run: Run) -> Distances:
    """Log of a run, with the root mean square over references of its distances."""
    rows = _rows(folder, run)
    curve: dict[str, dict[int, float]] = {}
    for metric, key in METRICS.items():
        for row in rows:
            values = [float(row[name]) for seed in (0, 1) if (name := f"mlu/distance/{key}/seed{seed}") in row]
            if values:
                curve.setdefault(metric, {})[int(row["step"])] = root_mean_square(values)
                curve.setdefault(f"{metric}/floor", {})[int(row["step"])] = float(row[f"mlu/distance/{key}/floor"])
    return Distances(run, next(float(row["val_loss"]) for row in reversed(rows) if "val_loss" in row), curve)


def _lightning(arguments: list[str]) -> None:
    LightningCLI(CausalTransformer, Text, args=arguments, save_config_kwargs={"overwrite": True})


main = study_commands(study, program="python -m recipes.reference_run.run", default=_lightning)

if __name__ == "__main__":
    main()
