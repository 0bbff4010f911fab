"""MLUCallback compares what a module computes with its plan when a training starts, and says what it cannot compare."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.callback_runs import BATCH, OUTPUTS, WIDE, Net, fit, loader
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor

from mlu_lightning import MLUCallback, Plan
from mlu_lightning.application import folded_parameters


class Scaled(Net):
    """Multiplies its outputs by numbers that depend on its own width."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) * torch.full((OUTPUTS,), self.shape[2] ** -0.5)


class Hooked(Net):
    """Multiplies its branches once more."""

    def on_fit_start(self) -> None:
        for block in self.blocks:
            block.register_forward_hook(lambda module, args, output: output / 4)


class ConstantInTraining(Net):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) * (self.shape[2] ** -0.5 if self.training else 1.0)


class InTrainingOnly(Net):
    def training_step(self, batch: Any) -> Tensor:
        if not self.training:
            raise RuntimeError("no losses in evaluation mode")
        return super().training_step(batch)


class WithGradients(Net):
    """Asks for gradients with respect to its inputs, and changes a parameter that it does not train."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        outputs = self(inputs.clone().requires_grad_())
        (slopes,) = torch.autograd.grad(outputs.sum(), self.embed.weight, create_graph=True)
        with torch.no_grad():
            self.embed.bias += 0
        return (outputs - targets).square().mean() + 1e-3 * slopes.square().mean()


@pytest.mark.parametrize("residual", ["hook", "fold"])
@pytest.mark.parametrize(("make", "name"), [(Scaled, "readout.weight"), (Hooked, "blocks.0.write.weight")])
def test_other_functions_than_the_plans_are_refused(make: type[Net], name: str, residual: Any) -> None:
    with pytest.raises(ValueError, match=rf"{make.__name__} does not compute what its plan says.*{name}"):
        fit(make(**WIDE), MLUCallback(make(), residual=residual))
    fit(make(**WIDE), MLUCallback(make(), residual=residual, verify=False))
    fit(make(), MLUCallback(make(), residual=residual))  # at the base shape, whatever it computes


def test_what_was_trained_or_is_somebodys_own_is_not_compared() -> None:
    module, callback = Hooked(**WIDE), MLUCallback(Net(), init=None)
    fit(module, callback)
    fit(module, callback)


@pytest.mark.parametrize("base", [None, "saved"])
def test_without_a_base_it_says_that_it_did_not_compare(base: Any, tmp_path: Any, caplog: Any) -> None:
    plan = Plan.from_model(Net(**WIDE), next(iter(loader())), base=Net())
    plan.save(tmp_path / "plan.yaml")
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fit(Net(**WIDE), MLUCallback(base and str(tmp_path / "plan.yaml")))
    assert sum("was not compared with a base" in message for message in caplog.messages) == 1


def test_a_step_that_cannot_be_run_in_evaluation_mode_is_named() -> None:
    with pytest.warns(UserWarning, match=r"could not be compared.*RuntimeError: no losses in evaluation mode"):
        fit(InTrainingOnly(**WIDE), MLUCallback(InTrainingOnly()))


@pytest.mark.parametrize("make", [Net, WithGradients, ConstantInTraining])
def test_nothing_is_left_of_it(make: Callable[..., Net]) -> None:
    """The run is that without the comparison, bit for bit, and so is the base."""
    base = make()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    ours, theirs = make(**WIDE), make(**WIDE)
    fit(ours, MLUCallback(base))
    fit(theirs, MLUCallback(make(), verify=False))
    assert ours.losses == theirs.losses
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in before.items())
    assert BATCH and all(parameter.grad is None for parameter in base.parameters())


class Penalized(Net):
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        penalty = sum(block.write.weight.square().sum() for block in self.blocks)
        return super().training_step(batch) + 1e-3 * penalty


@pytest.mark.parametrize("residual", ["hook", "fold"])
def test_weights_with_a_penalty_are_not_folded_and_compared_without_it(residual: Any) -> None:
    callback = MLUCallback(Penalized(), residual=residual, overrides={"blocks.*.write.weight": "branch_out"})
    fit(module := Penalized(**WIDE), callback)
    assert not any("write" in name for name in folded_parameters(module))


@pytest.mark.parametrize(("residual", "everywhere"), [("hook", True), ("fold", True), ("fold", False)])
def test_pruning_of_folded_weights_by_their_size_is_warned_of(residual: Any, everywhere: bool, recwarn: Any) -> None:
    pruning = ModelPruning("l1_unstructured", None, amount=0.1, use_global_unstructured=everywhere, apply_pruning=False)
    fit(Net(**WIDE), pruning, MLUCallback(Net(), residual=residual))
    named = [warning for warning in recwarn if "ModelPruning compares the sizes of weights" in str(warning.message)]
    assert bool(named) == (residual == "fold" and everywhere)
