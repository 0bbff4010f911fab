"""Modules that are copied, stored, moved, frozen or changed in or between fits: the multipliers are in each exactly once."""

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers.faulty_runs import DECAY, LR, At, Storable, check_module, check_optimizer, fit
from helpers.runs_by_hand import BASE, SHAPE, Net
from lightning.pytorch import Callback, Trainer
from torch import nn, optim

from mlu_lightning import MLUCallback, attach_multipliers
from mlu_lightning.application.multipliers import residual_state
from mlu_lightning.application.state_mark import without_mark

COPIES: dict[str, Any] = {"copied": copy.deepcopy, "pickled": lambda module: pickle.loads(pickle.dumps(module))}
both = pytest.mark.parametrize("residual", ["hook", "fold"])


def with_multipliers(residual: Any) -> MLUCallback:
    return MLUCallback(Net(BASE), residual=residual)


@both
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_that_is_made_during_a_fit_is_a_module_of_its_own(how: str, residual: Any) -> None:
    copies: list[Storable] = []

    def duplicate(run: Trainer, module: Storable) -> None:
        module.trainer, before = None, module.trainer
        copies.append(COPIES[how](module))
        module.trainer = before

    module = Storable()
    fit(module, with_multipliers(residual), At("on_train_batch_start", duplicate))
    (other,) = copies
    (optimizer,), _ = other.configure_optimizers()
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in other.parameters()}
    check_optimizer(optimizer)  # and it is plain, although the fit is not over for the copy
    check_module(module, residual)
    vars(other).pop("configure_optimizers", None)  # its own, too
    check_module(other, residual)
    before = module(torch.ones(1, 3))
    fit(other, with_multipliers(residual))
    check_module(other, residual)
    assert torch.equal(module(torch.ones(1, 3)), before)


@both
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_that_is_made_afterwards_has_the_multipliers(how: str, residual: Any) -> None:
    module = Storable()
    fit(module, with_multipliers(residual))
    module.trainer = None
    other = COPIES[how](module)
    check_module(other, residual)
    del module
    fit(other, with_multipliers(residual))
    check_module(other, residual)


@both
def test_a_module_that_is_moved_between_fits(residual: Any) -> None:
    module = Storable()
    fit(module, with_multipliers(residual))
    before = module.state_dict()
    module.double().to("cpu").float()
    check_module(module, residual)
    module.to_empty(device="cpu").load_state_dict(before)
    fit(module, with_multipliers(residual))
    check_module(module, residual)
    fresh = Storable()
    fit(fresh, with_multipliers(residual))
    fresh.load_state_dict({name: value.clone() for name, value in before.items()}, assign=True)
    fit(fresh, with_multipliers(residual))
    check_module(fresh, residual)


@both
def test_a_part_that_is_frozen_during_the_run(residual: Any) -> None:
    """The others go on at their own numbers: the run is that of groups by hand."""
    ours, theirs, mlu = Storable(), Storable(), with_multipliers(residual)
    start: dict[str, Any] = {}

    def freeze() -> Callback:
        return At("on_train_batch_start", lambda run, module: module.blocks[1].requires_grad_(False))

    keep = At("on_train_start", lambda run, module: start.update(copy.deepcopy(without_mark(module.state_dict()))), 0)
    fit(ours, mlu, freeze(), keep)
    theirs.load_state_dict(start)
    state = residual_state(ours)
    assert mlu.plan is not None and state is not None
    scales = mlu.plan.scales("sgd")
    factors = {name: s.folded("sgd") if name in state.folded else s for name, s in scales.items()}
    if residual == "hook":
        attach_multipliers(theirs, mlu.plan)
    groups = []
    for name, p in theirs.named_parameters():
        groups.append({"params": [p], "lr": LR * factors[name].lr, "weight_decay": DECAY * factors[name].weight_decay})
    vars(theirs)["optimizer"] = lambda parameters: optim.SGD(groups, momentum=0.9)
    fit(theirs, freeze())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=1e-5, atol=1e-7)


def test_a_readout_that_is_exchanged_between_fits() -> None:
    module = Storable()
    fit(module, with_multipliers("hook"))
    module.readout = nn.Linear(SHAPE[2], 2)
    message = r"had a multiplier was exchanged.*load new weights into the part that is there"
    with pytest.raises(ValueError, match=message):
        fit(module, with_multipliers("hook"))
