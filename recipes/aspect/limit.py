"""Do networks come to the same limit as M/D grows? Distances in embedding space, for all parameterizations.

The networks are the paper's, at one depth L and embedding D, so that M alone counts; the infinite model has as many steps in
depth. At the smallest M all parameterizations are the same network, MLU in its absolute form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from mlu_lightning.observation.distances import rms_distance
from mlu_lightning.tuning.found import Estimate
from recipes.common.gradient_descent import Problem, descend, initial_weights, look
from recipes.paper_rates.run import paper_problem

DEPTH, EMBEDDING = 10, 256


@dataclass(frozen=True)
class Distances:
    """RMS distances, in embedding space, of networks of one hidden width."""

    parameterization: str
    hidden: int
    aspect: float  # M/D
    to_limit: Estimate
    to_widest: Estimate  # with the same W, and other weights in the blocks


def measure(quick: bool = False) -> list[Distances]:
    """Train networks of all parameterizations and hidden widths."""
    widths = [16, 32] if quick else [64, 256, 1024, 4096]
    depth, embedding, units, seeds = (2, 16, 50, 2) if quick else (DEPTH, EMBEDDING, 2000, 3)
    problem = paper_problem()
    model = problem.limit(depth, units)
    descend(model.module, model.plan, problem)
    limit = look(model.module, model.plan, problem)["s=1"]
    found = []
    for name in ("mlu", "completep", "sp"):
        widest = _train(problem, name, (depth, 2 * widths[-1], embedding), widths[0], seed=-1)[0]
        for hidden in widths:
            runs = [_train(problem, name, (depth, hidden, embedding), widths[0], seed) for seed in range(seeds)]
            to_limit = [float(rms_distance(own, model.in_coordinates_of(weights, limit))) for own, weights in runs]
            to_widest = [float(rms_distance(own, widest)) for own, _ in runs]
            found.append(Distances(name, hidden, hidden / embedding, *map(Estimate.over, (to_limit, to_widest))))
    return found


def tuned_of(parameterization: str, m: float) -> dict[str, dict[str, float]]:
    """Factors that make MLU's numbers those of another, at m times the base's hidden width, its depth and embedding."""
    if parameterization == "mlu":
        return {}
    out = {"std": math.sqrt(m)}  # 1/√m in place of 1/m
    if parameterization == "completep":
        return {"branch_out": out}
    return {"branch_in": {"lr": 1 / m}, "branch_out": out | {"lr": m}}  # SGD's m and 1/m are undone


def _train(
    problem: Problem, parameterization: str, shape: tuple[int, int, int], base_hidden: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Stream [samples, D] at the end of a network after its training, and its W."""
    module, plan = problem.model(*shape)
    plan = replace(plan, tuned=tuned_of(parameterization, shape[1] / base_hidden))
    weights = initial_weights(module, plan, seed, embedding_seed=0)
    descend(module, plan, problem)
    return look(module, plan, problem)["s=1"], weights
