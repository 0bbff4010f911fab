"""Trained models that leave the package, and how a test sees that leaving was refused."""

import copy
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from helpers.architectures import ARCHITECTURES, Architecture
from helpers.trainers import loader, quiet
from mlu_lightning import MLUCallback, Plan, attach_multipliers
from mlu_lightning.application import residual_state

Mode = Literal["hook", "fold"]
Shape = tuple[int, int, int]

BASE, TWICE, THRICE = (1, 2, 16), (2, 4, 32), (3, 6, 48)


class Lit(LightningModule):  # a Hugging Face model as an attribute, as most people have it
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def predict_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch).logits

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def lit(architecture: Architecture, shape: Shape) -> Lit:
    torch.manual_seed(0)
    return Lit(architecture.build(*shape))


def trained(
    architecture: Architecture, mode: Mode, shape: Shape, plan: Plan | None = None
) -> tuple[Lit, Plan, Trainer]:
    module, planned = lit(architecture, shape), {"base": lit(architecture, BASE), "alpha": 0.5}
    callback = MLUCallback(**({"plan": plan} if plan else planned), residual=mode)
    trainer = quiet(callback, max_epochs=2)
    trainer.fit(module, loader([architecture.example]))
    assert callback.plan is not None
    assert {m.kind for m in callback.plan.multipliers} == {"branch", "readout"}
    return module, callback.plan, trainer


@torch.no_grad()
def logits(module: Any, architecture: Architecture) -> Tensor:
    return (module.model if isinstance(module, Lit) else module).eval()(**architecture.example).logits


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def multiplied(
    build: Any, example: Any, *shapes: Any, double: bool = True, alpha: float = 1.5, gains: bool = True
) -> tuple[Any, Plan]:
    torch.manual_seed(0)
    base, module = (build(*shape) for shape in shapes)
    module = module.double() if double else module
    plan = Plan.from_model(module, example, base=base, alpha=alpha)
    plan = plan if gains else without_gains(plan)
    attach_multipliers(module, plan)
    return module.eval(), plan


def without_gains(plan: Plan) -> Plan:
    """As of a model whose readout reads what has no gain."""
    return replace(plan, multipliers=tuple(replace(each, gains=()) for each in plan.multipliers))


def tied_llama() -> tuple[Any, Plan]:
    architecture = ARCHITECTURES["tied llama"]
    return multiplied(architecture.build, architecture.example, BASE, TWICE, double=False, alpha=1.0, gains=False)


def assert_refused(leave: Any, module: nn.Module, plan: Plan, message: str, error: Any = ValueError) -> None:
    state, count, mark = copy.deepcopy(module.state_dict()), hooks(module), residual_state(module)
    with pytest.raises(error, match=message):
        leave(module, plan)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert (hooks(module), residual_state(module)) == (count, mark)
