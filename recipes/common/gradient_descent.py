"""What the paper's experiments have in common: residual networks on a few points, by full-batch gradient descent.

Networks are this package's ``ResNet`` in the absolute form of the parameterization (theory.md, section 2), with embedding
and readout frozen, and their limit is :func:`mlu_lightning.limit.infinite_model.infinite_model`.
"""

from __future__ import annotations

import csv
import logging
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import astuple, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mlu_lightning import Plan, attach_multipliers, initialize, scale_optimizer
from mlu_lightning.limit.infinite_model import InfiniteModel, embedding_weights, infinite_model
from mlu_lightning.models import ResNet
from mlu_lightning.observation import Observation, locate, observe

__all__ = [
    "Problem",
    "check_command",
    "command",
    "descend",
    "finite_model",
    "in_processes",
    "look",
    "save_points",
    "start_worker",
]

CaseT = TypeVar("CaseT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Problem:
    """Points to fit, and how.

    Args:
        inputs: x, [samples, d_in].
        targets: y, [samples, d_out].
        embedding_std: of the entries of W_E.
        readout_std: of those of W_U.
        lr: learning rate η of the loss Σ (f - y)² · ``loss_scale``.
        loss_scale: 1/(2 · samples · d_out) for half the mean squared error.
        steps: of gradient descent.
        activation: of the hidden units.
    """

    inputs: Tensor
    targets: Tensor
    embedding_std: float
    readout_std: float
    lr: float
    loss_scale: float
    steps: int
    activation: str = "tanh"

    @property
    def module_lr(self) -> float:
        """Learning rate for ``ResNet``, whose loss is the mean squared error."""
        return self.lr * self.loss_scale * self.targets.numel()

    def model(self, depth: int, hidden: int, embedding: int) -> tuple[ResNet, Plan]:
        """Build a network and its plan in the absolute form, with the problem's W_E and W_U.

        Args:
            depth: L.
            hidden: M.
            embedding: D.
        """
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
        """Build the infinite model.

        Args:
            depth: Euler steps.
            units: per layer; by default those of :func:`mlu_lightning.limit.infinite_model.infinite_model`.
            seed: of the units.
        """
        return infinite_model(*self.model(1, 1, 1), depth=depth, units=units, seed=seed)


def finite_model(
    problem: Problem, depth: int, hidden: int, embedding: int, seed: int, embedding_seed: int = 0
) -> tuple[ResNet, Plan, Tensor]:
    """Build a network with normal weights.

    Args:
        problem: to be trained on.
        depth: L.
        hidden: M.
        embedding: D.
        seed: of the weights in branches.
        embedding_seed: of W, whose first coordinates are the same for every D.

    Returns:
        The network with its multipliers attached, its plan, and W [D, d_in + d_out].
    """
    module, plan = problem.model(depth, hidden, embedding)
    initialize(module, plan, "normal", seed)
    initialize(module, plan, "coupled", embedding_seed)
    attach_multipliers(module, plan)
    return module, plan, embedding_weights(module, plan)


def descend(
    module: ResNet, plan: Plan, problem: Problem, after: Callable[[int], None] = lambda step: None
) -> list[float]:
    """Train a network, finite or infinite, by full-batch gradient descent.

    Args:
        module: with its multipliers attached.
        plan: of the network.
        problem: to be trained on.
        after: is called with the number of steps made, from 0.

    Returns:
        The loss before each step.
    """
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
    """Stream at relative depths, [samples, D], and output of a network.

    Args:
        module: finite or infinite.
        plan: of the network.
        problem: of whose inputs.
        depths: relative, between 0 and 1.
    """
    batch = problem.inputs, problem.targets
    return observe(module, batch, locate(plan.taps, [plan.streams[0].depth], depths), positions=len(problem.inputs))


def command(function: Callable[..., None], program: str, args: Sequence[str] | None) -> None:
    """Call a study with the arguments of a command line.

    Args:
        function: of which ``quick`` is one argument.
        program: name of the command.
        args: of the command line; by default those of the process.
    """
    parser = ArgumentParser(prog=program)
    parser.add_function_arguments(function, skip={"quick"})
    parser.add_argument("--quick", action="store_true", help="try the machinery only: tiny networks")
    function(**parser.parse_args(None if args is None else list(args)).as_dict())


def check_command(workers: int, seeds: int) -> None:
    """End the command if it cannot be run, before anything is trained.

    Args:
        workers: number of networks at a time.
        seeds: networks of every shape.
    """
    if find_spec("matplotlib") is None:
        sys.exit("The study draws a figure, and matplotlib is not installed: pip install 'mlu-lightning[plots]'.")
    for name, number in (("workers", workers), ("seeds", seeds)):
        if number < 1:
            sys.exit(f"--{name} is {number}, and at least one is needed.")


def in_processes(
    function: Callable[[CaseT], ResultT], cases: Sequence[CaseT], workers: int, title: str, console: Console
) -> list[ResultT]:
    """Apply a function to cases, the last ones first, each in a process that has one core.

    Args:
        function: of a module, so that other processes find it.
        cases: what it is applied to, the cheapest first.
        workers: number of processes.
        title: of the progress bar.
        console: of the progress bar.

    Returns:
        What the function gave, in the order of the cases.
    """
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) as pool:
        pending = [pool.submit(function, case) for case in reversed(cases)]
        try:
            for future in track(as_completed(pending), title, len(pending), console=console):
                future.result()
        except BaseException:
            # else all others would be trained before anybody hears of it
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in reversed(pending)]


def save_points(points: Sequence[Any], path: Path) -> None:
    """Write results as a table of comma-separated values.

    Args:
        points: instances of one dataclass.
        path: of the file.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([field.name for field in fields(points[0])])
        table.writerows(astuple(point) for point in points)


def start_worker() -> None:
    """Let a process have one core, and be quiet."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
