"""What has no infinite model, or another one, is refused."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.limit_models import INPUTS, OUTPUTS, planned, transformer
from torch import nn

from mlu_lightning import Plan, fold, initialize
from mlu_lightning.limit.infinite_model import check_gradient_descent, check_initialization, infinite_model
from mlu_lightning.models import ResNet
from mlu_lightning.planning.horizon import Horizon
from mlu_lightning.table import Parameterization


class Other(ResNet):  # might do anything
    pass


def test_unknown_classes_are_refused() -> None:
    module = Other(2, 8, 6, INPUTS, OUTPUTS)
    with pytest.raises(ValueError, match=r"The infinite model of Other is not known: .*Use one of these, or compare"):
        infinite_model(module, Plan.from_model(module))
    with pytest.raises(ValueError, match=r"The infinite model of Linear is not known"):
        infinite_model(nn.Linear(2, 2), Plan.from_model(module))


@pytest.mark.parametrize("shape", [{"depth": 4}, {"depth": 1}, {"embedding": 7}])
def test_plan_of_another_module_is_refused(shape: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"The plan was not made for this ResNet: .* (is in the|in the module)"):
        infinite_model(planned(**shape)[0], planned()[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameterization": Parameterization.MUP}, "parameterization='mup'"),
        ({"horizon": Horizon(batch_ratio=2.0)}, "batch_ratio=2"),
    ],
)
def test_limit_of_other_rules_is_refused(changes: dict[str, Any], message: str) -> None:
    module, _ = planned()
    plan = Plan.from_model(module, base=module)  # others need a base
    with pytest.raises(ValueError, match=rf"{message}.*is that of the MLU parameterization under gradient descent"):
        infinite_model(module, replace(plan, **changes))


def test_gains_of_norms_are_refused_unless_they_stay_one() -> None:
    module = transformer(norm_gains=True)
    plan = Plan.from_model(module)
    message = "branches.0.norm.weight is a branch_norm, and .*gains of their own.*CausalTransformer.norm_gains=False"
    with pytest.raises(ValueError, match=message):
        infinite_model(module, plan)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("norm" not in name)
    limit = infinite_model(module, plan, units=16)
    assert not any(p.requires_grad or bool((p != 1).any()) for n, p in limit.module.named_parameters() if "norm" in n)
    nn.init.constant_(module.norm.weight, 2)
    with pytest.raises(ValueError, match=r"norm.weight is a stream_norm, and "):
        infinite_model(module, plan)


def test_partly_frozen_blocks_are_refused() -> None:
    module, plan = planned(depth=3)
    module.blocks[1].write.weight.requires_grad_(False)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"Some of blocks.\*.write.weight are frozen and some are not.*all of them or"):
        infinite_model(module, plan)
    for block in module.blocks:
        block.write.weight.requires_grad_(False)  # type: ignore[union-attr]
    blocks: Any = infinite_model(module, plan, depth=5, units=16).module.blocks
    assert [(b.read.weight.requires_grad, b.write.weight.requires_grad) for b in blocks] == [(True, False)] * 5


def test_readouts_that_start_at_zero_are_refused() -> None:
    base = ResNet(2, 8, 6, INPUTS, OUTPUTS)
    nn.init.zeros_(base.readout.weight)
    module = ResNet(2, 16, 12, INPUTS, OUTPUTS)
    plan = Plan.from_model(module, base=base)
    with pytest.raises(ValueError, match=r"readout.weight starts at zero, and .*or write base_std into the saved plan"):
        infinite_model(module, plan)
    check_initialization(initialize(module, plan), plan)  # that is as planned

    def with_std(std: float | None) -> Plan:
        readout = replace(plan.parameters["readout.weight"], base_std=std)
        return replace(plan, parameters=plan.parameters | {"readout.weight": readout})

    with pytest.raises(ValueError, match=r"readout.weight starts at a size that the plan does not know, and "):
        infinite_model(module, with_std(None))
    spread = infinite_model(module, with_std(0.3)).spread
    torch.testing.assert_close(spread[INPUTS:], torch.full((OUTPUTS,), 0.3))


def test_sizes_that_the_limit_cannot_have_are_refused() -> None:
    module = transformer()
    with pytest.raises(ValueError, match=r"depth=5 of the infinite model is no even number.*Give an even depth"):
        infinite_model(module, Plan.from_model(module), depth=5)
    with pytest.raises(ValueError, match=r'7 hidden units or heads cannot be "orthogonal"'):
        infinite_model(*planned(), units=7)
    assert len(infinite_model(*planned(), units=7, sampling="independent").module.blocks) == 2  # type: ignore[arg-type]
    attention = transformer(mlp_hidden=0)
    assert infinite_model(attention, Plan.from_model(attention), depth=5, heads=2).module.hparams["depth"] == 5


def weights_of(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)) for _ in range(count)]


def test_other_optimizers_are_refused() -> None:
    sgd, adam, rms = (kind(weights_of(1), 0.1) for kind in (torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop))
    for optimizers in ([adam], [sgd, adam], [sgd, sgd], [rms]):
        names = " and ".join(type(optimizer).__name__ for optimizer in optimizers)
        with pytest.raises(ValueError, match=rf"this run has {names}: .*Train with SGD, or compare with a large run"):
            check_gradient_descent(optimizers)
    check_gradient_descent([sgd])
    with pytest.raises(ValueError, match=r"has 1 groups with different ones, or maximizes"):
        check_gradient_descent([torch.optim.SGD(weights_of(1), 0.1, maximize=True)])


@pytest.mark.parametrize(
    "other",
    [{"lr": 0.2}, {"momentum": 0.5}, {"weight_decay": 0.1}, {"dampening": 0.5}, {"momentum": 0.9, "nesterov": True}],
)
def test_groups_with_other_hyperparameters_are_refused(other: dict[str, Any]) -> None:
    one, two = weights_of(2)
    optimizer = torch.optim.SGD([{"params": [one]}, {"params": [two], **other}], lr=0.1)
    message = r"has 2 groups with different ones, or maximizes\. Give all parameters the same"
    with pytest.raises(ValueError, match=message):
        check_gradient_descent([optimizer])
    check_gradient_descent([torch.optim.SGD([{"params": [one], **other}, {"params": [two], **other}], lr=0.1)])


@pytest.mark.parametrize("mode", ["rescale", "normal", "coupled"])
@pytest.mark.parametrize("folded", [False, True])
def test_weights_that_were_just_initialized_are_accepted(mode: Any, folded: bool) -> None:
    for seed in range(12):
        torch.manual_seed(seed)
        module = ResNet(2, 4, 3, INPUTS, OUTPUTS)
        plan = Plan.from_model(module, base=ResNet(1, 2, 2, INPUTS, OUTPUTS))
        initialize(module, plan, mode, seed)
        if folded:
            fold(module, plan)
        check_initialization(module, plan)


def test_other_weights_are_refused() -> None:
    module = ResNet(2, 64, 32, INPUTS, OUTPUTS)
    plan = Plan.from_model(module)
    built = module.readout.weight.square().mean().sqrt().item()
    message = r"{} has entries of root mean square {}, and the plan's .* has {}, so .*MLUCallback\(init=\"rescale\"\)"
    for name, factor, size, planned_size in (
        ("readout.weight", built, f"{built:.3g}", "1"),
        ("blocks.1.read.weight", 1.25, r"0\.\d+", f"{32**-0.5:.3g}"),
        ("embed.weight", 0.0, "0", ".*"),
        ("embed.weight", math.nan, "nan", ".*"),
    ):
        initialize(module, plan)
        with torch.no_grad():
            module.get_parameter(name).mul_(factor)
        with pytest.raises(ValueError, match=message.format(name, size, planned_size)):
            check_initialization(module, plan)
