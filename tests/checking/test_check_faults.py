"""The check fails on what a module computes otherwise than its plan says, and names what is wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.check_runs import few
from helpers.faulty_functions import TOKENS, Trained
from lightning.pytorch import Callback

from mlu_lightning import MLUCallback, Plan, Shape, attach_multipliers, check, initialize
from mlu_lightning.checking import CheckReport

BATCHES = [(TOKENS[0].roll(i, 1),) for i in range(4)]


def checked(fault: str, axis: str, callbacks: Any = None) -> CheckReport:
    def build(depth: int, hidden: int, embedding: int) -> Trained:
        return Trained(depth, hidden, embedding, fault)

    settings: Any = {"axes": [axis], "factors": [1, 2, 4], "seeds": 2, "steps": 2, "callbacks": callbacks}
    return check(build, Shape(depth=2, hidden=16, embedding=8), BATCHES, **settings)


@pytest.mark.parametrize(
    ("fault", "axis", "role"),
    [
        ("a buffer on logits", "embedding", "readout"),
        pytest.param("a buffer on embeddings", "embedding", "embedding", marks=pytest.mark.slow),
        pytest.param("signs", "hidden", "branch_out", marks=pytest.mark.slow),
        pytest.param("drawn late", "hidden", "branch_out", marks=pytest.mark.slow),
    ],
)
def test_faults_at_the_start(fault: str, axis: str, role: str) -> None:
    report = checked(fault, axis)
    assert report.verdict == "fail"
    assert role in {cause.role for cause in report.causes}, str(report)
    starts = [row for row in report.rows if row.quantity.kind == "start" and row.verdict == "fail"]
    assert {row.quantity.label for row in starts} <= {role, "branch_out_bias"}


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["depth", "hidden", "embedding"])
@pytest.mark.parametrize("fault", ["", "sqrt(D) on embeddings", "tied, D^-1/2 before the readout", "1/L on branches"])
def test_nothing_fails_at_the_start_without_a_fault(fault: str, axis: str) -> None:
    starts = [row for row in checked(fault, axis).rows if row.quantity.kind == "start"]
    assert len(starts) >= 8 and {row.verdict for row in starts} == {"pass"}


class OptimizersForgotten(Callback):
    """Sets weights and multipliers, and leaves optimizers as they are."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        plan = Plan.from_model(pl_module, BATCHES[0], base=self.base)
        attach_multipliers(initialize(pl_module, plan), plan)


@pytest.mark.slow
def test_optimizers_that_are_not_scaled() -> None:
    report = checked("", "hidden", lambda base: [OptimizersForgotten(base)])
    assert report.verdict == "fail"
    failing = [row.quantity for row in report.rows if row.verdict == "fail"]
    assert {quantity.role for quantity in failing if quantity.kind == "update"} == {"branch_out"}, str(report)


def multiplied_again(module: Any) -> None:
    for branch in module.branches:
        branch.register_forward_hook(lambda _, args, output: output / len(module.branches))


def every_second_forgotten(module: Any) -> None:
    for branch in list(module.branches)[1::2]:
        branch._forward_hooks.clear()


def drawn_late(pattern: str) -> Callable[[Any], None]:
    def draw(module: Any) -> None:
        for name, parameter in module.named_parameters():
            if pattern in name:
                torch.nn.init.normal_(parameter, std=0.2)

    return draw


def grown_late(pattern: str, power: float) -> Callable[[Any], None]:
    def grow(module: Any) -> None:
        for name, parameter in module.named_parameters():
            if pattern in name:
                parameter.data.mul_(parameter.shape[-1] ** power)

    return grow


class Planted(MLUCallback):
    """Plants a fault when a training starts."""

    def __init__(self, base: Any, plant: Callable[[Any], None]) -> None:
        super().__init__(base, residual="hook")
        self.plant = plant

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.plant(pl_module)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "axis", "role"),
    [
        (multiplied_again, "depth", "branch_out"),
        (every_second_forgotten, "depth", "branch_out"),
        (drawn_late("write"), "hidden", "branch_out"),
        (drawn_late("read."), "embedding", "branch_in"),
        (grown_late("tokens", -0.5), "embedding", "embedding"),
        (grown_late("norm", 0.5), "embedding", "branch_norm"),
    ],
)
def test_faults_that_come_after_the_plan(plant: Callable[[Any], None], axis: str, role: str) -> None:
    report = few(axes=[axis], seeds=2, callbacks=lambda base: [Planted(base, plant)])
    assert report.verdict == "fail"
    assert report.causes[0].role == role, str(report)
