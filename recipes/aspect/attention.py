"""Constants of the error bound for attention: how far Transformers without perceptrons are from the infinite model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from torch import Tensor

from mlu_lightning import Plan, attach_multipliers, initialize, scale_optimizer
from mlu_lightning.limit.infinite_model import embedding_weights, infinite_model
from mlu_lightning.models import CausalTransformer
from mlu_lightning.observation.distances import rms_distance
from mlu_lightning.shapes import Shape
from mlu_lightning.tuning.found import Estimate

VOCABULARY, CONTEXT, HEAD_DIM, STEPS, LR = 6, 8, 4, 8, 1.0
STDS = {"tokens.weight": 1.0, "readout.weight": math.sqrt(VOCABULARY)}


@dataclass(frozen=True)
class Errors:
    """What was measured, and the constants that fit it."""

    depths: dict[int, float]  # distance of infinite models of so many Euler steps from that of many
    shapes: dict[Shape, Estimate]  # of networks from the infinite model of their depth
    constants: tuple[float, float, float]  # of the terms in 1/L, √(D/(L·M)) and 1/√D
    scatter: float  # root mean square of log(measured / bound) over the networks


def measure_attention(quick: bool = False) -> Errors:
    """Train networks of several shapes, and infinite models of several depths."""
    depth, many, heads, seeds = (2, 4, 8, 2) if quick else (8, 24, 512, 2)
    sizes = [(16, 64), (64, 64), (64, 512), (256, 256)] if not quick else [(8, 4), (32, 4), (32, 8)]
    deep = _limit_stream(many, heads)
    depths = {few: float(rms_distance(_limit_stream(few, heads), deep)) for few in ((1, 2) if quick else (2, 4, 8))}
    limit = infinite_model(*_planned(depth, 2, 8), heads=heads)
    _train(limit.module, limit.plan)
    stream = _stream(limit.module)
    shapes: dict[Shape, Estimate] = {}
    for embedding, number in sizes:
        found = []
        for seed in range(seeds):
            module, plan = _planned(depth, number, embedding)
            initialize(module, plan, "normal", seed)
            attach_multipliers(module, plan)
            weights = embedding_weights(module, plan)
            _train(module, plan)
            found.append(float(rms_distance(_stream(module), limit.in_coordinates_of(weights, stream))))
        shapes[Shape(depth, number, embedding)] = Estimate.over(found)
    constant = math.exp(math.fsum(math.log(error * few) for few, error in depths.items()) / len(depths))
    hidden, of_embedding, scatter = fit_two({shape: estimate.value for shape, estimate in shapes.items()})
    return Errors(depths, shapes, (constant, hidden, of_embedding), scatter)


def fit_two(errors: Mapping[Shape, float]) -> tuple[float, float, float]:
    """Fit hypot(c2 √(D/(L·M)), c3/√D), what is left against the infinite model of a network's own depth, and its scatter."""
    terms = np.array([(s.embedding / (s.depth * s.hidden), 1 / s.embedding) for s in errors])
    squares = np.array(list(errors.values())) ** 2
    found = nnls(terms / squares[:, None], np.ones(len(squares)))[0]
    scatter = float(np.sqrt(np.mean(np.log(terms @ found / squares) ** 2)) / 2)
    return math.sqrt(found[0]), math.sqrt(found[1]), scatter


def tokens() -> Tensor:
    """Sequences in which each token is one or two more than the last."""
    draws = torch.Generator().manual_seed(0)
    return torch.randint(1, 3, (16, CONTEXT + 1), generator=draws).cumsum(-1) % VOCABULARY


def _planned(depth: int, heads: int, embedding: int) -> tuple[CausalTransformer, Plan]:
    module = CausalTransformer(
        VOCABULARY, CONTEXT, depth, embedding, heads, HEAD_DIM, 0, LR, norm_gains=False, optimizer="sgd"
    )
    plan = Plan.from_model(module)
    entries = {name: replace(p, base_std=STDS.get(name, p.base_std)) for name, p in plan.parameters.items()}
    return module, replace(plan, parameters=entries)


def _limit_stream(depth: int, heads: int) -> Tensor:
    limit = infinite_model(*_planned(2, 2, 8), depth=depth, heads=heads)
    _train(limit.module, limit.plan)
    return _stream(limit.module)


def _train(module: CausalTransformer, plan: Plan) -> None:
    optimizer = torch.optim.SGD(module.parameters(), LR)
    scale_optimizer(optimizer, module, plan)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(module(tokens()[:, :-1]).mT, tokens()[:, 1:]).backward()
        optimizer.step()


def _stream(module: CausalTransformer) -> Tensor:
    """The stream after the last addition, [samples, positions, D]."""
    found: list[Tensor] = []
    handle = module.norm.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach()))
    with torch.no_grad():
        module(tokens()[:, :-1])
    handle.remove()
    return found[0].flatten(0, 1)
