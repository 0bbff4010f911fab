"""scale_optimizer's shadow groups: schedules, state, closures, errors, wrappers."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.optimizers_by_hand import Averaging
from helpers.parameter_groups import (
    ADAM_LR,
    EPS,
    MATRICES,
    MULTIPLIERS,
    ROLES,
    SGD_LR,
    SHAPES,
    D,
    L,
    Numbers,
    Weights,
    groups_in_update,
    identical,
    numbers_in_update,
    plan_of,
)
from helpers.plans import entry
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn, optim
from torch.nn.utils import prune
from torch.optim import lr_scheduler

from mlu_lightning import Plan
from mlu_lightning.application.multipliers import attach_multipliers, fold
from mlu_lightning.application.optimization import scale_optimizer
from mlu_lightning.discovery.structure import Site
from mlu_lightning.planning import Multiplier
from mlu_lightning.table import Ratios

# Multipliers: numbers for the stored weights


class Forward(nn.Module):
    """A module for hooks: two branches' worth of places."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = Weights()
        self.branch, self.head = nn.Identity(), nn.Identity()


def multipliers(prefix: str = "weights.") -> tuple[Multiplier, ...]:
    return (
        Multiplier("branch", "branch", 1 / L, Site("branch"), (f"{prefix}branch_out",)),
        Multiplier("head", "readout", 1 / D, Site("head"), (f"{prefix}readout",)),
    )


def forward_plan(module: Forward) -> Plan:
    parameters = plan_of(module.weights).parameters
    return Plan({f"weights.{name}": value for name, value in parameters.items()}, (), (), multipliers())


@pytest.mark.parametrize(
    ("make", "in_gradient", "lr_power"),
    [(optim.SGD, True, 2), (optim.Adam, True, 1), (optim.AdamW, False, 1)],
)
def test_folded_weights_have_the_numbers_of_the_effective_weight(
    make: Callable[..., optim.Optimizer], in_gradient: bool, lr_power: int
) -> None:
    """Theory.md, section 3: lr·a² and decay/a² for SGD; Adam lr·a, eps/a, L2 decay/a², decoupled decay/a."""
    attached, folded = Forward(), Forward()
    plan = forward_plan(attached)
    attach_multipliers(attached, plan)
    fold(folded, plan)
    numbers = []
    for module in (attached, folded):
        optimizer = make(module.parameters(), lr=0.1, weight_decay=0.1)
        seen = groups_in_update(optimizer)
        scale_optimizer(optimizer, module, plan)
        module.weights.load_gradients(0)
        optimizer.step()
        numbers.append(seen[-1])
    for key, power in {"lr": lr_power, "eps": -1, "weight_decay": -2 if in_gradient else -1}.items():
        if key not in numbers[0][0]:
            continue
        one, other = numbers_in_update(attached, numbers[0], key), numbers_in_update(folded, numbers[1], key)
        for name in SHAPES:
            expected = one[f"weights.{name}"] * MULTIPLIERS.get(name, 1) ** power
            assert other[f"weights.{name}"] == expected, (key, name)


def test_multipliers_that_are_not_in_effect_are_refused() -> None:
    module = Forward()
    plan = forward_plan(module)
    optimizer = optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"multipliers, and they are not in effect.*attach_multipliers\(module, plan\)"
    ):
        scale_optimizer(optimizer, module, plan)
    attach_multipliers(module, plan)
    other = Plan(plan.parameters, (), (), plan.multipliers, alpha=2.0)
    with pytest.raises(ValueError, match="the multipliers of another plan"):
        scale_optimizer(optimizer, module, other)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert "step" not in vars(optimizer)


# Groups


def test_one_shadow_group_for_each_distinct_set_of_factors_and_group() -> None:
    module = Weights()
    for index in range(10):
        module.register_parameter(f"norm{index}", nn.Parameter(torch.zeros(8)))
    ratios = {f"norm{index}": entry(*ROLES["norm"][:1], (8,), Ratios(L, outputs=D)) for index in range(10)}
    plan = Plan({**plan_of(Weights()).parameters, **ratios}, (), (), ())
    optimizer = optim.AdamW(
        [
            {"params": [module.get_parameter(name) for name in SHAPES], "lr": 0.1},
            {"params": [module.get_parameter(name) for name in ratios], "lr": 0.2},
        ]
    )
    seen = groups_in_update(optimizer)
    scale_optimizer(optimizer, module, plan)
    module.load_gradients(0)
    optimizer.step()
    # embedding and readout share theirs
    assert [len(group["params"]) for group in seen[-1]] == [2, 1, 1, 1, 10]
    assert seen[-1][-1]["lr"] == 0.2
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_groups_added_later_are_scaled() -> None:
    ours, theirs = Weights(), Weights()
    for module, late in ((ours, True), (theirs, False)):
        optimizer = optim.SGD([module.embedding, module.branch_in], lr=0.1, momentum=0.9)
        rest = {"params": [module.branch_out, module.norm], "lr": 0.3}
        if not late:
            optimizer.add_param_group(rest)
        scale_optimizer(optimizer, module, plan_of(module))
        if late:
            optimizer.add_param_group(rest)
        for step in range(3):
            module.load_gradients(step)
            optimizer.step()
        assert len(optimizer.param_groups) == 2
    assert identical(ours, theirs)
    assert not torch.equal(ours.branch_out, Weights().branch_out)


def test_parameters_changed_in_a_group_are_found() -> None:
    module = Weights()
    optimizer = optim.SGD([module.embedding], lr=0.1)
    seen = groups_in_update(optimizer)
    scale_optimizer(optimizer, module, plan_of(module))
    optimizer.param_groups[0]["params"][0] = module.branch_in
    module.load_gradients(0)
    optimizer.step()
    assert numbers_in_update(module, seen[-1], "lr") == {"branch_in": 0.1 * SGD_LR["branch_in"]}


def test_numbers_changed_in_the_groups_are_taken_over() -> None:
    ours, theirs = Weights(), Weights()
    optimizer = optim.AdamW(ours.parameters(), lr=0.1)
    seen = groups_in_update(optimizer)
    scale_optimizer(optimizer, ours, plan_of(theirs))
    ours.load_gradients(0)
    optimizer.step()
    optimizer.param_groups[0].update(lr=0.3, betas=(0.5, 0.6), weight_decay=0.7, maximize=True, note="new")
    optimizer.step()
    assert {(group["betas"], group["maximize"], group["note"]) for group in seen[-1]} == {((0.5, 0.6), True, "new")}
    assert numbers_in_update(ours, seen[-1], "lr") == {name: 0.3 * factor for name, factor in ADAM_LR.items()}
    assert numbers_in_update(ours, seen[-1], "weight_decay") == {name: 0.7 / by for name, by in ADAM_LR.items()}


def test_named_parameters_keep_their_names() -> None:
    module = Weights()
    optimizer = optim.SGD(module.named_parameters(), lr=0.1)
    scale_optimizer(optimizer, module, plan_of(module))
    module.load_gradients(0)
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == list(SHAPES)


def test_what_an_optimizer_keeps_in_its_groups_is_kept_for_each_shadow() -> None:
    ours, theirs = Weights(), Weights()
    optimizer = Averaging(ours.parameters(), lr=0.1)
    scale_optimizer(optimizer, ours, plan_of(ours), family="sgd")
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

    scaled, plain = Weights(), Weights()
    ours, theirs = optim.AdamW(scaled.parameters(), lr=0.1), optim.AdamW(plain.parameters(), lr=0.1)
    scale_optimizer(ours, scaled, plan_of(scaled))
    run(scaled, ours, range(5))
    run(plain, theirs, range(5))
    state, plain_state = copy.deepcopy(ours.state_dict()), copy.deepcopy(theirs.state_dict())
    assert state["param_groups"] == plain_state["param_groups"]

    resumed = copy.deepcopy(scaled)
    optimizer = optim.AdamW(resumed.parameters(), lr=0.7)
    scale_optimizer(optimizer, resumed, plan_of(resumed))
    optimizer.load_state_dict(state)
    run(resumed, optimizer, range(5, 10))
    from_plain = copy.deepcopy(plain)
    optimizer = optim.AdamW(from_plain.parameters(), lr=0.7)
    scale_optimizer(optimizer, from_plain, plan_of(from_plain)).remove()
    optimizer.load_state_dict(plain_state)
    run(from_plain, optimizer, range(5, 10))
    run(scaled, ours, range(5, 10))
    run(plain, theirs, range(5, 10))
    assert identical(resumed, scaled)
    assert identical(from_plain, plain)

    crossed = optim.AdamW(plain.parameters(), lr=0.7)
    crossed.load_state_dict(state)
    assert crossed.param_groups[0]["lr"] == 0.1
    crossed = optim.AdamW(scaled.parameters(), lr=0.7)
    scale_optimizer(crossed, scaled, plan_of(scaled))
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
    module, plain = Weights(), Weights()
    optimizer = optim.SGD(module.parameters(), lr=0.1)
    scale_optimizer(optimizer, module, plan_of(module))
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


# Closures and errors in them


@pytest.mark.parametrize("by_name", [False, True])
def test_closure_sees_the_users_groups(by_name: bool) -> None:
    module = Weights()
    optimizer = optim.SGD(module.parameters(), lr=0.1)
    groups = optimizer.param_groups
    inside: list[list[Numbers]] = []
    seen = groups_in_update(optimizer)
    scale_optimizer(optimizer, module, plan_of(module))

    def closure() -> float:
        module.load_gradients(0)
        inside.append([*optimizer.param_groups])
        optimizer.param_groups[0]["lr"] = 0.2
        return 3.0

    assert (optimizer.step(closure=closure) if by_name else optimizer.step(closure)) == 3.0
    assert inside[0][0] is optimizer.param_groups[0]
    assert numbers_in_update(module, seen[-1], "lr") == {name: 0.2 * factor for name, factor in SGD_LR.items()}
    assert optimizer.param_groups is groups
    assert [group["lr"] for group in groups] == [0.2]


class Lookahead(optim.SGD):
    """Calls its closure twice, and updates after each."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        assert closure is not None
        super().step(closure)
        return super().step(closure)


def test_closure_that_is_called_twice() -> None:
    module = Weights()
    optimizer = Lookahead(module.parameters(), lr=0.1)
    inside: list[int] = []
    seen = groups_in_update(optimizer)
    scale_optimizer(optimizer, module, plan_of(module), family="sgd")

    def closure() -> float:
        module.load_gradients(0)
        inside.append(len(optimizer.param_groups))
        return 0.0

    optimizer.step(closure)
    assert inside == [1, 1]
    assert {len(groups) for groups in seen} == {len(set(SGD_LR.values()))}


def test_error_in_the_closure_leaves_the_users_groups() -> None:
    module = Weights()
    optimizer = optim.SGD(module.parameters(), lr=0.1)
    group = optimizer.param_groups[0]
    scale_optimizer(optimizer, module, plan_of(module))

    def closure() -> float:
        raise KeyError("forward")

    with pytest.raises(KeyError, match="forward"):
        optimizer.step(closure)
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0] is group


def test_error_in_the_update_leaves_the_users_groups() -> None:
    module = Weights()
    optimizer = optim.Adam(module.parameters(), lr=0.1)
    group = optimizer.param_groups[0]
    scale_optimizer(optimizer, module, plan_of(module))
    module.load_gradients(0, sparse=True)
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0] is group


def test_gradient_scaler_finds_what_it_looks_for() -> None:
    """torch.amp reads the signature of step, also through the wrapper."""
    module = Weights()
    optimizer = optim.AdamW(module.parameters(), lr=0.1, fused=True)
    scale_optimizer(optimizer, module, plan_of(module))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    reference = Weights()
    plain = optim.AdamW(reference.parameters(), lr=0.1, fused=True)
    scale_optimizer(plain, reference, plan_of(reference))
    module.load_gradients(0)
    for parameter in module.parameters():
        parameter.grad = parameter.grad * 8
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    reference.load_gradients(0)
    plain.step()
    assert identical(module, reference)


# Wrappers of optimizers


def test_lightning_wrapper_stands_for_its_optimizer() -> None:
    module = Weights()
    optimizer = optim.SGD(module.parameters(), lr=0.1)
    handle = scale_optimizer(LightningOptimizer(optimizer), module, plan_of(module))
    assert handle.optimizer is optimizer


def test_zero_redundancy_optimizer_is_scaled_inside(tmp_path: Any) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # slow to import, and warns

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ours, theirs = Weights(), Weights()
        zero = ZeroRedundancyOptimizer(ours.parameters(), optim.AdamW, lr=0.1, eps=0.01)
        handle = scale_optimizer(zero, ours, plan_of(ours))
        assert handle.optimizer is zero.optim
        zero.param_groups[0]["lr"] = 0.2
        ours.load_gradients(0)
        zero.step()
    finally:
        torch.distributed.destroy_process_group()
    plain = optim.AdamW([{"params": [parameter]} for parameter in theirs.parameters()])
    for group, name in zip(plain.param_groups, SHAPES, strict=True):
        group.update(lr=0.2 * ADAM_LR[name], eps=0.01 * EPS[name], weight_decay=0.01 / ADAM_LR[name])
    theirs.load_gradients(0)
    plain.step()
    assert identical(ours, theirs)


# Refusals


def test_parameter_of_another_module_is_refused() -> None:
    module = Weights()
    optimizer = optim.SGD([*module.parameters(), nn.Parameter(torch.ones(3, 4))], lr=0.1)
    message = r"shape \[3, 4\] in group 0 .* not a parameter of the module.*use_orig_params=True.*DeepSpeed ZeRO"
    with pytest.raises(ValueError, match=message):
        scale_optimizer(optimizer, module, plan_of(module))
    assert "step" not in vars(optimizer)


def test_flattened_parameter_is_refused() -> None:
    module = nn.Module()
    module._fsdp_wrapped_module = nn.Module()
    module._fsdp_wrapped_module._flat_param = nn.Parameter(torch.ones(300))
    optimizer = optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"The parameter _flat_param in group 0 .*use_orig_params=True"):
        scale_optimizer(optimizer, module, plan_of(Weights()))


def test_names_inside_fsdp_are_those_of_the_plan() -> None:
    module = nn.Module()
    module._fsdp_wrapped_module = weights = Weights()
    optimizer = optim.SGD(module.parameters(), lr=0.1)
    seen = groups_in_update(optimizer)
    scale_optimizer(optimizer, module, plan_of(weights))
    weights.load_gradients(0)
    optimizer.step()
    assert numbers_in_update(weights, seen[-1], "lr") == {name: 0.1 * factor for name, factor in SGD_LR.items()}


@pytest.mark.parametrize("names", ["before", "after"])
def test_names_of_pruned_parameters_are_those_of_the_plan(names: str) -> None:
    """Of the module before it was pruned, or after."""
    module = Weights()
    plan = plan_of(module)
    if names == "after":
        plan = Plan({f"{name}_orig": value for name, value in plan.parameters.items()}, (), (), ())
    else:
        optimizer = optim.SGD([module.norm], lr=0.1)
        scale_optimizer(optimizer, module, plan)
    for name in SHAPES:
        prune.identity(module, name)
    if names == "after":
        optimizer = optim.SGD([module.norm_orig], lr=0.1)
        scale_optimizer(optimizer, module, plan)
    seen = groups_in_update(optimizer)
    optimizer.add_param_group({"params": [p for p in module.parameters() if p is not module.norm_orig]})
    module.load_gradients(0)
    optimizer.step()
    expected = {f"{name}_orig": 0.1 * factor for name, factor in SGD_LR.items()}
    assert numbers_in_update(module, seen[-1], "lr") == expected


def test_parameters_that_others_rename_are_refused() -> None:
    """A norm of the weight makes the module another function."""
    module = nn.Sequential(nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False))
    parameters = plan_of(Weights(MATRICES)).parameters
    plan = Plan({"0.weight": parameters["branch_in"], "1.weight": parameters["branch_out"]}, (), (), ())
    optimizer = optim.SGD(module[1].parameters(), lr=0.1)
    scale_optimizer(optimizer, module, plan)
    nn.utils.spectral_norm(module[0])
    optimizer.add_param_group({"params": [module[0].weight_orig]})
    with pytest.raises(ValueError, match=r"The parameter 0\.weight_orig in group 1 .* not a parameter of the module"):
        optimizer.step()


def test_second_scaling_is_refused() -> None:
    module = Weights()
    optimizer = optim.SGD(module.parameters(), lr=0.1)
    scale_optimizer(optimizer, module, plan_of(module))
    lr_scheduler.StepLR(optimizer, 5)
    with pytest.raises(ValueError, match=r"scaled already; .* \.remove\(\)"):
        scale_optimizer(optimizer, module, plan_of(module))


class ReadOnly(optim.SGD):
    """Makes its groups when they are read."""

    @property
    def param_groups(self) -> list[Numbers]:
        return [{**group} for group in self.__dict__["_groups"]]

    @param_groups.setter
    def param_groups(self, value: list[Numbers]) -> None:
        self.__dict__["_groups"] = value


def test_groups_that_are_not_a_list_are_refused() -> None:
    module = Weights()
    optimizer = optim.SGD(module.parameters(), lr=0.1)
    optimizer.__class__ = ReadOnly
    vars(optimizer)["_groups"] = vars(optimizer).pop("param_groups")
    with pytest.raises(ValueError, match=r"param_groups of ReadOnly are not a list of its own.*scale each of these"):
        scale_optimizer(optimizer, module, plan_of(module))
