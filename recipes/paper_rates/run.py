"""The paper's nonlinear experiment: how far finite networks are from the infinite model, over hidden width and embedding.

Every network is compared with the infinite model (theory.md, section 5), in its own coordinates, and those of the first
seed also, as the paper does it, with the largest network, whose W they are the first coordinates of.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jsonargparse import auto_cli
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlu_lightning.observation.distances import output_distance, rms_distance
from mlu_lightning.utilities.workers import worker_pool
from recipes.common.gradient_descent import Problem, descend, finite_model, look
from recipes.common.studies import ResultFile, check_command, console, deadline
from recipes.paper_rates.report import Errors, Point, report, save_figure

Job = tuple[int, int, int]  # hidden width M, embedding dimension D and seed of a network

STEPS_FOR_DEPTH = 2, 4, 8
"""Euler steps of the infinite models with which the term in L is measured."""
_REFERENCE, _LIMITS = "reference.safetensors", "limits.safetensors"


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
    """The paper's ten points in five dimensions."""
    draws = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randn(10, 5, generator=draws), torch.randn(10, 5, generator=draws)
    return Problem(inputs, targets, embedding_std=5**-0.5, readout_std=5**0.5, lr=1.0, loss_scale=1 / 100, steps=15)


def main(args: list[str] | None = None) -> None:
    """Run the experiment as the command line says."""
    auto_cli(run, args=args, prog="python -m recipes.paper_rates.run")


def run(
    study: Study | None = None, output: str = "paper-rates", minutes: float | None = 10.0, workers: int = 2
) -> None:
    """Train the networks that are not trained yet, the smallest first, and report how far they are.

    Args:
        study: which networks; each study needs a folder of its own.
        output: folder of the results and the figure.
        minutes: after which no network is begun; null for all of them.
        workers: number of networks at a time, each on one core.
    """
    end = deadline(minutes)
    study, folder, terminal = study or Study(), Path(output), console()
    check_command(workers, study.seeds)
    file = ResultFile(folder / "points.jsonl", asdict(study), lambda line: Point(**line))
    points = file.read()
    with worker_pool(workers, threads=1) as pool:
        models = [
            pool.submit(train, study, folder / name)
            for name, train in ((_REFERENCE, _train_reference), (_LIMITS, _train_limits))
            if not (folder / name).exists()
        ]
        terminal.print(f"limit and largest network: {len(models)} of 2 to be trained", highlight=False)
        for model in models:
            model.result()

    def missing() -> list[Job]:
        trained = {(point.hidden, point.embedding, point.seed) for point in points}
        left = [job for job in study.jobs if job not in trained]
        # as long as another one, at the pace of the last one, is likely to end in time
        pace = points[-1].seconds / (points[-1].hidden * points[-1].embedding) if points else 0.0
        return left if left and time.monotonic() + pace * left[0][0] * left[0][1] < end else []

    file.extend(points, missing, lambda job: (study, folder, job), _train, workers, end, terminal)
    left = len(study.jobs) - len(points)
    if left:
        text = f"{left} of {len(study.jobs)} networks are left for another call of this command."
        terminal.print(text, highlight=False)
    if not points:
        return
    terminal.print(*report(points, study.depth, _limit_distances(folder)), sep="\n")
    save_figure(points, study.depth, folder / "paper_rates.png")
    terminal.print(f"Wrote {folder / 'paper_rates.png'}.", highlight=False, soft_wrap=True)


def _train_limits(study: Study, path: Path) -> None:
    """Train infinite models of two seeds, whose difference is their error bar, and of few Euler steps, for the term in L."""
    problem, found = paper_problem(), {}
    models = {str(seed): (study.limit_depth, study.limit_units, seed) for seed in (0, 1)}
    models |= {f"L={depth}": (depth, 4 * study.limit_units, 2) for depth in STEPS_FOR_DEPTH}
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
        errors += [rms_distance(own["s=1"], reference["s=1"]), output_distance(own["output"], reference["output"])]
    return Point(hidden, embedding, seed, *map(float, errors), seconds=time.perf_counter() - start)


def _limit_distances(folder: Path) -> dict[str, dict[Errors, float]]:
    """Distances of the other infinite models from the first."""
    limits = load_file(folder / _LIMITS)
    distances: dict[str, dict[Errors, float]] = {}
    for key in dict.fromkeys(name.split("/")[0] for name in limits if not name.startswith("0/")):
        stream = rms_distance(limits[f"{key}/s=1"], limits["0/s=1"])
        output = output_distance(limits[f"{key}/output"], limits["0/output"])
        distances[key] = {"stream": float(stream), "output": float(output)}
    return distances


if __name__ == "__main__":
    main()
