"""MLUCallback in the Trainer: at the base shape it changes nothing, at another it calls the functions of the package."""

import inspect
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.callback_runs import BATCH, MODULES, WIDE, Net, fit, identical, loader, trainer
from torch import nn, optim
from torch.utils.data import DataLoader

from mlu_lightning import MLUCallback, Plan, attach_multipliers, fold, initialize
from mlu_lightning.application import residual_state
from mlu_lightning.planning.arguments import PlanArguments


@pytest.fixture
def plan() -> Plan:
    return Plan.from_model(Net(**WIDE), next(iter(loader())), base=Net())


@pytest.mark.parametrize("residual", ["hook", "fold"])
@pytest.mark.parametrize("make", MODULES)
def test_run_at_the_base_shape_is_the_run_without_the_callback(
    make: type[Net], residual: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of the random numbers of torch, NumPy and Python."""
    monkeypatch.setattr(Net, "noise", lambda self: torch.rand(()) + np.random.rand() + random.random())
    runs = []
    for callbacks in ([], [MLUCallback(Net(), residual=residual)]):
        module, generator = make(), torch.Generator().manual_seed(5)
        fit(module, *callbacks, data=DataLoader(loader().dataset, BATCH, shuffle=True, generator=generator))
        drawn = torch.tensor([np.random.rand(), random.random()], dtype=torch.float64)
        states = torch.get_rng_state(), generator.get_state(), drawn
        runs.append((module, states))
    (ours, states), (theirs, others) = runs
    assert identical(ours, theirs) and all(map(torch.equal, states, others)) and ours.losses == theirs.losses
    assert len(ours.losses) == 8


@pytest.mark.parametrize("residual", ["hook", "fold"])
@pytest.mark.parametrize("make", MODULES)
def test_run_is_that_of_the_functions_called_by_hand(make: type[Net], residual: Any, plan: Plan) -> None:
    ours, theirs = make(**WIDE), Net(**WIDE)
    callback = MLUCallback(Net(), residual=residual, seed=4, init="normal")
    fit(ours, callback)
    initialize(theirs, plan, "normal", seed=4)
    (attach_multipliers if residual == "hook" else fold)(theirs, plan)
    state = residual_state(theirs)
    scales = plan.scales("adamw")
    scales = {name: scale.folded("adamw") if name in state.folded else scale for name, scale in scales.items()}

    def by_hand(module: nn.Module) -> Any:
        pairs = [(parameter, scales[name]) for name, parameter in module.named_parameters()]
        groups = [{"params": [p], "eps": 1e-8 * s.eps, "weight_decay": 0.1 * s.weight_decay} for p, s in pairs]
        optimizer = optim.AdamW(groups, lr=0.02)
        rates = [0.05 * scale.lr for _, scale in pairs]
        schedule = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=16)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    theirs.optimizers_of = by_hand
    fit(theirs)
    assert callback.plan == plan and not identical(ours, Net(**WIDE))
    for name, parameter in theirs.named_parameters():
        # the schedule interpolates between learning rates before or after they are multiplied
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=1e-4, atol=1e-6)


def test_weights_that_are_folded_already_take_the_numbers_of_fold(plan: Plan) -> None:
    fresh, folded = Net(**WIDE), Net(**WIDE)
    folded.load_state_dict(fold(initialize(Net(**WIDE), plan), plan).state_dict())
    fit(fresh, MLUCallback(plan=plan, residual="fold"))
    fit(fold(folded, plan, multiplied=True), MLUCallback(Net(), residual="fold", init=None))
    assert identical(fresh, folded) and fresh.losses == folded.losses


@pytest.mark.parametrize("init", [{}, {"init": None}], ids=["rescale", "none"])
def test_init_none_leaves_the_weights(init: dict[str, Any]) -> None:
    module = Net(**WIDE, optimizers=lambda module: None)
    fit(module, MLUCallback(Net(), residual="hook", **init))
    assert identical(module, Net(**WIDE)) == ("init" in init)


def test_frozen_parameters_are_planned_and_left_alone() -> None:
    module = Net(**WIDE)
    module.embed.requires_grad_(False)
    callback = MLUCallback(Net())
    fit(module, callback)
    assert callback.plan is not None and callback.plan.roles["embed.weight"] == "embedding"
    start = initialize(Net(**WIDE), callback.plan)
    assert torch.equal(module.embed.weight, Net(**WIDE).embed.weight)  # as built
    assert not torch.equal(module.readout.weight, start.readout.weight)


def test_warnings_of_the_plan_are_given(plan: Plan) -> None:
    with pytest.warns(UserWarning, match="heads have grown"):
        fit(Net(**WIDE), MLUCallback(plan=replace(plan, warnings=("heads have grown",))))


def test_a_shape_far_from_its_limit_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"4 times as much to the stream .*: grow hidden width or depth along with"):
        fit(Net(embedding=16 * Net().embed.out_features), MLUCallback(Net()))


def test_processes_that_send_only_weights_back_are_warned_about() -> None:
    callback, module = MLUCallback(Net(), example=next(iter(loader()))), Net(**WIDE)
    run = trainer(callback, strategy="ddp_spawn", devices=1)
    with pytest.warns(UserWarning, match=r"only weights come back.* Go on from a checkpoint"):
        callback.setup(run, module, "fit")
    hooked = MLUCallback(Net(), example=next(iter(loader())), residual="hook")
    with pytest.raises(
        ValueError, match=r'without the multipliers that stay in hooks.* Use strategy="ddp", or residual="f'
    ):
        hooked.setup(trainer(hooked, strategy="ddp_spawn", devices=1), Net(**WIDE), "fit")


def test_overrides_reach_the_plan() -> None:
    callback = MLUCallback(Net(), overrides={"blocks.*.read.weight": "branch_hidden"})
    fit(Net(**WIDE), callback)
    assert callback.plan is not None and callback.plan.roles["blocks.3.read.weight"] == "branch_hidden"


TOGETHER = "cannot be given together with base, overrides, alpha"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "xavier"}, "init='xavier' is none of: rescale, normal, coupled, None"),
        ({"residual": "scale"}, "residual='scale' is none of: hook, fold"),
        *(({"plan": "p.yaml", **more}, TOGETHER) for more in ({"base": "b.yaml"}, {"overrides": {}}, {"alpha": 2.0})),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLUCallback(**arguments)


def test_planning_arguments_are_those_of_from_model() -> None:
    for function in (Plan.from_model, MLUCallback):
        found = inspect.signature(function).parameters
        assert {name: found[name].default for name in vars(PlanArguments())} == vars(PlanArguments())


class Other(MLUCallback): ...


@pytest.mark.parametrize(
    ("shape", "others", "message"),
    [(WIDE, [Other(Net())], r"several MLUCallbacks.*Keep one"), ({}, [], "The plan was not made for this Net")],
    ids=["another callback", "plan of another module"],
)
def test_refused_modules_are_left_as_they_were(shape: dict[str, int], others: Any, message: str, plan: Plan) -> None:
    module = Net(**shape)
    with pytest.raises(ValueError, match=message):
        fit(module, MLUCallback(plan=plan), *others)
    assert identical(module, Net(**shape))
