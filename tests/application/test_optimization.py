"""scale_optimizer: whose numbers an update sees, closures and errors in it, wrappers, names, refusals."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import parameter_groups as table
from helpers.parameter_groups import ADAM_LR, SGD_LR, SHAPES, D, L, Weights, groups_in_update, plan_of, scaled
from helpers.plans import entry
from helpers.updates import groups_of, refused, scale, train, update
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn, optim
from torch.nn.utils import prune
from torch.optim import lr_scheduler

from mlu_lightning import Plan, Ratios, attach_multipliers, scale_optimizer
from mlu_lightning.discovery.structure import Site
from mlu_lightning.planning import Multiplier


class Forward(nn.Module):  # a module for hooks: two branches' worth of places
    def __init__(self) -> None:
        super().__init__()
        self.weights = Weights()
        self.branch, self.head = nn.Identity(), nn.Identity()


def forward_plan(module: Forward) -> Plan:
    parameters = {f"weights.{name}": value for name, value in plan_of(module.weights).parameters.items()}
    branch = Multiplier("branch", "branch", 1 / L, Site("branch"), ("weights.branch_out",))
    head = Multiplier("head", "readout", 1 / D, Site("head"), ("weights.readout",))
    return Plan(parameters, (), (), (branch, head))


def test_multipliers_that_are_not_in_effect_are_refused() -> None:
    module = Forward()
    plan = forward_plan(module)
    optimizer = optim.SGD(module.parameters(), lr=0.1)
    refused(r"multipliers, and they are not in effect.*attach_multipliers\(module, plan\)", optimizer, module, plan)
    attach_multipliers(module, plan)
    refused("the multipliers of another plan", optimizer, module, replace(plan, alpha=2.0))
    assert optimizer.param_groups[0]["lr"] == 0.1 and "step" not in vars(optimizer)


def test_one_shadow_group_for_each_distinct_set_of_factors_and_group() -> None:
    module, norms = Weights(), [f"norm{index}" for index in range(10)]
    for name in norms:
        module.register_parameter(name, nn.Parameter(torch.zeros(8)))
    more = {name: entry(table.ROLES["norm"][0], (8,), Ratios(L, outputs=D)) for name in norms}
    plan = Plan({**plan_of(Weights()).parameters, **more}, (), (), ())
    first, second = ([module.get_parameter(name) for name in names] for names in (SHAPES, norms))
    optimizer = scale(optim.AdamW([{"params": first, "lr": 0.1}, {"params": second, "lr": 0.2}]), module, plan)
    seen = groups_in_update(optimizer)
    train([0], (module, optimizer))
    # embedding and readout share theirs
    assert [len(group["params"]) for group in seen[-1]] == [2, 1, 1, 1, 10]
    assert seen[-1][-1]["lr"] == 0.2
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_parameters_changed_in_a_group_are_found_and_names_are_kept() -> None:
    module = Weights()
    optimizer = scale(optim.SGD([("embedding", module.embedding)], lr=0.1), module)
    optimizer.param_groups[0]["params"][0] = module.branch_in
    assert update(module, optimizer) == {"branch_in": 0.1 * SGD_LR["branch_in"]}
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["embedding"]


def test_numbers_changed_in_the_groups_are_taken_over() -> None:
    module, optimizer, seen = scaled(optim.AdamW)
    train([0], (module, optimizer))
    optimizer.param_groups[0].update(lr=0.3, betas=(0.5, 0.6), weight_decay=0.7, maximize=True, note="new")
    assert update(module, optimizer) == {name: 0.3 * factor for name, factor in ADAM_LR.items()}
    assert update(module, optimizer, "weight_decay") == {name: 0.7 / by for name, by in ADAM_LR.items()}
    assert {(group["betas"], group["maximize"], group["note"]) for group in seen[-1]} == {((0.5, 0.6), True, "new")}


@pytest.mark.parametrize("by_name", [False, True])
def test_closure_sees_the_users_groups(by_name: bool) -> None:
    module, optimizer, seen = scaled()
    groups, inside = optimizer.param_groups, []

    def closure() -> float:
        module.load_gradients(0)
        inside.append([*optimizer.param_groups])
        optimizer.param_groups[0]["lr"] = 0.2
        return 3.0

    assert (optimizer.step(closure=closure) if by_name else optimizer.step(closure)) == 3.0
    assert inside[0][0] is optimizer.param_groups[0]
    assert table.numbers_in_update(module, seen[-1], "lr") == {name: 0.2 * by for name, by in SGD_LR.items()}
    assert optimizer.param_groups is groups and [group["lr"] for group in groups] == [0.2]


class Lookahead(optim.SGD):  # calls its closure twice, and updates after each
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return super().step(closure)


def test_closure_that_is_called_twice() -> None:
    module, optimizer, seen = scaled(Lookahead, family="sgd")
    inside: list[int] = []

    def closure() -> None:
        module.load_gradients(0)
        inside.append(len(optimizer.param_groups))

    optimizer.step(closure)
    assert inside == [1, 1]
    assert {len(groups) for groups in seen} == {len(set(SGD_LR.values()))}


@pytest.mark.parametrize(("where", "error"), [("closure", KeyError), ("update", RuntimeError)])
def test_error_leaves_the_users_groups(where: str, error: type[Exception]) -> None:
    module, optimizer, _ = scaled(optim.Adam)
    group = optimizer.param_groups[0]

    def closure() -> float:
        module.load_gradients(0, sparse=True)  # which Adam refuses
        if where == "closure":
            raise KeyError("forward")
        return 0.0

    with pytest.raises(error, match="forward" if where == "closure" else "sparse gradients"):
        optimizer.step(closure)
    assert [found is group for found in optimizer.param_groups] == [True]


def test_gradient_scaler_finds_what_it_looks_for() -> None:
    module, optimizer, _ = scaled(optim.AdamW, fused=True)
    reference, plain, _ = scaled(optim.AdamW, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    module.load_gradients(0)
    for parameter in module.parameters():
        parameter.grad = parameter.grad * 8
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    train([0], (reference, plain))
    assert table.identical(module, reference)


def test_zero_redundancy_optimizer_is_scaled_inside(tmp_path: Any) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # slow to import, and warns

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    ours, theirs = Weights(), Weights()
    try:
        zero = ZeroRedundancyOptimizer(ours.parameters(), optim.AdamW, lr=0.1, eps=0.01)
        assert scale_optimizer(zero, ours, plan_of(ours)).parts[0].optimizer is zero.optim
        zero.param_groups[0]["lr"] = 0.2
        train([0], (ours, zero))
    finally:
        torch.distributed.destroy_process_group()

    def by_hand(name: str) -> dict[str, float]:
        lr = ADAM_LR[name]
        return {"lr": 0.2 * lr, "eps": 0.01 * table.EPS[name], "weight_decay": 0.01 / lr}

    train([0], (theirs, optim.AdamW(groups_of(theirs, by_hand))))
    assert table.identical(ours, theirs)


def test_parameters_of_another_module_are_refused() -> None:
    module, flat = Weights(), nn.Module()
    optimizer = optim.SGD([*module.parameters(), nn.Parameter(torch.ones(3, 4))], lr=0.1)
    message = r"shape \[3, 4\] in group 0 .* not a parameter of the module.*use_orig_params=True.*DeepSpeed ZeRO"
    refused(message, optimizer, module)
    assert "step" not in vars(optimizer)
    flat._fsdp_wrapped_module = nn.Module()
    flat._fsdp_wrapped_module._flat_param = nn.Parameter(torch.ones(300))
    message = "The parameter _flat_param in group 0 .*use_orig_params=True"
    refused(message, optim.SGD(flat.parameters(), lr=0.1), flat, plan_of(module))


def test_names_inside_fsdp_are_those_of_the_plan() -> None:
    module = nn.Module()
    module._fsdp_wrapped_module = weights = Weights()
    optimizer = scale(optim.SGD(module.parameters(), lr=0.1), module, plan_of(weights))
    assert update(weights, optimizer) == {name: 0.1 * factor for name, factor in SGD_LR.items()}


@pytest.mark.parametrize("names", ["before", "after"])
def test_names_of_pruned_parameters_are_those_of_the_plan(names: str) -> None:
    module, renamed = Weights(), names == "after"
    entries = {f"{name}_orig" if renamed else name: value for name, value in plan_of(module).parameters.items()}
    plan, optimizer = Plan(entries, (), (), ()), optim.SGD([module.norm], lr=0.1)  # which pruning renames
    if not renamed:
        scale(optimizer, module, plan)
    for name in SHAPES:
        prune.identity(module, name)
    if renamed:
        scale(optimizer, module, plan)
    optimizer.add_param_group({"params": [p for p in module.parameters() if p is not module.norm_orig]})
    assert update(module, optimizer) == {f"{name}_orig": 0.1 * factor for name, factor in SGD_LR.items()}


def test_parameters_that_others_rename_are_refused() -> None:
    """A norm of the weight makes the module another function."""
    module = nn.Sequential(nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False))
    parameters = plan_of(Weights(table.MATRICES)).parameters
    plan = Plan({"0.weight": parameters["branch_in"], "1.weight": parameters["branch_out"]}, (), (), ())
    optimizer = scale(optim.SGD(module[1].parameters(), lr=0.1), module, plan)
    nn.utils.spectral_norm(module[0])
    optimizer.add_param_group({"params": [module[0].weight_orig]})
    with pytest.raises(ValueError, match=r"The parameter 0\.weight_orig in group 1 .* not a parameter of the module"):
        optimizer.step()


def test_second_scaling_is_refused_also_under_lightnings_wrapper() -> None:
    module = Weights()
    optimizer = optim.SGD(module.parameters(), lr=0.1)
    assert scale_optimizer(LightningOptimizer(optimizer), module, plan_of(module)).parts[0].optimizer is optimizer
    lr_scheduler.StepLR(optimizer, 5)
    refused(r"scaled already; .* \.remove\(\)", optimizer, module)


class ReadOnly(optim.SGD):  # makes its groups when they are read
    param_groups: Any = property(lambda self: [{**group} for group in self.groups], lambda self, value: None)


def test_groups_that_are_not_a_list_are_refused() -> None:
    module = Weights()
    optimizer = optim.SGD(module.parameters(), lr=0.1)
    optimizer.__class__ = ReadOnly
    optimizer.groups = vars(optimizer).pop("param_groups")
    refused(r"param_groups of ReadOnly are not a list of its own.*scale each of these", optimizer, module)
