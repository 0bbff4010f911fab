"""Every optimizer of torch.optim against parameter groups built by hand, and against exact scaling laws."""

from typing import Any

import pytest
import torch
from helpers.optimizers_by_hand import (
    CASES,
    ROWS,
    ByHand,
    Case,
    Combined,
    OwnAdam,
    OwnMuon,
    RenamedAdamW,
    adam,
    adamw,
    sgd,
)
from helpers.parameter_groups import (
    ADAM_LR,
    EPS,
    MATRICES,
    MUON_LR,
    SGD_LR,
    SHAPES,
    STD,
    D,
    L,
    M,
    Numbers,
    Weights,
    groups_in_update,
    identical,
    numbers_in_update,
    plan_of,
    scaled,
)
from helpers.plans import entry
from torch import nn, optim

from mlu_lightning import Plan
from mlu_lightning.application.optimization import scale_optimizer
from mlu_lightning.table import OptimizerFamily, Ratios, Role

IN_SCOPE = {name for name in optim.__all__ if isinstance(getattr(optim, name), type)} - {"Optimizer", "LBFGS"}


def test_every_class_of_torch_optim_is_tried() -> None:
    assert {case.make.__name__ for case in CASES.values() if isinstance(case.make, type)} == IN_SCOPE


def run_by_hand(case: Case, module: Weights, steps: int) -> None:
    numbers = {key: value for key, value in case.optimizer(module).param_groups[0].items() if key != "params"}
    groups = [{"params": [parameter]} for parameter in module.parameters()]
    optimizer = case.make(groups, **case.numbers)
    for step in range(steps):
        for group, name in zip(optimizer.param_groups, case.names, strict=True):
            group.update(case.by_hand(numbers, ROWS[name], step))
        module.load_gradients(step, case.sparse)
        optimizer.step()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_update_is_that_of_groups_built_by_hand(case: Case) -> None:
    ours, theirs, plain = Weights(case.names), Weights(case.names), Weights(case.names)
    optimizer = case.optimizer(ours)
    scale_optimizer(optimizer, ours, plan_of(ours))
    unscaled = case.optimizer(plain)
    for step in range(10):
        ours.load_gradients(step, case.sparse)
        optimizer.step()
        plain.load_gradients(step, case.sparse)
        unscaled.step()
    run_by_hand(case, theirs, 10)
    assert identical(ours, theirs)
    assert not identical(ours, plain)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_base_shape_is_the_plain_run(case: Case) -> None:
    ours, theirs = Weights(case.names), Weights(case.names)
    optimizer, plain = case.optimizer(ours), case.optimizer(theirs)
    seen: list[bool] = []
    optimizer.register_step_post_hook(lambda opt, *_: seen.append(opt.param_groups[0] is group))
    group = optimizer.param_groups[0]
    scale_optimizer(optimizer, ours, plan_of(ours, identity=True))
    for step in range(3):
        ours.load_gradients(step, case.sparse)
        theirs.load_gradients(step, case.sparse)
        optimizer.step()
        plain.step()
    assert identical(ours, theirs)
    assert seen == [True] * 3


SCALE_FREE = {name: case for name, case in CASES.items() if not name.startswith(("muon", "adafactor"))}


@pytest.mark.parametrize("case", SCALE_FREE.values(), ids=SCALE_FREE)
def test_run_is_the_base_run_in_other_units(case: Case) -> None:
    """Weights c times and gradients g times those of the base, c = lr/n and g of the table: so they stay, exactly."""
    base, scaled = Weights(), Weights()
    units = {name: SGD_LR[name] * EPS[name] for name in SHAPES}
    for name, parameter in scaled.named_parameters():
        parameter.data.mul_(units[name])
    reference, optimizer = case.optimizer(base), case.optimizer(scaled)
    scale_optimizer(optimizer, scaled, plan_of(scaled))
    for step in range(12):
        base.load_gradients(step, case.sparse)
        scaled.load_gradients(step, case.sparse)
        for name, parameter in scaled.named_parameters():
            parameter.grad = parameter.grad * EPS[name]
        reference.step()
        optimizer.step()
    for name, parameter in scaled.named_parameters():
        assert torch.equal(parameter, base.get_parameter(name) * units[name]), name


@pytest.mark.parametrize("lr", [0.01, 0.4])
def test_adafactor_step_is_the_base_step_in_other_units(lr: float) -> None:
    """Weights are std times those of the base and gradients g times: steps are lr times. 1/sqrt(step) < 0.4 from 7."""
    base, scaled = Weights(dtype=torch.float64), Weights(dtype=torch.float64)
    reference = optim.Adafactor(base.parameters(), lr=lr, weight_decay=0.1)
    optimizer = optim.Adafactor(scaled.parameters(), lr=lr, weight_decay=0.1)
    scale_optimizer(optimizer, scaled, plan_of(scaled))
    for step in range(12):
        base.load_gradients(step)
        scaled.load_gradients(step)
        before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
        for name, parameter in scaled.named_parameters():
            parameter.data.copy_(before[name] * STD[name])
            parameter.grad = parameter.grad * EPS[name]
        reference.step()
        optimizer.step()
        for name, parameter in scaled.named_parameters():
            decayed = 1 - lr * 0.1
            moved = parameter - before[name] * STD[name] * decayed
            expected = (base.get_parameter(name) - before[name] * decayed) * ADAM_LR[name]
            torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-14)  # rounding of the subtraction


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_adafactor_default_bound_is_the_precision_of_the_parameters(dtype: torch.dtype) -> None:
    module = Weights(("branch_in",), dtype)
    optimizer = optim.Adafactor(module.parameters())
    seen = groups_in_update(optimizer)
    scale_optimizer(optimizer, module, plan_of(module))
    module.load_gradients(0)
    optimizer.step()
    assert seen[-1][0]["eps"] == (torch.finfo(dtype).eps * EPS["branch_in"] ** 2, 1e-3 * STD["branch_in"])


def test_adafactor_refuses_a_step_above_its_limit() -> None:
    module = Weights(("branch_in",))
    smaller = entry(Role.BRANCH_IN, SHAPES["branch_in"], Ratios(1.0, 1 / 16, 1.0))
    optimizer = optim.Adafactor(module.parameters(), lr=0.2)
    scale_optimizer(optimizer, module, Plan({"branch_in": smaller}, (), (), ()))
    module.load_gradients(0)
    optimizer.step()
    with pytest.raises(ValueError, match=r"no steps above 1/sqrt\(step\), which is 0.707107 at step 2, but .* 0.8 for"):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.2


# Families


def test_subclass_with_the_same_step_has_the_same_rule() -> None:
    ours, theirs = Weights(), Weights()
    optimizer = RenamedAdamW(ours.parameters(), lr=0.1, eps=0.01)
    scale_optimizer(optimizer, ours, plan_of(ours))
    ours.load_gradients(0)
    optimizer.step()
    run_by_hand(Case(optim.AdamW, adamw, {"lr": 0.1, "eps": 0.01}), theirs, 1)
    assert identical(ours, theirs)


@pytest.mark.parametrize(("family", "by_hand"), [("adam", adam), ("sgd", sgd), ("adamw", adamw)])
def test_family_is_the_column_of_the_table_for_other_optimizers(family: str, by_hand: ByHand) -> None:
    module, optimizer, seen = scaled(OwnAdam, family=family, weight_decay=0.2)
    module.load_gradients(0)
    optimizer.step()
    for key in ("lr", "weight_decay"):
        expected = {name: by_hand(optimizer.param_groups[0], ROWS[name], 9)[key] for name in SHAPES}
        assert numbers_in_update(module, seen[-1], key) == expected


def test_other_muons_are_scaled_without_a_shape_factor() -> None:
    module, optimizer, seen = scaled(OwnMuon, *MATRICES, family="muon", weight_decay=0.2)
    optimizer.step()
    assert numbers_in_update(module, seen[-1], "lr") == {name: 0.1 * MUON_LR[name] for name in MATRICES}
    assert numbers_in_update(module, seen[-1], "weight_decay") == {name: 0.2 / MUON_LR[name] for name in MATRICES}


@pytest.mark.parametrize("transposed", [False, True])
def test_muon_in_the_absolute_form_takes_its_shape_factor_from_the_ratios(transposed: bool) -> None:
    """The base of 48 x 8, with ratios 16 and 4, is 3 x 2: torch's factors are sqrt(6) and sqrt(1.5)."""
    shape = (8, 48) if transposed else (48, 8)
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(shape))
    planned = entry(Role.BRANCH_IN, shape, Ratios(L, D, M), fans=(8, 48), transposed=transposed)
    optimizer = optim.Muon(module.parameters(), lr=0.1)
    seen = groups_in_update(optimizer)
    scale_optimizer(optimizer, module, Plan({"weight": planned}, (), (), ()))
    module.weight.grad = torch.ones(shape)
    optimizer.step()
    own = 1.0 if transposed else (6 / 1.5) ** 0.5
    assert seen[-1][0]["lr"] == pytest.approx(0.1 * MUON_LR["branch_in"] / own, rel=1e-14)  # float64 rounding


def test_combined_optimizers_have_a_family_for_each_group() -> None:
    ours, theirs = Weights(), Weights()
    others = [name for name in SHAPES if name not in MATRICES]
    muon, rest = {"lr": 0.1, "weight_decay": 0.2}, {"lr": 0.01, "eps": 0.1, "weight_decay": 0.3}

    def of(module: nn.Module, *names: str) -> list[nn.Parameter]:
        return [module.get_parameter(name) for name in names]

    optimizer = Combined([{"params": of(ours, *MATRICES), **muon}], [{"params": of(ours, *others), **rest}])
    with pytest.raises(TypeError, match=r"How Combined uses .*a list with one for each parameter group"):
        scale_optimizer(optimizer, ours, plan_of(ours))
    with pytest.raises(ValueError, match=r"names 3 families, and Combined has 2 parameter groups\. Give one for each"):
        scale_optimizer(optimizer, ours, plan_of(ours), family=["muon", "adamw", "adamw"])
    with pytest.raises(ValueError, match="Muon was given embedding"):
        scale_optimizer(optimizer, ours, plan_of(ours), family="muon")
    scaled = scale_optimizer(optimizer, ours, plan_of(ours), family=["muon", "adamw"])
    assert scaled.families == {name: "muon" if name in MATRICES else "adamw" for name in SHAPES}
    by_hand = Combined(
        [
            {
                "params": of(theirs, name),
                "lr": muon["lr"] * MUON_LR[name],
                "weight_decay": muon["weight_decay"] / MUON_LR[name],
            }
            for name in MATRICES
        ],
        [{"params": of(theirs, name), **adamw(rest, ROWS[name], 0)} for name in others],
    )
    for step in range(4):
        for module, each in ((ours, optimizer), (theirs, by_hand)):
            module.load_gradients(step)
            each.step()
    assert identical(ours, theirs)


@pytest.mark.parametrize(
    ("family", "refused"),
    [
        (["adamw", OptimizerFamily.ADAMW], None),
        ("adamw", None),
        (["muon", "adamw"], r"names 2 families, .* 3 parameter groups\. .*let the optimizer have it from the start"),
    ],
)
def test_groups_that_are_added_have_the_family_that_all_have(family: Any, refused: str | None) -> None:
    ours, theirs, numbers = Weights(), Weights(), {"lr": 0.01, "eps": 0.1, "weight_decay": 0.3}
    muon = [{"params": [ours.branch_in], **numbers}] if family[0] == "muon" else []
    rest = [{"params": [ours.norm, ours.readout], **numbers}]
    optimizer = Combined(muon, rest if muon else [{"params": [ours.branch_in], **numbers}, *rest])
    scale_optimizer(optimizer, ours, plan_of(ours), family)
    optimizer.add_param_group({"use_muon": False, "params": [ours.branch_out, ours.embedding], **numbers})
    ours.load_gradients(0)
    if refused is not None:
        with pytest.raises(ValueError, match=refused):
            optimizer.step()
        return
    groups = [{"params": [theirs.get_parameter(name)], **adamw(numbers, ROWS[name], 0)} for name in SHAPES]
    by_hand = Combined([], groups)
    for step in range(3):
        for module, each in ((ours, optimizer), (theirs, by_hand)):
            module.load_gradients(step)
            each.step()
    assert identical(ours, theirs)


# Refusals


def test_lbfgs_is_refused() -> None:
    module = Weights()
    with pytest.raises(TypeError, match=r"LBFGS cannot be scaled: .* one step for all parameters together"):
        scale_optimizer(optim.LBFGS(module.parameters()), module, plan_of(module))


def test_unknown_optimizer_is_refused() -> None:
    module = Weights()
    with pytest.raises(TypeError, match=r"How OwnAdam uses .* is not known.*family=\.\.\."):
        scale_optimizer(OwnAdam(module.parameters()), module, plan_of(module))


def test_family_is_not_asked_for_what_torch_defines() -> None:
    ours, theirs = Weights(), Weights()
    optimizer = optim.AdamW(ours.parameters(), lr=0.1, eps=0.01)
    scale_optimizer(optimizer, ours, plan_of(ours), family="sgd")
    ours.load_gradients(0)
    optimizer.step()
    run_by_hand(Case(optim.AdamW, adamw, {"lr": 0.1, "eps": 0.01}), theirs, 1)
    assert identical(ours, theirs)


@pytest.mark.parametrize("numbers", [{"eps": (1e-30, 1e-3)}, {"lr": None}])
def test_groups_without_plain_numbers_are_refused(numbers: Numbers) -> None:
    module = Weights()
    optimizer = OwnAdam(module.parameters())
    optimizer.param_groups[0].update(numbers)
    with pytest.raises(ValueError, match=rf"has {next(iter(numbers))}=.*, which is not a number"):
        scale_optimizer(optimizer, module, plan_of(module), family="adam")


@pytest.mark.parametrize("name", ["embedding", "readout"])
def test_muon_is_refused_for_what_is_not_between_layers(name: str) -> None:
    module = Weights((name,))
    with pytest.raises(ValueError, match=f"Muon was given {name}, whose role is {name}.*an AdamW next to Muon"):
        scale_optimizer(optim.Muon(module.parameters()), module, plan_of(module))


def test_adagrad_accumulator_is_refused() -> None:
    module = Weights()
    optimizer = optim.Adagrad(module.parameters(), initial_accumulator_value=0.1)
    with pytest.raises(ValueError, match=r"Adagrad's initial_accumulator_value is 0\.1.*Leave it at 0"):
        scale_optimizer(optimizer, module, plan_of(module))
    scale_optimizer(optimizer, module, plan_of(module, identity=True))
