"""The paper's nonlinear experiment: how far finite networks are from the infinite model, over hidden width and embedding.

    python -m recipes.paper_rates.run

d_in = d_out = 5, ten points of standard normal x and y, tanh, frozen W_E with entries N(0, 1/d_in) and W_U with entries
N(0, d_out), half the mean squared error, K = 15 steps of gradient descent with η = 1, L = 50 blocks, M and D over 20
log-spaced values from 1.5 to 2000, rounded down, 5 seeds (Chaintron, Chizat, Maass, arXiv 2603.18168).

Every network is compared with the infinite model (theory.md, section 5), in its own coordinates, and those of the first
seed also, as the paper does it, with the largest network, whose W they are the first coordinates of. By default it stops
after 10 minutes, smaller networks first; it goes on where it was when it is run again, and ``--minutes=null`` is the whole
experiment.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlu_lightning.observation.distances import output_distance, rms_distance
from recipes.common.gradient_descent import Problem, check_command, descend, finite_model, look, start_worker
from recipes.paper_rates.report import Errors, Point, report, save_figure

__all__ = ["Study", "main", "paper_problem", "run"]

Job = tuple[int, int, int]
"""Hidden width M, embedding dimension D and seed of a network."""


@dataclass(frozen=True)
class Study:
    """Which networks are trained.

    Args:
        depth: L.
        sizes: number of values of M and of D.
        smallest: of these values, which are log-spaced and rounded down.
        largest: of these values.
        seeds: of every shape.
        limit_depth: Euler steps of the infinite model.
        limit_units: hidden units of each of its layers.
    """

    depth: int = 50
    sizes: int = 20
    smallest: float = 1.5
    largest: float = 2000.0
    seeds: int = 5
    limit_depth: int = 200
    limit_units: int = 5000

    @property
    def widths(self) -> list[int]:
        """Values of M and of D."""
        # the last one is a rounding error below what was asked for
        return sorted({int(size * (1 + 1e-12)) for size in np.geomspace(self.smallest, self.largest, self.sizes)})

    @property
    def jobs(self) -> list[Job]:
        """All networks, the smallest first."""
        shapes = sorted(((m, d) for m in self.widths for d in self.widths), key=math.prod)
        return [(*shape, seed) for shape in shapes for seed in range(self.seeds)]


def paper_problem(seed: int = 0) -> Problem:
    """The paper's ten points in five dimensions.

    Args:
        seed: of the points.
    """
    draws = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randn(10, 5, generator=draws), torch.randn(10, 5, generator=draws)
    return Problem(inputs, targets, embedding_std=5**-0.5, readout_std=5**0.5, lr=1.0, loss_scale=1 / 100, steps=15)


def main(args: list[str] | None = None) -> None:
    """Run the experiment as the command line says.

    Args:
        args: of the command line; by default those of the process.
    """
    auto_cli(run, args=args, prog="python -m recipes.paper_rates.run")


def run(
    study: Study | None = None, output: str = "paper-rates", minutes: float | None = 10.0, workers: int = 2
) -> None:
    """Train the networks that are not trained yet, and report how far they are.

    Args:
        study: which networks; each study needs a folder of its own.
        output: folder of the results and the figure.
        minutes: after which no network is begun; null for all of them.
        workers: number of networks at a time, each on one core.
    """
    start = time.monotonic()
    study, folder = study or Study(), Path(output)
    check_command(workers, study.seeds)
    _check_same(study, folder)
    console = Console(width=None if sys.stdout.isatty() else 110)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) as pool:
        waiting = [
            pool.submit(make, study, folder / name)
            for name, make in ((_REFERENCE, _train_reference), (_LIMITS, _train_limits))
            if not (folder / name).exists()
        ]
        console.print(f"limit and largest network: {len(waiting)} of 2 to be trained", highlight=False)
        for future in waiting:
            future.result()
        _train_all(pool, workers, study, folder, math.inf if minutes is None else start + 60 * minutes, console)
    points = _read(folder)
    left = len(study.jobs) - len(points)
    if left:
        text = f"{left} of {len(study.jobs)} networks are left for another call of this command."
        console.print(text, highlight=False)
    if not points:
        return
    console.print(*report(points, study.depth, _limits(folder)), sep="\n")
    save_figure(points, study.depth, folder / "paper_rates.png")
    console.print(f"Wrote {folder / 'paper_rates.png'}.", highlight=False, soft_wrap=True)


_DEPTHS = 2, 4, 8
"""Of the infinite models that the term in L is measured with."""
_REFERENCE, _LIMITS, _POINTS = "reference.safetensors", "limits.safetensors", "points.jsonl"


def _check_same(study: Study, folder: Path) -> None:
    """Refuse to go on in the folder of another study."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "study.json"
    if not settings.exists():
        settings.write_text(json.dumps(asdict(study)), encoding="utf-8")
    elif json.loads(settings.read_text(encoding="utf-8")) != asdict(study):
        sys.exit(
            f"{folder} holds another study: {settings.read_text(encoding='utf-8')}. Give another --output, or delete it."
        )


def _train_limits(study: Study, path: Path) -> None:
    """Train infinite models of two seeds, whose difference is their error bar, and of few Euler steps, for the term in L."""
    problem, found = paper_problem(), {}
    models = {str(seed): (study.limit_depth, study.limit_units, seed) for seed in (0, 1)}
    models |= {f"L={depth}": (depth, 4 * study.limit_units, 2) for depth in _DEPTHS}
    for key, sizes in models.items():
        limit = problem.limit(*sizes)
        descend(limit.module, limit.plan, problem)
        for name, values in look(limit.module, limit.plan, problem).items():
            found[f"{key}/{name}"] = values
    _save(found, path)


def _train_reference(study: Study, path: Path) -> None:
    """Train the largest network, with the W of the first seed."""
    problem, width = paper_problem(), study.widths[-1]
    module, plan, _ = finite_model(problem, study.depth, width, width, seed=-1, embedding_seed=0)
    descend(module, plan, problem)
    _save(look(module, plan, problem), path)


def _save(values: dict[str, Tensor], path: Path) -> None:
    # a file that is there is whole
    save_file(values, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def _train(study: Study, folder: Path, job: Job) -> Point:
    """Train a network and measure how far it is from the infinite one, and from the largest."""
    start = time.perf_counter()
    problem, (hidden, embedding, seed) = paper_problem(), job
    # that of the first seed is coupled to the largest network's; the others are independent, so that errors are too
    embedding_seed = seed * 10_000 + embedding if seed else 0
    module, plan, weights = finite_model(problem, study.depth, hidden, embedding, seed, embedding_seed)
    descend(module, plan, problem)
    own = look(module, plan, problem)
    limit, reference = load_file(folder / _LIMITS), load_file(folder / _REFERENCE)
    stream = problem.limit(1, units=2).in_coordinates_of(weights, limit["0/s=1"])
    errors = [rms_distance(own["s=1"], stream), output_distance(own["output"], limit["0/output"])]
    if seed == 0:
        errors += [
            rms_distance(own["s=1"], reference["s=1"]),
            output_distance(own["output"], reference["output"]),
        ]
    return Point(hidden, embedding, seed, *map(float, errors), seconds=time.perf_counter() - start)


def _train_all(
    pool: ProcessPoolExecutor, workers: int, study: Study, folder: Path, deadline: float, console: Console
) -> None:
    """Train what is missing, the smallest first, as long as another one is likely to end in time."""
    known = _read(folder)
    # a run that was killed may have left half a line behind
    (folder / _POINTS).write_text("".join(json.dumps(asdict(point)) + "\n" for point in known), encoding="utf-8")
    trained = {(point.hidden, point.embedding, point.seed) for point in known}
    missing = [job for job in study.jobs if job not in trained]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    pending: set[Future[Point]] = set()
    pace = 0.0  # seconds for each unit of M D, of the network that ended last
    with Progress(*columns, console=console) as progress, (folder / _POINTS).open("a", encoding="utf-8") as file:
        task = progress.add_task("networks", total=len(study.jobs), completed=len(trained))
        while missing or pending:
            while missing and len(pending) < workers:
                if time.monotonic() + pace * missing[0][0] * missing[0][1] > deadline:
                    missing = []
                else:
                    pending.add(pool.submit(_train, study, folder, missing.pop(0)))
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                point = future.result()
                pace = point.seconds / (point.hidden * point.embedding)
                file.write(json.dumps(asdict(point)) + "\n")
                file.flush()
                progress.advance(task)


def _read(folder: Path) -> list[Point]:
    """Networks that were trained; the last line of a run that was killed may be cut off."""
    path = folder / _POINTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Point(**json.loads(line)) for line in lines if line.endswith("}")]


def _limits(folder: Path) -> dict[str, dict[Errors, float]]:
    """Distances of the other infinite models from the first."""
    limits = load_file(folder / _LIMITS)
    keys = dict.fromkeys(name.split("/")[0] for name in limits)
    return {
        key: {
            "stream": float(rms_distance(limits[f"{key}/s=1"], limits["0/s=1"])),
            "output": float(output_distance(limits[f"{key}/output"], limits["0/output"])),
        }
        for key in keys
        if key != "0"
    }


if __name__ == "__main__":
    main()
