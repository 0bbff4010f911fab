"""Groups in the place of the user's: what an optimizer keeps in them, schedules, checkpoints, copies and removal."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.killed_run import SCHEDULES
from helpers.optimizers_by_hand import Averaging
from helpers.parameter_groups import SGD_LR, SHAPES, Weights, groups_in_update, identical, plan_of, scaled
from helpers.updates import groups_of, train
from torch import optim
from torch.optim import lr_scheduler

from mlu_lightning import scale_optimizer


def test_what_an_optimizer_keeps_in_its_groups_is_kept_for_each_shadow() -> None:
    theirs = Weights()
    ours, optimizer, _ = scaled(Averaging, family="sgd")
    by_hand = Averaging(groups_of(theirs, lambda name: {"lr": 0.1 * SGD_LR[name]}), lr=0.1)
    train(range(3), (ours, optimizer), (theirs, by_hand))
    assert identical(ours, theirs)
    group = optimizer.param_groups[0]
    assert (group["k"], group["lr"], group["lr_max"]) == (3, 0.1 / 8, 0.1 * max(SGD_LR.values()))
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
        train(steps, (module, optimizer))
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
        train(range(3), (module, optimizer))
        if again:
            handle.remove()
            handle.remove()
            if forgetting:
                del optimizer.param_groups[0]["mlu_own"]
            if between == "a plain step":
                train([9], (module, optimizer))
                handle.remove()
            if between == "another plan":
                scale_optimizer(optimizer, module, plan_of(module, identity=True), family="sgd").remove()
            scale_optimizer(optimizer, module, plan_of(module), family="sgd")
        train(range(3, 6), (module, optimizer))

    ours, whole, forgotten = Weights(), Weights(), Weights()
    run(ours, again=True)
    run(whole, again=False)
    run(forgotten, again=True, forgetting=True)
    assert not identical(forgotten, whole)
    assert identical(ours, whole if between == "nothing" else forgotten)


SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = SCHEDULES | {
    "plateau-list": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5, min_lr=[0.02, 0.03]),
    "cyclic": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.2, step_size_up=3),
}
del SCHEDULERS["none"]


@pytest.mark.parametrize("attach", ["before", "after"])
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedule_is_multiplied_exactly(schedule: Callable[[optim.Optimizer], Any], tensor: bool, attach: str) -> None:
    ours, theirs, dummy = Weights(), Weights(), Weights()

    def make(module: Weights) -> optim.Optimizer:
        first, second = [module.embedding, module.branch_in], [module.branch_out, module.norm, module.readout]
        rates = [torch.tensor(lr) if tensor else lr for lr in (0.1, 0.05)]
        groups = [{"params": of, "lr": lr} for of, lr in zip((first, second), rates, strict=True)]
        return optim.SGD(groups, momentum=0.9)

    optimizer, plain = make(ours), make(dummy)
    if attach == "before":
        scale_optimizer(optimizer, ours, plan_of(ours))
    scheduler, reference = schedule(optimizer), schedule(plain)
    if attach == "after":
        scale_optimizer(optimizer, ours, plan_of(ours))
    by_hand = optim.SGD(groups_of(theirs, lambda name: {}), lr=0.1, momentum=0.9)
    for step in range(12):
        assert [float(g["lr"]) for g in optimizer.param_groups] == [float(g["lr"]) for g in plain.param_groups]
        for group, name in zip(by_hand.param_groups, SHAPES, strict=True):
            user = plain.param_groups[0 if name in ("embedding", "branch_in") else 1]
            group.update(lr=user["lr"] * SGD_LR[name], momentum=user["momentum"])
        train([step], (ours, optimizer), (theirs, by_hand))
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
    train([0], (module, optimizer))
    for scheduler in schedulers:
        scheduler.step()


def test_state_goes_to_and_from_plain_runs() -> None:
    module, ours, _ = scaled(optim.AdamW)
    plain = Weights()
    theirs = optim.AdamW(plain.parameters(), lr=0.1)
    train(range(5), (module, ours), (plain, theirs))
    state, plain_state = copy.deepcopy(ours.state_dict()), copy.deepcopy(theirs.state_dict())
    assert state["param_groups"] == plain_state["param_groups"]
    resumed, from_plain = copy.deepcopy(module), copy.deepcopy(plain)
    again, plain_again = (optim.AdamW(each.parameters(), lr=0.7) for each in (resumed, from_plain))
    scale_optimizer(again, resumed, plan_of(resumed))
    again.load_state_dict(state)
    scale_optimizer(plain_again, from_plain, plan_of(from_plain)).remove()
    plain_again.load_state_dict(plain_state)
    train(range(5, 10), (resumed, again), (from_plain, plain_again), (module, ours), (plain, theirs))
    assert identical(resumed, module)
    assert identical(from_plain, plain)
    for each, foreign in ((plain, state), (module, plain_state)):
        crossed = optim.AdamW(each.parameters(), lr=0.7)
        if each is module:
            scale_optimizer(crossed, module, plan_of(module))
        crossed.load_state_dict(foreign)
        assert crossed.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("make", [optim.SGD, Averaging])
@pytest.mark.parametrize("when", ["before", "after"])
def test_state_dict_in_the_update_holds_the_users_groups(when: str, make: Callable[..., optim.Optimizer]) -> None:
    ours, theirs = Weights(), Weights()
    states: list[Any] = []

    def save(opt: optim.Optimizer, *_: Any) -> None:
        states.append(copy.deepcopy(opt.state_dict()))

    final = []
    for module, saved in ((ours, True), (theirs, False)):
        optimizer = make(module.parameters(), lr=0.1)
        if saved:
            (optimizer.register_step_pre_hook if when == "before" else optimizer.register_step_post_hook)(save)
        seen = groups_in_update(optimizer)
        scale_optimizer(optimizer, module, plan_of(module), "sgd" if make is Averaging else None)
        for step in range(3):
            train([step], (module, optimizer))
            assert len(optimizer.param_groups) == 1
        assert {len(groups) for groups in seen} == {len(set(SGD_LR.values()))}
        final.append(copy.deepcopy(optimizer.state_dict()["param_groups"]))
    assert identical(ours, theirs)
    assert final[0] == final[1]
    halved = [0.1 / 2 ** (step + (when == "after")) if make is Averaging else 0.1 for step in range(3)]
    assert [[group["lr"] for group in state["param_groups"]] for state in states] == [[lr] for lr in halved]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_copies_are_plain(duplicate: Callable[[optim.Optimizer], optim.Optimizer]) -> None:
    plain = Weights()
    _, optimizer, _ = scaled()
    lr_scheduler.StepLR(optimizer, 5)
    twin = duplicate(optimizer)
    train([0], (plain, optim.SGD(plain.parameters(), lr=0.1)))
    parameters = twin.param_groups[0]["params"]
    for parameter, other in zip(parameters, plain.parameters(), strict=True):
        parameter.grad = other.grad
    twin.step()
    assert all(map(torch.equal, parameters, plain.parameters()))


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
    train([0], (ours, optimizer), (plain, reference))
    assert identical(ours, plain)
    assert scheduled == "after" or vars(optimizer).get("step") is present
    scale_optimizer(optimizer, ours, plan_of(ours))
    before = ours.branch_in.detach().clone()
    optimizer.step()
    expected = before - ours.branch_in.grad * (0.1 * SGD_LR["branch_in"])
    torch.testing.assert_close(ours.branch_in.detach(), expected)  # float32: one fused operation against two


def test_groups_stay_until_the_users_change() -> None:
    weights, optimizer, _ = scaled()
    seen: list[Any] = []
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append([*opt.param_groups]))
    for step, lr in enumerate((0.1, 0.1, 0.2)):
        optimizer.param_groups[0]["lr"] = lr
        train(range(step, step + 1), (weights, optimizer))
    assert [*map(id, seen[0])] == [*map(id, seen[1])] and not {*map(id, seen[1])} & {*map(id, seen[2])}
