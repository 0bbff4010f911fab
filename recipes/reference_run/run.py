"""How far small Transformers are from a large one, in embedding space, all along training.

One run, by the YAML next to this file and whatever is changed in it (a LightningCLI), and all runs of the study:

    python -m recipes.reference_run.run fit --config recipes/reference_run/config.yaml --model.embedding=32
    python -m recipes.reference_run.run study

The study trains the reference with two seeds, then smaller shapes on the same data in the same order: L, M and D each on
its own, and all of them together. It reads the logs of these runs back, and draws and fits the distance of the small
runs from the reference. Theory (theory.md, section 2) has, for gradient descent and a bounded number of steps,

    RMS(h - h_infinite) = O(1/L + sqrt(D/(L M)) + 1/sqrt(D))

and promises nothing for Adam, with which these runs are trained (section 5). Slopes depend on how much is learned: those
of the stream against L, M and D, beyond the floor, are -0.55, -0.46 and -0.61 at the learning rate in the YAML, and -0.54,
-0.38 and -0.59 at 2^-5.5, where runs of two seeds part further. The text is that of Python's own documentation, so that
numbers differ a little from one version of Python to the next.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import multiprocessing
import sys
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from mlu_lightning.models import CausalTransformer
from mlu_lightning.observation.reference import Reference
from mlu_lightning.quickstart.study import Windows, load_text
from recipes.reference_run.report import METRICS, SWEEPS, Distances, Run, distance_table, save_figure, slope_table

__all__ = ["Text", "main", "study"]

CONFIG = Path(__file__).with_name("config.yaml")
QUICK = {
    "model.depth": 4,
    "model.heads": 4,
    "model.embedding": 16,
    "model.context": 8,
    "model.schedule_steps": 6,
    "data.context": 8,
    "data.batches": 6,
}
"""Settings of a quick study, which also leaves out the divisors above 4."""


class Text(LightningDataModule):
    """Bytes of a text: samples at random places of its first nine tenths, validation on the rest.

    Args:
        context: length of a sample, which has one byte more, to be predicted.
        batches: number of training batches.
        batch_size: samples in a batch.
        seed: of the places of the training samples, which depend on nothing else.
        validation_batches: number of batches for validation.
    """

    def __init__(
        self, context: int = 32, batches: int = 200, batch_size: int = 16, seed: int = 0, validation_batches: int = 4
    ) -> None:
        super().__init__()
        values = torch.frombuffer(bytearray(load_text()), dtype=torch.uint8).long()
        cut = len(values) * 9 // 10
        self.batch_size = batch_size
        draws = torch.Generator().manual_seed(seed)
        starts = torch.randint(cut - context, (batches * batch_size,), generator=draws)
        self.training = Windows(values[:cut], starts, context + 1)
        spaced = torch.linspace(0, len(values) - cut - context - 1, validation_batches * batch_size).long()
        self.validation = Windows(values[cut:], spaced, context + 1)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Samples in the order of their drawing."""
        return DataLoader(self.training, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Samples evenly spaced over the rest of the text, of which the first batch is the probe."""
        return DataLoader(self.validation, batch_size=self.batch_size)


def main(args: Sequence[str] | None = None) -> None:
    """Run ``study``, or else a command of LightningCLI.

    Args:
        args: of the command line; by default those of the process.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if arguments[:1] == ["study"]:
        parser = ArgumentParser(prog="python -m recipes.reference_run.run study")
        parser.add_function_arguments(study, skip={"quick"})
        parser.add_argument("--quick", action="store_true", help="try the machinery only: tiny runs of few steps")
        study(**parser.parse_args(arguments[1:]).as_dict())
    else:
        LightningCLI(CausalTransformer, Text, args=arguments, save_config_kwargs={"overwrite": True})


def study(output: str = "reference-run", workers: int = 2, quick: bool = False) -> None:
    """Train the reference and small runs that are not trained yet, and report their distance.

    Args:
        output: folder of runs and figure; runs that are complete in it are not made again, so that another is needed
            when settings in the YAML were changed.
        workers: number of runs at a time, each on one core.
        quick: whether to try the machinery only, with tiny runs of few steps.
    """
    if find_spec("matplotlib") is None:
        sys.exit("The study draws a figure, and matplotlib is not installed: pip install 'mlu-lightning[plots]'.")
    folder, changes = Path(output), QUICK if quick else {}
    settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    for key, value in changes.items():
        section, name = key.split(".")
        settings[section][name] = value
    runs = _runs(settings["model"], most=4 if quick else 16)
    references, small = [run for run in runs if not run.axis], [run for run in runs if run.axis]
    console = Console(width=None if sys.stdout.isatty() else 110)
    last = settings["data"]["batches"]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for title, group in (("references", references), ("small runs", small)):
            missing = [run for run in group if not _is_complete(folder, run, last)]
            console.print(f"{title}: {len(missing)} of {len(group)} to be trained", highlight=False)
            for run in missing:
                _reference_file(folder, run).unlink(missing_ok=True)
            commands = [_arguments(folder, run, references, settings, changes) for run in missing]
            if commands:
                _train_all(pool, commands, title, console)
    found = [_read(folder, run) for run in small]
    console.print(distance_table([_read(folder, run) for run in references], found), slope_table(found))
    save_figure(found, folder / "reference_run.png")
    console.print(f"Wrote {folder / 'reference_run.png'}.", highlight=False, soft_wrap=True)


def _runs(model: Mapping[str, Any], most: int) -> list[Run]:
    """The reference with two seeds, then the small runs, each with a seed of its own, the longest first."""
    sizes = {"depth": model["depth"], "heads": model["heads"], "embedding": model["embedding"]}
    axes = {"L": ["depth"], "M": ["heads"], "D": ["embedding"], "L, M, D": list(sizes)}
    cases = [(axis, divisor) for axis, divisors in SWEEPS.items() for divisor in divisors if divisor <= most]
    small = [
        Run(axis, divisor, **{k: v // divisor if k in axes[axis] else v for k, v in sizes.items()}, seed=seed)
        for seed, (axis, divisor) in enumerate(cases, start=2)
    ]
    cost = {run: run.depth * run.heads * (run.embedding + 32) for run in small}
    return [Run("", 1, **sizes, seed=seed) for seed in (0, 1)] + sorted(small, key=lambda run: -cost[run])


def _arguments(
    folder: Path, run: Run, references: Sequence[Run], settings: Mapping[str, Any], changes: Mapping[str, Any]
) -> list[str]:
    """Command line of a run."""
    files = {f"seed{reference.seed}": str(_reference_file(folder, reference)) for reference in references}
    watcher = (
        {"class_path": "mlu_lightning.EmbeddingDistance", "init_args": {"reference": files}}
        if run.axis
        else {"class_path": "mlu_lightning.ReferenceRecorder", "init_args": {"path": files[f"seed{run.seed}"]}}
    )
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder), "name": run.name, "version": ""},
    }
    options = {
        **changes,
        "seed_everything": run.seed,
        "model.depth": run.depth,
        "model.heads": run.heads,
        "model.embedding": run.embedding,
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
    try:
        with (folder / run.name / "metrics.csv").open(newline="", encoding="utf-8") as file:
            return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []


def _is_complete(folder: Path, run: Run, last: int) -> bool:
    """Whether a run was validated after its last step, and the file of a reference goes up to it."""
    if not any("val_loss" in row and int(row["step"]) >= last - 1 for row in _rows(folder, run)):
        return False
    file = _reference_file(folder, run)
    return bool(run.axis) or (file.exists() and Reference.load(file).steps[-1] == last)


def _train_all(pool: ProcessPoolExecutor, commands: Sequence[list[str]], title: str, console: Console) -> None:
    """Run commands, some at a time."""
    pending = [pool.submit(_train, command) for command in commands]
    try:
        for future in track(as_completed(pending), title, len(pending), console=console):
            future.result()
    except BaseException:
        # else all other runs would be trained before anybody hears of it
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _train(command: list[str]) -> None:
    """Run a command as ``main`` does, on one core and without notes on hardware that it does not need."""
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    sys.argv = sys.argv[:1]
    main(command)


def _read(folder: Path, run: Run) -> Distances:
    """Log of a run, with the mean square over references of its distances."""
    rows = _rows(folder, run)
    curve: dict[str, dict[int, float]] = {}
    for metric, key in METRICS.items():
        for row in rows:
            squares = [float(row[name]) ** 2 for seed in (0, 1) if (name := f"mlu/distance/{key}/seed{seed}") in row]
            if squares:
                curve.setdefault(metric, {})[int(row["step"])] = math.sqrt(math.fsum(squares) / len(squares))
                curve.setdefault(f"{metric}/floor", {})[int(row["step"])] = float(row[f"mlu/distance/{key}/floor"])
    return Distances(run, next(float(row["val_loss"]) for row in reversed(rows) if "val_loss" in row), curve)


if __name__ == "__main__":
    main()
