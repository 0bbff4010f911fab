"""How far small Transformers are from a large one, in embedding space, all along training.

One run, by the YAML next to this file and whatever is changed in it (a LightningCLI), and all runs of the study:

    python recipes/reference_run.py fit --config recipes/reference_run.yaml --model.embedding=32
    python recipes/reference_run.py study

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
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mlu_lightning.models import CausalTransformer
from mlu_lightning.quickstart import load_text
from mlu_lightning.reference import Reference

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Run", "Slope", "Text", "fit_slope", "main", "study"]

CONFIG = Path(__file__).with_suffix(".yaml")
METRICS = {"rms": "rms/s=1", "gram": "gram/s=1", "procrustes": "procrustes/s=1", "cka": "cka/s=1", "output": "output"}
"""Name in the logs, without "mlu/distance/", of each metric."""
LAST = 3
"""Recordings over which a final distance is averaged, those at 128, 181 and 200 steps."""
SWEEPS = {"L": (8, 4, 2), "M": (16, 8, 4, 2), "D": (16, 8, 4, 2), "L, M, D": (8, 4, 2)}
"""By what the reference's size is divided."""
THEORY = {
    "rms": {"L": "-1/2 to -1", "M": "-1/2", "D": "-1/2", "L, M, D": "-1/2"},
    "output": {"L": "-1", "M": "-1", "D": "-1/2", "L, M, D": "-1/2"},
}
"""Slopes of the terms of theory.md, section 2, that grow as a size becomes small."""
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
    """

    def __init__(self, context: int = 32, batches: int = 200, batch_size: int = 16, seed: int = 0) -> None:
        super().__init__()
        values = torch.frombuffer(bytearray(load_text()), dtype=torch.uint8)
        cut = len(values) * 9 // 10
        self.batch_size = batch_size
        draws = torch.Generator().manual_seed(seed)
        starts = torch.randint(cut - context, (batches * batch_size,), generator=draws)
        self.training = Windows(values[:cut], starts, context + 1)
        spaced = torch.linspace(0, len(values) - cut - context - 1, 4 * batch_size).long()
        self.validation = Windows(values[cut:], spaced, context + 1)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Samples in the order of their drawing."""
        return DataLoader(self.training, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Samples evenly spaced over the rest of the text, of which the first batch is the probe."""
        return DataLoader(self.validation, batch_size=self.batch_size)


@dataclass(frozen=True)
class Windows(Dataset[Tensor]):
    """Samples of consecutive tokens.

    Args:
        values: of the text, bytes.
        starts: where samples begin.
        length: of a sample.
    """

    values: Tensor
    starts: Tensor
    length: int

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        start = int(self.starts[index])
        return self.values[start : start + self.length].long()


@dataclass(frozen=True)
class Run:
    """One run of the study.

    Args:
        axis: which sizes are smaller than the reference's, a key of ``SWEEPS``; empty for the reference itself.
        divisor: of these sizes.
        depth: of the model.
        heads: of the model.
        embedding: of the model.
        seed: of the weights in branches.
    """

    axis: str
    divisor: int
    depth: int
    heads: int
    embedding: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"L{2 * self.depth}-M{self.heads}-D{self.embedding}-seed{self.seed}"


@dataclass(frozen=True)
class Slope:
    """Of a line through logarithms.

    Args:
        value: d log y / d log x.
        error: its standard error, NaN if there are but two points.
        factor: y at x = 1.
    """

    value: float
    error: float
    factor: float

    def __str__(self) -> str:
        return f"{self.value:.2f}" if math.isnan(self.error) else f"{self.value:.2f} ± {self.error:.2f}"


@dataclass(frozen=True)
class Distances:
    """What a run logged.

    Args:
        run: whose log it is.
        loss: validation loss at the end, in nats per byte.
        curve: mean distance from the references by metric and step, and likewise their own mutual distance, the floor.
    """

    run: Run
    loss: float
    curve: Mapping[str, Mapping[int, float]]

    def final(self, key: str) -> float:
        """Root mean square of a metric, or of its floor, over the last recordings."""
        last = list(self.curve[key].values())[-LAST:]
        return math.sqrt(math.fsum(value**2 for value in last) / len(last))

    def beyond(self, metric: str) -> float:
        """Final distance without the reference's own part in it, NaN if nothing is left.

        Errors of two runs to their common limit are independent, so that squares of distances add: that of a small run
        from a reference is err(small)^2 + err(reference)^2, and that of two references 2 err(reference)^2. 1 - CKA is
        quadratic already.
        """
        power = 1 if metric == "cka" else 2
        left = self.final(metric) ** power - self.final(f"{metric}/floor") ** power / 2
        return left ** (1 / power) if left > 0 else math.nan


def main(args: Sequence[str] | None = None) -> None:
    """Run ``study``, or else a command of LightningCLI.

    Args:
        args: of the command line; by default those of the process.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if arguments[:1] == ["study"]:
        parser = ArgumentParser(prog=f"{Path(__file__).name} study")
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
    console.print(_distance_table([_read(folder, run) for run in references], found), _slope_table(found))
    _save_figure(found, folder / "reference_run.png")
    console.print(f"Wrote {folder / 'reference_run.png'}.", highlight=False, soft_wrap=True)


def fit_slope(sizes: Sequence[float], distances: Sequence[float]) -> Slope:
    """Least squares line through the logarithms of points; those that are not finite are left out.

    Args:
        sizes: x, positive.
        distances: y, positive or NaN.

    Returns:
        The slope, of NaNs if there are fewer than two points.

    >>> str(fit_slope([1, 4, 16], [3.0, 1.5, 0.75]))
    '-0.50 ± 0.00'
    """
    points = [(math.log(x), math.log(y)) for x, y in zip(sizes, distances, strict=True) if math.isfinite(y)]
    if len(points) < 2:
        return Slope(math.nan, math.nan, math.nan)
    x_mean, y_mean = (math.fsum(values) / len(points) for values in zip(*points, strict=True))
    spread = math.fsum((x - x_mean) ** 2 for x, _ in points)
    value = math.fsum((x - x_mean) * (y - y_mean) for x, y in points) / spread
    residual = math.fsum((y - y_mean - value * (x - x_mean)) ** 2 for x, y in points)
    error = math.sqrt(residual / (len(points) - 2) / spread) if len(points) > 2 else math.nan
    return Slope(value, error, math.exp(y_mean - value * x_mean))


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


def _sizes(run: Run) -> tuple[str, str, str]:
    """L, M and D."""
    return str(2 * run.depth), str(run.heads), str(run.embedding)


def _smaller(run: Run) -> str:
    """The sizes of a run that are smaller than the reference's."""
    sizes = dict(zip("LMD", _sizes(run), strict=True))
    return ", ".join(f"{axis}={sizes[axis]}" for axis in run.axis.split(", "))


def _distance_table(references: Sequence[Distances], found: Sequence[Distances]) -> Table:
    """Final distances, by what is smaller than in the reference."""
    table = Table(
        "smaller", "L", "M", "D", "val loss", *METRICS, title="Distance from the reference at the end of training"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for one in references:
        table.add_row("-", *_sizes(one.run), f"{one.loss:.3f}")
    table.add_section()
    for axis in SWEEPS:
        for one in _of(found, axis):
            table.add_row(
                axis, *_sizes(one.run), f"{one.loss:.3f}", *(f"{one.final(metric):.3g}" for metric in METRICS)
            )
        table.add_section()
    table.add_row("floor", "", "", "", "", *(f"{found[0].final(f'{metric}/floor'):.3g}" for metric in METRICS))
    return table


def _slope_table(found: Sequence[Distances]) -> Table:
    """Fitted slopes, as logged and beyond the reference's own part."""
    table = Table(
        "metric", "against", "theory", "slope as logged", "slope beyond the floor", title="d log distance / d log size"
    )
    for metric in METRICS:
        for axis in SWEEPS:
            sweep = _of(found, axis)
            slopes = _slopes(sweep, metric)
            table.add_row(metric, axis, _theory(metric, axis, [one.run.divisor for one in sweep]), *map(str, slopes))
        table.add_section()
    return table


def _theory(metric: str, axis: str, divisors: Sequence[int]) -> str:
    """Slope in theory; for D also against a finite reference with the same embedding.

    The term 1/sqrt(D) comes from averages over the stream's coordinates. Those of a small run are the first of the
    reference's, with the same embeddings, so that the variance of the difference is 1/D - 1/D_reference.
    """
    slope = THEORY.get(metric, {}).get(axis, "")
    if not slope or axis != "D":
        return slope
    finite = fit_slope([1 / divisor for divisor in divisors], [math.sqrt(divisor - 1) for divisor in divisors])
    return f"{slope} ({finite.value:.2f})"


def _of(found: Sequence[Distances], axis: str) -> list[Distances]:
    return sorted((one for one in found if one.run.axis == axis), key=lambda one: -one.run.divisor)


def _slopes(sweep: Sequence[Distances], metric: str) -> tuple[Slope, Slope]:
    """Of distances as logged, and beyond the reference's own part, against the fraction of the reference's size."""
    fractions = [1 / one.run.divisor for one in sweep]
    return fit_slope(fractions, [one.final(metric) for one in sweep]), fit_slope(
        fractions, [one.beyond(metric) for one in sweep]
    )


_COLORS = {"L": "#0072B2", "M": "#D55E00", "D": "#009E73", "L, M, D": "#AA4499"}
"""Of Okabe and Ito's and of Tol's palettes, which people with any colour vision can tell apart."""
_MARKERS = {"L": "o", "M": "s", "D": "^", "L, M, D": "D"}
_TITLES = {"L": "smaller depth L", "M": "smaller hidden width M", "D": "smaller embedding D", "L, M, D": "all smaller"}


def _save_figure(found: Sequence[Distances], path: Path) -> None:
    """Draw the stream's distance against step for each sweep, and final distances against size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 4, height_ratios=(1, 1.3))
    curves = [figure.add_subplot(grid[0, 0])]
    curves += [figure.add_subplot(grid[0, place], sharey=curves[0]) for place in range(1, len(SWEEPS))]
    values = [value for one in found for key in ("rms", "rms/floor") for value in one.curve[key].values() if value > 0]
    _logarithmic(curves[0])
    curves[0].set_ylim(min(values) / 1.2, max(values) * 1.2)
    curves[0].set_ylabel("RMS distance of the stream at s = 1")
    for axes, axis in zip(curves, SWEEPS, strict=True):
        _draw_curves(axes, _of(found, axis), axis)
        axes.tick_params(labelleft=axes is curves[0], which="both")
    for place, (metric, title) in enumerate(
        {"rms": "RMS distance of the stream at s = 1", "output": "RMS distance of outputs"}.items()
    ):
        axes = figure.add_subplot(grid[1, 2 * place : 2 * place + 2])
        _draw_slopes(axes, found, metric)
        axes.set_title(f"{title}, end of training", loc="left", fontsize=11)
    figure.savefig(path, dpi=150)


def _draw_curves(axes: Axes, sweep: Sequence[Distances], axis: str) -> None:
    """Distance of the stream against step: the smaller the run, the darker its line."""
    lines = [(_smaller(one.run), one.curve["rms"]) for one in sweep]
    for place, (name, curve) in enumerate(lines):
        color = _paler(_COLORS[axis], 0.65 * place / (len(lines) - 1))
        axes.plot(list(curve), list(curve.values()), color=color, linewidth=2, label=name)
    floor = sweep[0].curve["rms/floor"]
    axes.plot(list(floor), list(floor.values()), color="black", linewidth=1.5, linestyle="--", label="floor")
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    axes.set_xlim(0, max(floor))
    ticks = [step for step in (0, 1, 10, 100, 1000) if step <= max(floor)]
    axes.set_xticks(ticks, [str(step) for step in ticks])
    axes.set_xlabel("step")
    axes.set_title(_TITLES[axis], loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8, loc="upper left", handlelength=1.5)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_slopes(axes: Axes, found: Sequence[Distances], metric: str) -> None:
    """Final distances against size: as logged, and beyond the floor with the line that was fitted."""
    for axis in SWEEPS:
        sweep, color, marker = _of(found, axis), _COLORS[axis], _MARKERS[axis]
        sizes = [1 / one.run.divisor for one in sweep]
        _, slope = _slopes(sweep, metric)
        axes.plot(sizes, [one.final(metric) for one in sweep], marker, color=color, markerfacecolor="white")
        axes.plot(sizes, [one.beyond(metric) for one in sweep], marker, color=color)
        axes.plot(sizes, [slope.factor * size**slope.value for size in sizes], color=color, linewidth=1.5)
        axes.plot([], [], f"{marker}-", color=color, label=f"{axis}: slope {slope}")
    floor = found[0].final(f"{metric}/floor")
    axes.axhline(floor, color="black", linewidth=1.5, linestyle="--")
    axes.annotate(
        "floor: two seeds of the reference",
        (min(1 / one.run.divisor for one in found), floor),
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=9,
    )
    axes.set_xscale("log", base=2)
    _logarithmic(axes)
    ticks = sorted({one.run.divisor for one in found}, reverse=True)
    axes.set_xticks([1 / divisor for divisor in ticks], [f"1/{divisor}" for divisor in ticks])
    axes.set_xlabel("size / the reference's (hollow: as logged, filled: beyond the floor)")
    axes.legend(frameon=False, fontsize=10, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    axes.spines[["top", "right"]].set_visible(False)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))


def _paler(color: str, share: float) -> tuple[float, float, float]:
    """Mix a color with a share of white."""
    red, green, blue = (int(color[start : start + 2], 16) / 255 for start in (1, 3, 5))
    return red + share * (1 - red), green + share * (1 - green), blue + share * (1 - blue)


if __name__ == "__main__":
    main()
