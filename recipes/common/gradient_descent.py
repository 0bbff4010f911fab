"""What the paper's experiments share: residual networks on a few points, trained by full-batch gradient descent.

Networks are this package's ``ResNet`` in the absolute form of the parameterization (theory.md, section 2), with embedding
and readout frozen, and their limit is :func:`mlu_lightning.limit.infinite_model.infinite_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlu_lightning import Plan, attach_multipliers, initialize, scale_optimizer
from mlu_lightning.limit.infinite_model import InfiniteModel, embedding_weights, infinite_model
from mlu_lightning.models import ResNet
from mlu_lightning.observation import Observation, locate, observe


@dataclass(frozen=True)
class Problem:
    """Points to fit, and how."""

    inputs: Tensor  # x, [samples, d_in]
    targets: Tensor  # y, [samples, d_out]
    embedding_std: float  # of the entries of W_E
    readout_std: float  # of the entries of W_U
    lr: float  # learning rate η of the loss Σ (f - y)² · loss_scale
    loss_scale: float  # 1/(2 · samples · d_out) for half the mean squared error
    steps: int
    activation: str = "tanh"

    @property
    def module_lr(self) -> float:
        """Learning rate for ``ResNet``, whose loss is the mean squared error."""
        return self.lr * self.loss_scale * self.targets.numel()

    def model(self, depth: int, hidden: int, embedding: int) -> tuple[ResNet, Plan]:
        """Build a network and its plan in the absolute form, with the problem's stds of W_E and W_U."""
        inputs, outputs = self.inputs.shape[1], self.targets.shape[1]
        module = ResNet(depth, hidden, embedding, inputs, outputs, self.activation, train_embedding=False)
        plan = Plan.from_model(module)
        stds = {"embed.weight": self.embedding_std, "readout.weight": self.readout_std}
        parameters = {
            name: replace(parameter, base_std=stds.get(name, parameter.base_std))
            for name, parameter in plan.parameters.items()
        }
        return module, replace(plan, parameters=parameters)

    def limit(self, depth: int, units: int | None = None, seed: int = 0) -> InfiniteModel:
        """Build the infinite model with so many Euler steps and units in each."""
        return infinite_model(*self.model(1, 1, 1), depth=depth, units=units, seed=seed)


def finite_model(
    problem: Problem, depth: int, hidden: int, embedding: int, seed: int, embedding_seed: int = 0
) -> tuple[ResNet, Plan, Tensor]:
    """Build a network with normal weights and its multipliers attached; return it, its plan, and W [D, d_in + d_out]."""
    module, plan = problem.model(depth, hidden, embedding)
    return module, plan, initial_weights(module, plan, seed, embedding_seed)


def initial_weights(module: ResNet, plan: Plan, seed: int, embedding_seed: int) -> Tensor:
    """Draw weights, attach multipliers, and return W, whose first coordinates are the same for every D."""
    initialize(module, plan, "normal", seed)
    initialize(module, plan, "coupled", embedding_seed)
    attach_multipliers(module, plan)
    return embedding_weights(module, plan)


def descend(
    module: ResNet, plan: Plan, problem: Problem, after: Callable[[int], None] = lambda step: None
) -> list[float]:
    """Train a network that has its multipliers; return the loss before each step, and call ``after`` each, from step 0."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, problem.module_lr)
    scale_optimizer(optimizer, module, plan)
    losses = []
    after(0)
    for step in range(1, problem.steps + 1):
        errors = (module(problem.inputs) - problem.targets).square()
        errors.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(errors.sum().item() * problem.loss_scale)
        after(step)
    return losses


def look(module: ResNet, plan: Plan, problem: Problem, depths: Sequence[float] = (1,)) -> Observation:
    """Observe the stream at relative depths, [samples, D], and the output of a network."""
    batch = problem.inputs, problem.targets
    return observe(module, batch, locate(plan.taps, [plan.streams[0].depth], depths), positions=len(problem.inputs))
