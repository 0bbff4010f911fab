"""Phase diagram: how far features move, and where a network tends to, with MLU and with other residual scales.

Plans with another residual scale than sqrt(D)/(L M) are the MLU plan with edits, and all else is the same. MLU means that
in one step the pre-activations of every block move by Θ(1) at any shape because *its own* weights have moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mlu_lightning import Plan
from mlu_lightning.limit.infinite_model import InfiniteModel
from mlu_lightning.models import ResNet
from mlu_lightning.observation.distances import output_distance, rms_distance
from mlu_lightning.table import Role
from recipes.common.gradient_descent import Problem, descend, initial_weights, look
from recipes.common.studies import check_command, console, in_processes, save_points, study_command
from recipes.paper_rates.run import paper_problem
from recipes.phase_diagram.report import SWEEPS, Point, Shape, save_figure, verdict_table


@dataclass(frozen=True)
class Case:
    """A network to be trained."""

    variant: str  # name of the edit of its plan
    shape: Shape  # L, M, D
    alpha: float  # richness, before the edit
    seed: int  # of its weights, W included
    limit: tuple[int, int]  # Euler steps and units of the infinite model that it is compared with


def run(output: str = "phase-diagram", workers: int = 2, seeds: int = 4, quick: bool = False) -> None:
    """Train networks of all variants and sizes, and report what is lazy, what explodes and what is MLU.

    Args:
        output: folder of the points and the figure.
        workers: number of networks at a time, each on one core.
        seeds: networks of every variant and shape.
    """
    check_command(workers, seeds)
    terminal, folder = console(155), Path(output)
    points = in_processes(measure, _cases(seeds, quick), workers, "networks", terminal)
    save_points(points, folder / "points.csv")
    sweeps = SWEEPS["quick" if quick else "default"]
    steps = paper_problem().steps
    terminal.print(verdict_table(points, list(VARIANTS), sweeps, steps))
    save_figure(points, list(VARIANTS), sweeps, steps, folder / "phase_diagram.png")
    terminal.print(f"Wrote {folder / 'phase_diagram.png'}.", highlight=False, soft_wrap=True)


def measure(case: Case) -> Point:
    """Train a network, and measure how far its features and its stream have moved, and how far it is from the limit."""
    problem, (limit, infinite) = paper_problem(), _limit(*case.limit)
    module, plan = problem.model(*case.shape)
    plan = VARIANTS[case.variant](replace(plan, alpha=case.alpha))
    weights = initial_weights(module, plan, case.seed, case.seed)
    start = [block.read.weight.detach().clone() for block in module.blocks]
    local, stream = {}, {0: _streams(module, problem)[-1]}

    def after(step: int) -> None:
        if step in (1, problem.steps):
            streams = _streams(module, problem)
            moved = [
                _rms(before @ (block.read.weight.detach() - old).T)
                for before, block, old in zip(streams, module.blocks, start, strict=False)
            ]
            local[step], stream[step] = math.fsum(moved) / len(moved), streams[-1]

    losses = descend(module, plan, problem, after)
    seen = look(module, plan, problem)
    return Point(
        case.variant,
        *case.shape,
        case.alpha,
        case.seed,
        local_first=local[1],
        local_last=local[problem.steps],
        stream_update=_rms(stream[problem.steps] - stream[0]),
        stream_distance=float(rms_distance(seen["s=1"], limit.in_coordinates_of(weights, infinite["s=1"]))),
        output_distance=float(output_distance(seen["output"], infinite["output"])),
        loss_first=losses[0],
        loss_last=float((seen["output"] - problem.targets).square().sum()) * problem.loss_scale,
    )


def _with_multiplier(plan: Plan, value: float) -> Plan:
    """Another multiplier of all branches, at the learning rates of MLU."""
    multipliers = (replace(entry, value=value) if entry.kind == "branch" else entry for entry in plan.multipliers)
    return replace(plan, multipliers=tuple(multipliers))


def _with_std(plan: Plan) -> Plan:
    """Standard deviation 1/M of what writes to the stream, at the learning rates of MLU."""
    std = 1 / math.sqrt(plan.streams[0].embedding)  # times the table's sqrt(D)/M
    parameters = {
        name: replace(entry, base_std=std) if entry.role is Role.BRANCH_OUT else entry
        for name, entry in plan.parameters.items()
    }
    return replace(plan, parameters=parameters)


def _without_scale(plan: Plan) -> Plan:
    """No residual scale: 1/sqrt(fan-in) for all weights in branches, multiplier 1, and η itself as their learning rate."""
    parameters = {
        name: replace(entry, base_fans=entry.fans, base_depth=entry.depth, base_std=entry.fans[0] ** -0.5)
        if entry.role.in_branch
        else entry
        for name, entry in plan.parameters.items()
    }
    return _with_multiplier(replace(plan, parameters=parameters), 1.0)


VARIANTS: Mapping[str, Callable[[Plan], Plan]] = {
    "MLU": lambda plan: plan,
    "MLU, α = 4": lambda plan: replace(plan, alpha=4.0),
    # scales sqrt(D)/(sqrt(L) M) and 1/(L M) are other α, at learning rates / α², with which outputs learn as fast
    "1/√L, η/L": lambda plan: replace(plan, alpha=math.sqrt(plan.streams[0].depth)),
    "1/√L, η": lambda plan: _with_multiplier(plan, 1 / math.sqrt(plan.streams[0].depth)),
    "1/M, η·D": lambda plan: replace(plan, alpha=1 / math.sqrt(plan.streams[0].embedding)),
    "1/M, η": _with_std,
    "none, η": _without_scale,
}
"""Edits of plans by name: residual scale (in place of 1/L, of sqrt(D)/M, or of all), learning rate of branches."""


def _cases(seeds: int, quick: bool) -> list[Case]:
    """All networks, the smallest first; those of several sweeps once."""
    sweeps = SWEEPS["quick" if quick else "default"]
    limit = (8, 200) if quick else (100, 2000)
    cases = {
        Case(variant, shape, 1.0, seed, limit)
        for variant in VARIANTS
        for axis in "LMD"
        for shape in sweeps.shapes(axis)
        for seed in range(seeds)
    } | {Case("MLU", sweeps.rich, alpha, seed, limit) for alpha in sweeps.alphas for seed in range(seeds)}
    return sorted(cases, key=lambda case: (math.prod(case.shape), case.variant, case.shape, case.alpha, case.seed))


@cache
def _limit(depth: int, units: int) -> tuple[InfiniteModel, dict[str, Tensor]]:
    """Train the infinite model, once in each process."""
    problem = paper_problem()
    limit = problem.limit(depth, units)
    descend(limit.module, limit.plan, problem)
    return limit, look(limit.module, limit.plan, problem)


def _streams(module: ResNet, problem: Problem) -> list[Tensor]:
    """What every block is given, and what the readout is."""
    found: list[Tensor] = []
    readers = [*module.blocks, module.readout]
    # before the multiplier of the readout, which is on its input
    handles = [
        reader.register_forward_pre_hook(lambda _, given: found.append(given[0]), prepend=True) for reader in readers
    ]
    with torch.no_grad():
        module(problem.inputs)
    for handle in handles:
        handle.remove()
    return found


def _rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


main = study_command(run, "python -m recipes.phase_diagram.run")

if __name__ == "__main__":
    main()
