"""What reads or limits weights does the same with folded weights as with hooks, or is warned of."""

import copy
from typing import Any

import pytest
import torch
from helpers.faulty_functions import BASE, GROWN, TOKENS, Language
from torch import Tensor, nn, optim

from mlu_lightning import Plan
from mlu_lightning.application import (
    attach_multipliers,
    fold,
    initialize,
    scale_optimizer,
    unfolded_gradients,
    unfolded_weights,
)


def clip_by_norms_of_weights(module: nn.Module) -> None:
    for parameter in module.parameters():
        assert parameter.grad is not None
        limit = 0.01 * parameter.norm().clamp(min=1e-3)
        parameter.grad.mul_((limit / parameter.grad.norm()).clamp(max=1))


def limit_rows(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.ndim == 2:
            parameter.copy_(torch.renorm(parameter, 2, 0, 0.5))


def prune_the_smallest(module: nn.Module) -> None:
    sizes = torch.cat([parameter.abs().flatten() for parameter in module.parameters()])
    smallest = sizes.kthvalue(len(sizes) // 5).values
    for parameter in module.parameters():
        parameter.mul_(parameter.abs() > smallest)


@pytest.mark.parametrize("change", [clip_by_norms_of_weights, limit_rows, prune_the_smallest])
def test_run_with_folded_weights_is_that_with_hooks(change: Any) -> None:
    module = Language(GROWN).double()
    plan = Plan.from_model(module, TOKENS, base=Language(BASE))
    initialize(module, plan)
    hooked, folded = module, fold(copy.deepcopy(module), plan)
    attach_multipliers(hooked, plan)
    for each in (hooked, folded):
        optimizer = optim.AdamW(each.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.1)
        scale_optimizer(optimizer, each, plan)
        for _ in range(3):
            optimizer.zero_grad()
            each(*TOKENS).square().mean().backward()
            with unfolded_weights(each, plan), unfolded_gradients(each, plan), torch.no_grad():
                change(each)
            optimizer.step()
    theirs = dict(hooked.named_parameters())
    for name, value in folded.named_parameters():
        torch.testing.assert_close(value / plan.folded_factors.get(name, 1.0), theirs[name], rtol=1e-9, atol=1e-12)


def test_what_is_not_changed_is_what_it_was() -> None:
    module = Language((6, *GROWN[1:]))  # a factor of 1/3, with which division and multiplication do not undo each other
    plan = Plan.from_model(module, TOKENS, base=Language(BASE))
    fold(initialize(module, plan), plan)
    before: dict[str, Tensor] = {name: value.clone() for name, value in module.state_dict().items()}
    with unfolded_weights(module, plan), torch.no_grad():
        module.blocks[0].write.weight[0, 0] = 3.0
    assert module.blocks[0].write.weight[0, 0].item() == pytest.approx(1.0)
    with torch.no_grad():
        module.blocks[0].write.weight[0, 0] = before["blocks.0.write.weight"][0, 0]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_modules_without_the_plans_multipliers_are_refused() -> None:
    module = Language(GROWN)
    plan = Plan.from_model(module, TOKENS, base=Language(BASE))
    with (
        pytest.raises(ValueError, match="not in the Language that was given to unfolded_weights"),
        unfolded_weights(module, plan),
    ):
        pass
