"""The paper's linear experiment: how far finite networks are from the infinite model, against L, M and D.

At a finite D, with a given W, there is a limit of L, M → ∞ too: that of theory.md, section 5, with WᵀW/D itself in place of
what it tends to. What is between a network and this limit is the part of L and M in its error, and what is between the two
limits is the part of D.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mlu_lightning import Plan
from mlu_lightning.limit.infinite_model import InfiniteModel
from mlu_lightning.models import ResNet
from mlu_lightning.observation.distances import rms_distance
from recipes.common.gradient_descent import Problem, descend, finite_model, look
from recipes.common.studies import check_command, console, in_processes, save_json, save_points, study_command
from recipes.paper_linear.report import Kept, Point, Streams, save_figure, slope_table

DEPTHS: Mapping[Kept, Sequence[float]] = {"": (), "trace": [i / 32 for i in range(33)], "histogram": (0.0, 0.5, 1.0)}
"""Relative depths at which streams are kept for the figure."""
TRACED = 4  # coordinates of a stream that are drawn over depth


@dataclass(frozen=True)
class Case:
    """A network to be trained."""

    axis: str  # of the sweep that it belongs to
    depth: int
    hidden: int
    embedding: int
    seed: int  # of its weights, W included
    limit_depth: int  # Euler steps of the limits that it is compared with
    kept: Kept = ""  # what its stream is kept for


def run(output: str = "paper-linear", workers: int = 2, seeds: int = 4, quick: bool = False) -> None:
    """Train networks of all sizes, and report how far they are from the infinite model.

    Args:
        output: folder of the points and the figure.
        workers: number of networks at a time, each on one core.
        seeds: networks of every shape; twice as many in the sweep of D, where the error is that of a single W.
    """
    check_command(workers, seeds)
    terminal, folder = console(), Path(output)
    measured = in_processes(measure, _cases(seeds, quick), workers, "networks", terminal)
    points, streams = [point for point, _ in measured], [stream for _, stream in measured if stream]
    save_points(points, folder / "points.csv")
    save_json(streams, folder / "streams.json")
    terminal.print(slope_table(points))
    save_figure(points, streams, folder / "paper_linear.png")
    terminal.print(f"Wrote {folder / 'paper_linear.png'}.", highlight=False, soft_wrap=True)


def linear_problem(seed: int = 0) -> Problem:
    """One point: x of norm 0.8 and y of norm 1, in directions drawn at random."""
    draws = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 1, 3, generator=draws)
    return Problem(
        inputs=0.8 * x / x.norm(),
        targets=y / y.norm(),
        embedding_std=1.0,
        readout_std=1.0,
        lr=0.1,
        loss_scale=0.5,
        steps=15,
        activation="positive",  # the identity
    )


def measure(case: Case) -> tuple[Point, Streams | None]:
    """Train a network; return its errors, of the stream after K steps and of outputs over all, and its stream if kept."""
    # every network fits its one point, and f = y leaves no error of outputs at the end
    problem, limit = linear_problem(), _limit(case.limit_depth)
    module, plan, weights = finite_model(problem, case.depth, case.hidden, case.embedding, case.seed, case.seed)
    outputs = _train(module, plan, problem)
    depths = DEPTHS[case.kept]
    seen = look(module, plan, problem, (*depths, 1))
    infinite = {name: limit.model.in_coordinates_of(weights, values) for name, values in limit.streams.items()}
    between, between_outputs = limit_at(weights, case.limit_depth)
    shape = case.depth, case.hidden, case.embedding
    point = Point(
        case.axis,
        *shape,
        case.seed,
        stream=float(rms_distance(seen["s=1"], infinite["s=1"])),
        output=float(rms_distance(outputs, limit.outputs)),
        stream_of_depth_and_hidden=float(rms_distance(seen["s=1"], between)),
        output_of_depth_and_hidden=float(rms_distance(outputs, between_outputs)),
        stream_of_embedding=float(rms_distance(between, infinite["s=1"])),
        output_of_embedding=float(rms_distance(between_outputs, limit.outputs)),
    )
    if not depths:
        return point, None
    names, cut = [f"s={s:g}" for s in depths], TRACED if case.kept == "trace" else case.embedding
    kept = Streams(
        kept=case.kept,
        shape=shape,
        depths=list(depths),
        coordinates=[seen[name][0, :cut].tolist() for name in names],
        limits=[infinite[name][0, :cut].tolist() for name in names],
        # |ã|², the variance of a coordinate of W a over W, is |h'|²/r in the coordinates of the infinite model
        deviations=[limit.streams[name].square().mean().sqrt().item() for name in names],
    )
    return point, kept


def limit_at(weights: Tensor, limit_depth: int) -> tuple[Tensor, Tensor]:
    """Train the limit of L, M → ∞ for a given W, [D, r]; return its stream at s = 1 and its outputs after each step.

    WᵀW/D itself is the S of theory.md, section 5.
    """
    problem, limit = linear_problem(), _limit(limit_depth)
    module, inputs = limit.model.module, problem.inputs.shape[1]
    values, vectors = torch.linalg.eigh((weights.T @ weights / len(weights)).double())
    root = (math.sqrt(len(values)) * (vectors * values.sqrt()) @ vectors.T).to(weights)  # W' with W'ᵀW'/r = WᵀW/D
    with torch.no_grad():
        module.load_state_dict(limit.start)
        module.embed.weight.copy_(root[:, :inputs])
        module.readout.weight.copy_(root[:, inputs:].T)
    outputs = _train(module, limit.model.plan, problem)
    stream = look(module, limit.model.plan, problem)["s=1"]
    return stream @ torch.linalg.inv(root).T @ weights.T, outputs  # W a with h' = W' a


@dataclass(frozen=True)
class _Limit:
    """The infinite model, and what it becomes: initial weights, trained stream by depth, outputs after each step."""

    model: InfiniteModel
    start: dict[str, Tensor]
    streams: dict[str, Tensor]
    outputs: Tensor


@cache
def _limit(depth: int) -> _Limit:
    """Build and train the infinite model, once in each process."""
    problem = linear_problem()
    model = problem.limit(depth)
    start = deepcopy(model.module.state_dict())
    outputs = _train(model.module, model.plan, problem)
    seen = look(model.module, model.plan, problem, sorted({1.0}.union(*DEPTHS.values())))
    streams = {name: values for name, values in seen.items() if name != "output"}
    return _Limit(model, start, streams, outputs)


def _train(module: ResNet, plan: Plan, problem: Problem) -> Tensor:
    """Train a network, and return its outputs after each of the K steps, [K, d_out]."""
    outputs: list[Tensor] = []
    with_output = torch.no_grad()(lambda step: outputs.append(module(problem.inputs)) if step else None)
    descend(module, plan, problem, with_output)
    return torch.cat(outputs)


def _cases(seeds: int, quick: bool) -> list[Case]:
    """All networks, the smallest first."""
    # D^(3/2) > L M along L and M, so that D/(L M) is seen before 1/sqrt(D)
    limit_depth, traced = 400, [(8, 32, 32), (32, 128, 128), (128, 512, 512)]
    sweeps = {
        "L": [(depth, 128, 1024) for depth in (16, 32, 64, 128, 256)],
        "M": [(64, hidden, 1024) for hidden in (32, 64, 128, 256, 512)],
        "D": [(32, 4096, embedding) for embedding in (16, 32, 64, 128, 256)],
    }
    if quick:
        limit_depth, traced = 16, [(4, 16, 16), (8, 64, 64)]
        sweeps = {"L": [(4, 16, 64), (8, 16, 64), (16, 16, 64)], "M": [(8, 8, 64), (8, 16, 64), (8, 32, 64)]}
        sweeps["D"] = [(8, 256, 8), (8, 256, 16), (8, 256, 32)]
    cases = [
        Case(axis, *shape, seed, limit_depth, "histogram" if axis == "D" and shape == shapes[-1] else "")
        for axis, shapes in sweeps.items()
        for shape in shapes
        for seed in range(2 * seeds if axis == "D" else seeds)
    ]
    cases += [Case("L, M, D", *shape, 0, limit_depth, "trace") for shape in traced]  # of one W
    return sorted(cases, key=lambda case: case.depth * case.hidden * case.embedding)


main = study_command(run, "python -m recipes.paper_linear.run")

if __name__ == "__main__":
    main()
