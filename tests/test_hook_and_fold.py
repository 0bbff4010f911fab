"""Multipliers as hooks and folded into weights are the same function and the same training run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from mlu_lightning import Plan, attach_multipliers, fold, initialize, scale_optimizer
from mlu_lightning.models import ResNet

STEPS = 20
# eps is as large as gradients are, so that its factor counts; with a small one, Adam amplifies rounding errors without
# bound where the gradient is zero but for these, as that of the bias of keys is
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, eps=1e-2, weight_decay=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, eps=1e-2, weight_decay=0.1),
}


@pytest.fixture(params=ARCHITECTURES, scope="module")
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


def _made(architecture: Architecture) -> tuple[nn.Module, Plan]:
    """A module in double precision with its plan, initialized; dropout is off, because its masks would not matter."""
    torch.manual_seed(0)
    base = architecture.build(1, 2, 16)
    module = architecture.build(2, 4, 32)
    plan = Plan.from_model(module, architecture.example, base=base, alpha=1.5)
    initialize(module, plan)
    return module.double().eval(), plan


def _loss(module: nn.Module, example: Any) -> Tensor:
    if isinstance(module, ResNet):
        x, y = example
        return F.mse_loss(module(x.double()), y.double())
    if isinstance(module, LightningModule):
        return F.cross_entropy(module(example[:, :-1]).flatten(0, 1), example[:, 1:].flatten())
    if isinstance(example, dict):
        example = {k: v.double() if v.is_floating_point() else v for k, v in example.items()}
        loss: Tensor = module(**example).loss
        return loss
    output = module(*(v.double() if v.is_floating_point() else v for v in example))
    return (output - torch.linspace(-1, 1, output.shape[-1])).square().mean()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_run(architecture: Architecture, name: str) -> None:
    hooked, plan = _made(architecture)
    folded = copy.deepcopy(hooked)
    with_sites = all(multiplier.site is not None for multiplier in plan.multipliers)
    if with_sites:
        attach_multipliers(hooked, plan)
    else:
        with pytest.raises(ValueError, match="cannot be attached as a hook"):
            attach_multipliers(hooked, plan)
        return
    fold(folded, plan)
    torch.testing.assert_close(
        _loss(folded, architecture.example), _loss(hooked, architecture.example), rtol=1e-13, atol=0
    )

    losses = []
    for module in (hooked, folded):
        optimizer = OPTIMIZERS[name](module.parameters())
        scale_optimizer(optimizer, module, plan)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = _loss(module, architecture.example)
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-9, atol=0)
    factors = {parameter: scale.multiplier for parameter, scale in plan.scales("sgd").items()}
    others = dict(folded.named_parameters())
    for parameter, value in hooked.named_parameters():
        torch.testing.assert_close(
            others[parameter],
            value * factors[parameter],
            rtol=1e-8,
            atol=1e-10,
            msg=lambda text, p=parameter: f"{p}: {text}",
        )


def test_a_folded_module_is_a_plain_module_of_the_same_function(architecture: Architecture) -> None:
    """Its weights in a module without any hooks give the same output, unless a readout is tied or a norm ends a branch."""
    module, plan = _made(architecture)
    if not all(multiplier.folds for multiplier in plan.multipliers):
        assert architecture.tied or architecture.unfoldable
        return
    fold(module, plan)
    plain = architecture.build(2, 4, 32).double().eval()
    plain.load_state_dict(module.state_dict())
    assert torch.equal(_loss(plain, architecture.example), _loss(module, architecture.example))
