"""Every optimizer of torch.optim against parameter groups built by hand, and against exact scaling laws."""

from functools import partial
from typing import Any

import pytest
import torch
from helpers import optimizers_by_hand as optimizers
from helpers import parameter_groups as table
from helpers.optimizers_by_hand import CASES, ROWS, Case, Combined, OwnAdam, adam, adamw, sgd
from helpers.parameter_groups import MATRICES, SHAPES, Numbers, Weights, groups_in_update, identical, plan_of, scaled
from helpers.plans import entry
from helpers.updates import groups_of, refused, scale, train, update
from torch import nn, optim

from mlu_lightning import OptimizerFamily, Plan, Ratios, Role, scale_optimizer


def test_every_class_of_torch_optim_is_tried() -> None:
    classes = {name for name in optim.__all__ if isinstance(getattr(optim, name), type)} - {"Optimizer", "LBFGS"}
    assert {case.make.__name__ for case in CASES.values() if isinstance(case.make, type)} == classes


def run_by_hand(case: Case, module: Weights, steps: int) -> None:
    numbers = {key: value for key, value in case.optimizer(module).param_groups[0].items() if key != "params"}
    optimizer = case.make(groups_of(module, lambda name: {}), **case.numbers)
    for step in range(steps):
        for group, name in zip(optimizer.param_groups, case.names, strict=True):
            group.update(case.by_hand(numbers, ROWS[name], step))
        train([step], (module, optimizer), sparse=case.sparse)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_update_is_that_of_groups_built_by_hand(case: Case) -> None:
    ours, theirs, plain = Weights(case.names), Weights(case.names), Weights(case.names)
    optimizer = scale(case.optimizer(ours), ours)
    train(range(10), (ours, optimizer), (plain, case.optimizer(plain)), sparse=case.sparse)
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
    train(range(3), (ours, optimizer), (theirs, plain), sparse=case.sparse)
    assert identical(ours, theirs)
    assert seen == [True] * 3


SCALE_FREE = {name: case for name, case in CASES.items() if not name.startswith(("muon", "adafactor"))}


@pytest.mark.parametrize("case", SCALE_FREE.values(), ids=SCALE_FREE)
def test_run_is_the_base_run_in_other_units(case: Case) -> None:
    """Weights c times and gradients g times those of the base, c = lr/n and g of the table: so they stay, exactly."""
    base, scaled = Weights(), Weights()
    units = {name: table.SGD_LR[name] * table.EPS[name] for name in SHAPES}
    for name, parameter in scaled.named_parameters():
        parameter.data.mul_(units[name])
    reference, optimizer = case.optimizer(base), case.optimizer(scaled)
    scale_optimizer(optimizer, scaled, plan_of(scaled))
    for step in range(12):
        base.load_gradients(step, case.sparse)
        scaled.load_gradients(step, case.sparse)
        for name, parameter in scaled.named_parameters():
            parameter.grad = parameter.grad * table.EPS[name]
        reference.step()
        optimizer.step()
    for name, parameter in scaled.named_parameters():
        assert torch.equal(parameter, base.get_parameter(name) * units[name]), name


@pytest.mark.parametrize("lr", [0.01, 0.4])
def test_adafactor_step_is_the_base_step_in_other_units(lr: float) -> None:
    """Weights are std times those of the base and gradients g times: steps are lr times. 1/sqrt(step) < 0.4 from 7."""
    base, scaled = Weights(dtype=torch.float64), Weights(dtype=torch.float64)
    reference, optimizer = (optim.Adafactor(each.parameters(), lr=lr, weight_decay=0.1) for each in (base, scaled))
    scale(optimizer, scaled)
    for step in range(12):
        base.load_gradients(step)
        scaled.load_gradients(step)
        before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
        for name, parameter in scaled.named_parameters():
            parameter.data.copy_(before[name] * table.STD[name])
            parameter.grad = parameter.grad * table.EPS[name]
        reference.step()
        optimizer.step()
        for name, parameter in scaled.named_parameters():
            decayed = 1 - lr * 0.1
            moved = parameter - before[name] * table.STD[name] * decayed
            expected = (base.get_parameter(name) - before[name] * decayed) * table.ADAM_LR[name]
            torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-14)  # rounding of the subtraction


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_adafactor_default_bound_is_the_precision_of_the_parameters(dtype: torch.dtype) -> None:
    module = Weights(("branch_in",), dtype)
    optimizer = scale(optim.Adafactor(module.parameters()), module)
    seen = groups_in_update(optimizer)
    train([0], (module, optimizer))
    assert seen[-1][0]["eps"] == (torch.finfo(dtype).eps * table.EPS["branch_in"] ** 2, 1e-3 * table.STD["branch_in"])


def test_adafactor_refuses_a_step_above_its_limit() -> None:
    module = Weights(("branch_in",))
    smaller = entry(Role.BRANCH_IN, SHAPES["branch_in"], Ratios(1.0, 1 / 16, 1.0))
    optimizer = scale(optim.Adafactor(module.parameters(), lr=0.2), module, Plan({"branch_in": smaller}, (), (), ()))
    train([0], (module, optimizer))
    with pytest.raises(ValueError, match=r"no steps above 1/sqrt\(step\), which is 0.707107 at step 2, but .* 0.8 for"):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize(("make", "family"), [(optimizers.RenamedAdamW, None), (optim.AdamW, "sgd")])
def test_adamw_is_known_by_its_step_whatever_family_is_given(make: type[optim.AdamW], family: str | None) -> None:
    ours, theirs = Weights(), Weights()
    optimizer = scale(make(ours.parameters(), lr=0.1, eps=0.01), ours, family=family)
    train([0], (ours, optimizer))
    run_by_hand(Case(optim.AdamW, adamw, {"lr": 0.1, "eps": 0.01}), theirs, 1)
    assert identical(ours, theirs)


@pytest.mark.parametrize(("family", "by_hand"), [("adam", adam), ("sgd", sgd), ("adamw", adamw)])
def test_family_is_the_column_of_the_table_for_other_optimizers(family: str, by_hand: Any) -> None:
    module, optimizer, _ = scaled(OwnAdam, family=family, weight_decay=0.2)
    for key in ("lr", "weight_decay"):
        expected = {name: by_hand(optimizer.param_groups[0], ROWS[name], 9)[key] for name in SHAPES}
        assert update(module, optimizer, key) == expected


def test_other_muons_are_scaled_without_a_shape_factor() -> None:
    module, optimizer, _ = scaled(optimizers.OwnMuon, *MATRICES, family="muon", weight_decay=0.2)
    assert update(module, optimizer) == {name: 0.1 * table.MUON_LR[name] for name in MATRICES}
    assert update(module, optimizer, "weight_decay") == {name: 0.2 / table.MUON_LR[name] for name in MATRICES}


@pytest.mark.parametrize("transposed", [False, True])
def test_muon_in_the_absolute_form_takes_its_shape_factor_from_the_ratios(transposed: bool) -> None:
    """The base of 48 x 8, with ratios 16 and 4, is 3 x 2: torch's factors are sqrt(6) and sqrt(1.5)."""
    shape = (8, 48) if transposed else (48, 8)
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(shape))
    planned = entry(Role.BRANCH_IN, shape, Ratios(table.L, table.D, table.M), fans=(8, 48), transposed=transposed)
    optimizer = scale(optim.Muon(module.parameters(), lr=0.1), module, Plan({"weight": planned}, (), (), ()))
    seen = groups_in_update(optimizer)
    module.weight.grad = torch.ones(shape)
    optimizer.step()
    own = 1.0 if transposed else (6 / 1.5) ** 0.5
    assert seen[-1][0]["lr"] == pytest.approx(0.1 * table.MUON_LR["branch_in"] / own, rel=1e-14)  # float64 rounding


def test_combined_optimizers_have_a_family_for_each_group() -> None:
    ours, theirs, others = Weights(), Weights(), ("embedding", "norm", "readout")
    muon, rest = {"lr": 0.1, "weight_decay": 0.2}, {"lr": 0.01, "eps": 0.1, "weight_decay": 0.3}
    first, second = ([ours.get_parameter(name) for name in names] for names in (MATRICES, others))
    optimizer = Combined([{"params": first, **muon}], [{"params": second, **rest}])
    refused(r"How Combined uses .*a list with one for each parameter group", optimizer, ours, error=TypeError)
    message = r"names 3 families, and Combined has 2 parameter groups\. Give one for each"
    refused(message, optimizer, ours, family=["muon", "adamw", "adamw"])
    refused("Muon was given embedding", optimizer, ours, family="muon")
    scaled = scale_optimizer(optimizer, ours, plan_of(ours), family=["muon", "adamw"])
    assert scaled.families == {name: "muon" if name in MATRICES else "adamw" for name in SHAPES}

    def muon_by_hand(name: str) -> Numbers:
        return {"lr": muon["lr"] * table.MUON_LR[name], "weight_decay": muon["weight_decay"] / table.MUON_LR[name]}

    rest_by_hand = groups_of(theirs, lambda name: adamw(rest, ROWS[name], 0), *others)
    by_hand = Combined(groups_of(theirs, muon_by_hand, *MATRICES), rest_by_hand)
    train(range(4), (ours, optimizer), (theirs, by_hand))
    assert identical(ours, theirs)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (["adamw", OptimizerFamily.ADAMW], None),
        ("adamw", None),
        (["muon", "adamw"], r"names 2 families, .* 3 parameter groups\. .*let the optimizer have it from the start"),
    ],
)
def test_groups_that_are_added_have_the_family_that_all_have(family: Any, message: str | None) -> None:
    ours, theirs, numbers = Weights(), Weights(), {"lr": 0.01, "eps": 0.1, "weight_decay": 0.3}
    first, rest = ({"params": of, **numbers} for of in ([ours.branch_in], [ours.norm, ours.readout]))
    optimizer = Combined([first], [rest]) if family[0] == "muon" else Combined([], [first, rest])
    scale(optimizer, ours, family=family)
    optimizer.add_param_group({"use_muon": False, "params": [ours.branch_out, ours.embedding], **numbers})
    ours.load_gradients(0)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        return
    by_hand = Combined([], groups_of(theirs, lambda name: adamw(numbers, ROWS[name], 0)))
    train(range(3), (ours, optimizer), (theirs, by_hand))
    assert identical(ours, theirs)


def without_numbers(parameters: Any, **numbers: Any) -> OwnAdam:
    optimizer = OwnAdam(parameters)
    optimizer.param_groups[0].update(numbers)
    return optimizer


@pytest.mark.parametrize(
    ("make", "family", "error", "message"),
    [
        (optim.LBFGS, None, TypeError, r"LBFGS cannot be scaled: .* one step for all parameters together"),
        (OwnAdam, None, TypeError, r"How OwnAdam uses .* is not known.*family=\.\.\."),
        (partial(without_numbers, eps=(1e-30, 1e-3)), "adam", ValueError, "has eps=.*, which is not a number"),
        (partial(without_numbers, lr=None), "adam", ValueError, "has lr=.*, which is not a number"),
    ],
)
def test_other_rules_and_numbers_are_refused(make: Any, family: str | None, error: Any, message: str) -> None:
    module = Weights()
    refused(message, make(module.parameters()), module, family=family, error=error)


@pytest.mark.parametrize("name", ["embedding", "readout"])
def test_muon_is_refused_for_what_is_not_between_layers(name: str) -> None:
    module = Weights((name,))
    refused(
        f"Muon was given {name}, whose role is {name}.*an AdamW next to Muon", optim.Muon(module.parameters()), module
    )


def test_adagrad_accumulator_is_refused() -> None:
    module = Weights()
    optimizer = optim.Adagrad(module.parameters(), initial_accumulator_value=0.1)
    refused(r"Adagrad's initial_accumulator_value is 0\.1.*Leave it at 0", optimizer, module)
    scale_optimizer(optimizer, module, plan_of(module, identity=True))
