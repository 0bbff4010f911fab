"""Groups in the place of the user's: what an optimizer keeps in them, schedules, checkpoints, copies and removal."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.optimizers_by_hand import Averaging
from helpers.parameter_groups import SGD_LR, SHAPES, Weights, groups_in_update, identical, plan_of, scaled
from torch import optim
from torch.optim import lr_scheduler

from mlu_lightning.application.optimization import scale_optimizer


def test_what_an_optimizer_keeps_in_its_groups_is_kept_for_each_shadow() -> None:
    theirs = Weights()
    ours, optimizer, _ = scaled(Averaging, family="sgd")
    groups = [{"params": [parameter]} for parameter in theirs.parameters()]
    by_hand = Averaging(groups, lr=0.1)
    for group, name in zip(by_hand.param_groups, SHAPES, strict=True):
        group["lr"] *= SGD_LR[name]
    for step in range(3):
        ours.load_gradients(step)
        theirs.load_gradients(step)
        optimizer.step()
        by_hand.step()
    assert identical(ours, theirs)
    group = optimizer.param_groups[0]
    assert group["k"] == 3
    assert group["lr"] == 0.1 / 8
    assert group["lr_max"] == 0.1 * max(SGD_LR.values())
    assert optimizer.state_dict()["param_groups"][0]["k"] == 3


@pytest.mark.parametrize("removed", [False, True])
def test_what_an_optimizer_keeps_in_its_groups_is_saved_for_each_shadow(removed: bool) -> None:
    """A resumed run is the whole run; after plain steps what shadows had does not count any more."""

    def run(module: Weights, steps: range, state: Any = None, scaled: bool = True) -> Any:
        optimizer = Averaging(module.parameters(), lr=0.1)
        if scaled:
            handle = scale_optimizer(optimizer, module, plan_of(module), family="sgd")
        if state is not None:
            optimizer.load_state_dict(state)
        for step in steps:
            module.load_gradients(step)
            optimizer.step()
        if scaled and removed:
            handle.remove()
        return copy.deepcopy(optimizer.state_dict())

    whole, resumed, plain, forgotten = Weights(), Weights(), Weights(), Weights()
    run(whole, range(6))
    state = run(resumed, range(3))
    for module in (plain, forgotten):
        module.load_state_dict(resumed.state_dict())
    run(resumed, range(3, 6), state)
    assert identical(whole, resumed)
    state = run(plain, range(3, 4), state, scaled=False)
    forgotten.load_state_dict(plain.state_dict())
    run(plain, range(4, 6), state)
    assert state["param_groups"][0].pop("mlu_own")
    run(forgotten, range(4, 6), state)
    assert identical(plain, forgotten)
    assert not identical(plain, whole)


@pytest.mark.parametrize("between", ["nothing", "a plain step", "another plan"])
def test_what_an_optimizer_keeps_in_its_groups_where_it_is_scaled_again(between: str) -> None:
    """It goes on as if it had been scaled all the time, unless it was not."""

    def run(module: Weights, again: bool, forgetting: bool = False) -> None:
        optimizer = Averaging(module.parameters(), lr=0.1)
        handle = scale_optimizer(optimizer, module, plan_of(module), family="sgd")
        for step in range(6):
            if step == 3 and again:
                handle.remove()
                handle.remove()
                if forgetting:
                    del optimizer.param_groups[0]["mlu_own"]
                if between == "a plain step":
                    module.load_gradients(9)
                    optimizer.step()
                    handle.remove()
                if between == "another plan":
                    scale_optimizer(optimizer, module, plan_of(module, identity=True), family="sgd").remove()
                handle = scale_optimizer(optimizer, module, plan_of(module), family="sgd")
            module.load_gradients(step)
            optimizer.step()

    ours, whole, forgotten = Weights(), Weights(), Weights()
    run(ours, again=True)
    run(whole, again=False)
    run(forgotten, again=True, forgetting=True)
    assert not identical(forgotten, whole)
    assert identical(ours, whole if between == "nothing" else forgotten)


# Schedulers


def warm_then_cosine(optimizer: optim.Optimizer) -> lr_scheduler.LRScheduler:
    warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, 5, eta_min=0.01)
    return lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[3])


SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "one-cycle": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.2, total_steps=12),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 8, eta_min=0.03),
    "warm-restarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 4, eta_min=0.03),
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "lambda-list": lambda opt: lr_scheduler.LambdaLR(opt, [lambda step: 1 / (1 + step), lambda step: 0.9**step]),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5, min_lr=0.02),
    "plateau-list": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5, min_lr=[0.02, 0.03]),
    "cyclic": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.2, step_size_up=3),
    "sequential": warm_then_cosine,
    "linear": lambda opt: lr_scheduler.LinearLR(opt, 0.1, total_iters=5),
}


@pytest.mark.parametrize("attach", ["before", "after"])
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedule_is_multiplied_exactly(schedule: Callable[[optim.Optimizer], Any], tensor: bool, attach: str) -> None:
    ours, theirs, dummy = Weights(), Weights(), Weights()

    def make(module: Weights) -> optim.Optimizer:
        first, second = [module.embedding, module.branch_in], [module.branch_out, module.norm, module.readout]
        groups = [{"params": first, "lr": 0.1}, {"params": second, "lr": 0.05}]
        for group in groups:
            group["lr"] = torch.tensor(group["lr"]) if tensor else group["lr"]
        return optim.SGD(groups, momentum=0.9)

    optimizer, plain = make(ours), make(dummy)
    if attach == "before":
        scale_optimizer(optimizer, ours, plan_of(ours))
    scheduler, reference = schedule(optimizer), schedule(plain)
    if attach == "after":
        scale_optimizer(optimizer, ours, plan_of(ours))
    by_hand = optim.SGD([{"params": [p]} for p in theirs.parameters()], lr=0.1, momentum=0.9)
    for step in range(12):
        assert [float(g["lr"]) for g in optimizer.param_groups] == [float(g["lr"]) for g in plain.param_groups]
        for group, name in zip(by_hand.param_groups, SHAPES, strict=True):
            user = plain.param_groups[0 if name in ("embedding", "branch_in") else 1]
            group.update(lr=user["lr"] * SGD_LR[name], momentum=user["momentum"])
        for module in (ours, theirs):
            module.load_gradients(step)
        optimizer.step()
        by_hand.step()
        plain.step()
        metric = [1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []
        scheduler.step(*metric)
        reference.step(*metric)
    assert identical(ours, theirs)


@pytest.mark.parametrize("attach", ["before", "after"])
@pytest.mark.filterwarnings("error")
def test_schedulers_still_see_that_the_optimizer_steps(attach: str) -> None:
    module = Weights()
    optimizer = optim.SGD(module.parameters(), lr=0.1)
    if attach == "before":
        scale_optimizer(optimizer, module, plan_of(module))
    schedulers = [lr_scheduler.ExponentialLR(optimizer, 0.9), lr_scheduler.LinearLR(optimizer)]
    if attach == "after":
        scale_optimizer(optimizer, module, plan_of(module))
    schedulers.append(lr_scheduler.StepLR(optimizer, 1))
    module.load_gradients(0)
    optimizer.step()
    for scheduler in schedulers:
        scheduler.step()


# State


def test_state_goes_to_and_from_plain_runs() -> None:
    """A checkpoint of either run loads into the other, and resuming is the uninterrupted run."""

    def run(module: Weights, optimizer: optim.Optimizer, steps: range) -> None:
        for step in steps:
            module.load_gradients(step)
            optimizer.step()

    module, ours, _ = scaled(optim.AdamW)
    plain = Weights()
    theirs = optim.AdamW(plain.parameters(), lr=0.1)
    run(module, ours, range(5))
    run(plain, theirs, range(5))
    state, plain_state = copy.deepcopy(ours.state_dict()), copy.deepcopy(theirs.state_dict())
    assert state["param_groups"] == plain_state["param_groups"]

    resumed = copy.deepcopy(module)
    optimizer = optim.AdamW(resumed.parameters(), lr=0.7)
    scale_optimizer(optimizer, resumed, plan_of(resumed))
    optimizer.load_state_dict(state)
    run(resumed, optimizer, range(5, 10))
    from_plain = copy.deepcopy(plain)
    optimizer = optim.AdamW(from_plain.parameters(), lr=0.7)
    scale_optimizer(optimizer, from_plain, plan_of(from_plain)).remove()
    optimizer.load_state_dict(plain_state)
    run(from_plain, optimizer, range(5, 10))
    run(module, ours, range(5, 10))
    run(plain, theirs, range(5, 10))
    assert identical(resumed, module)
    assert identical(from_plain, plain)

    crossed = optim.AdamW(plain.parameters(), lr=0.7)
    crossed.load_state_dict(state)
    assert crossed.param_groups[0]["lr"] == 0.1
    crossed = optim.AdamW(module.parameters(), lr=0.7)
    scale_optimizer(crossed, module, plan_of(module))
    crossed.load_state_dict(plain_state)
    assert crossed.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("make", [optim.SGD, Averaging])
@pytest.mark.parametrize("when", ["before", "after"])
def test_state_dict_in_the_update_holds_the_users_groups(when: str, make: Callable[..., optim.Optimizer]) -> None:
    """And the update is the same as without it."""
    ours, theirs = Weights(), Weights()
    states: list[Any] = []

    def save(opt: optim.Optimizer, args: Any, kwargs: Any) -> None:
        states.append(copy.deepcopy(opt.state_dict()))

    final = []
    for module, saved in ((ours, True), (theirs, False)):
        optimizer = make(module.parameters(), lr=0.1)
        if saved and when == "before":
            optimizer.register_step_pre_hook(save)
        if saved and when == "after":
            optimizer.register_step_post_hook(save)
        seen = groups_in_update(optimizer)
        family = "sgd" if make is Averaging else None
        scale_optimizer(optimizer, module, plan_of(module), family)
        for step in range(3):
            module.load_gradients(step)
            optimizer.step()
            assert len(optimizer.param_groups) == 1
        assert {len(groups) for groups in seen} == {len(set(SGD_LR.values()))}
        final.append(copy.deepcopy(optimizer.state_dict()["param_groups"]))
    assert identical(ours, theirs)
    assert final[0] == final[1]
    assert [len(state["param_groups"]) for state in states] == [1, 1, 1]
    halved = [0.1 / 2 ** (step + (when == "after")) if make is Averaging else 0.1 for step in range(3)]
    assert [state["param_groups"][0]["lr"] for state in states] == halved


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_copies_are_plain(duplicate: Callable[[optim.Optimizer], optim.Optimizer]) -> None:
    plain = Weights()
    _, optimizer, _ = scaled()
    lr_scheduler.StepLR(optimizer, 5)
    twin = duplicate(optimizer)
    reference = optim.SGD(plain.parameters(), lr=0.1)
    plain.load_gradients(0)
    reference.step()
    parameters = twin.param_groups[0]["params"]
    for parameter, other in zip(parameters, plain.parameters(), strict=True):
        parameter.grad = other.grad
    twin.step()
    assert all(torch.equal(one, other) for one, other in zip(parameters, plain.parameters(), strict=True))


@pytest.mark.parametrize("scheduled", ["never", "before", "after"])
def test_removed_handle_leaves_a_plain_optimizer(scheduled: str) -> None:
    ours, plain = Weights(), Weights()
    optimizer, reference = optim.SGD(ours.parameters(), lr=0.1), optim.SGD(plain.parameters(), lr=0.1)
    if scheduled == "before":
        lr_scheduler.StepLR(optimizer, 5)
    present = vars(optimizer).get("step")
    handle = scale_optimizer(optimizer, ours, plan_of(ours))
    if scheduled == "after":
        lr_scheduler.StepLR(optimizer, 5)
    handle.remove()
    handle.remove()
    for module, opt in ((ours, optimizer), (plain, reference)):
        module.load_gradients(0)
        opt.step()
    assert identical(ours, plain)
    if scheduled != "after":
        assert vars(optimizer).get("step") is present

    scale_optimizer(optimizer, ours, plan_of(ours))
    before = ours.branch_in.detach().clone()
    optimizer.step()
    expected = before - ours.branch_in.grad * (0.1 * SGD_LR["branch_in"])
    torch.testing.assert_close(ours.branch_in.detach(), expected)  # float32: one fused operation against two
