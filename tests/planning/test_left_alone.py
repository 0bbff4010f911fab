"""What a plan leaves alone: parts that no loss reaches, what is frozen, and copies, which begin as what they copy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from mlu_lightning import MLUCallback, Plan, attach_multipliers, fold, initialize
from mlu_lightning.observation.verification import verify

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, depth: int = 2, width: int = 4, hidden: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.readout = nn.Linear(3, width), nn.Linear(width, 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width)) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embed(x)
        for block in self.blocks:
            stream = stream + block(stream)
        found: Tensor = self.readout(stream)
        return found


class With(nn.Module):
    """A network beside parts that its output does not depend on."""

    def __init__(self, *shape: int, **parts: nn.Module) -> None:
        super().__init__()
        self.net = Net(*shape)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            targets = sum(part(x).sum() for name, part in self.named_children() if name in ("extractor", "teacher"))
        return self.net(x) - targets


LARGE = (4, 16, 32)


@pytest.mark.parametrize("of_base", [False, True])
def test_parts_that_no_loss_reaches(of_base: bool) -> None:
    """A metric's network, a second head and an extractor of targets, which the base may not have."""

    def parts() -> dict[str, nn.Module]:
        return {"metric": nn.Linear(2, 5), "head": nn.Linear(16, 2), "extractor": nn.Linear(3, 7)}

    module, base = With(*LARGE, **parts()), With(**parts() if of_base else {})
    before = copy.deepcopy(module.state_dict())
    plan = Plan.from_yaml(Plan.from_model(module, X, base=base).to_yaml(), "saved")
    left_alone = {name for name, role in plan.roles.items() if role == "frozen"}
    assert left_alone == {name for name in before if not name.startswith("net.")}
    initialize(module, plan)
    assert {name for name, value in module.state_dict().items() if torch.equal(value, before[name])} >= left_alone
    assert all(plan.scales("sgd")[name].lr == 1 for name in left_alone)
    assert "6 tensors are left alone (frozen): metric.weight and 5 more" in str(plan)
    assert Plan.from_model(With(*LARGE, **parts()), X, base=plan).parameters == plan.parameters
    plan.check(With(*LARGE))  # as where a metric is made by another module


def test_frozen_values_are_not_rescaled_unless_drawn_anew() -> None:
    module, base = Net(*LARGE), Net()
    module.embed.weight.requires_grad_(False).mul_(3)
    module.blocks[1][0].weight.requires_grad_(False)
    loaded = copy.deepcopy(module.state_dict())
    plan = Plan.from_model(module, X, base=base)
    assert plan.roles["embed.weight"] == "embedding"  # so that it learns by the table once it is thawed
    initialize(module, plan)
    same = {name for name, value in module.state_dict().items() if torch.equal(value, loaded[name])}
    assert same >= {"embed.weight", "blocks.1.0.weight"} and "blocks.0.0.weight" not in same
    handle = attach_multipliers(module, plan)
    verify(module, base, plan, X)
    handle.remove()
    initialize(module, plan, "normal")
    assert not torch.equal(module.embed.weight, loaded["embed.weight"])


def teacher(separately: bool, shape: tuple[int, ...] = LARGE) -> With:
    module = With(*shape)
    module.teacher = copy.deepcopy(module.net).requires_grad_(False)
    if separately:
        nn.init.normal_(module.teacher.embed.weight)
    return module


@pytest.mark.parametrize("put", [attach_multipliers, fold])
@pytest.mark.parametrize("said", [False, True])
def test_a_copy_begins_as_what_it_copies(said: bool, put: Any) -> None:
    """Equal values show it, or else the user says it."""
    module, base = teacher(separately=said), teacher(said, (2, 4, 8))
    overrides = {"teacher.*": "copy_of net"} if said else {}
    plan = Plan.from_yaml(Plan.from_model(module, X, base=base, overrides=overrides).to_yaml(), "saved")
    assert "20 of which begin as copies of others: teacher.embed.weight and " in str(plan)
    initialize(module, plan)
    put(module, plan)
    torch.testing.assert_close(module.teacher(X), module.net(X), rtol=0, atol=0)
    assert not torch.equal(module.net(X), Net(*LARGE)(X))


def test_two_networks_that_are_built_alike_are_no_copies() -> None:
    module = With(*LARGE, teacher=nn.Linear(3, 16), extractor=nn.Linear(3, 16))
    nn.init.zeros_(module.teacher.bias), nn.init.zeros_(module.extractor.bias)
    assert not any(entry.copy_of for entry in Plan.from_model(module, X, base=With()).parameters.values())
    with pytest.raises(
        ValueError, match=r"teacher a copy of net\.blocks, but teacher\.weight \[16, 3\] has no counterpart"
    ):
        Plan.from_model(module, X, overrides={"teacher.*": "copy_of net.blocks"})


def test_a_role_that_the_user_gives() -> None:
    plan = Plan.from_model(Net(*LARGE), X, base=Net(), overrides={"readout.*": "frozen", "blocks.*.2.bias": "frozen"})
    assert not [multiplier for multiplier in plan.multipliers if multiplier.kind == "readout"]
    assert {multiplier.folds for multiplier in plan.multipliers} == {()}  # what is frozen holds no multiplier
    assert plan.scales("adamw")["readout.weight"].lr == 1


class Alternating(LightningModule):
    """Trains one of two networks at a time, so that the loss of the first batch reaches one of them."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.first, self.second = Net(*shape), Net(*shape)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.second if self.global_step % 2 else self.first)(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("overrides", [None, {"second.*": "frozen"}])
def test_a_gradient_of_what_was_left_alone_is_said(
    overrides: dict[str, str] | None, recwarn: pytest.WarningsRecorder
) -> None:
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=1)
    callback = MLUCallback(Alternating(), overrides=overrides)
    Trainer(max_epochs=1, accelerator="cpu", barebones=True, callbacks=[callback]).fit(Alternating(*LARGE), data)
    said = sum("is one of 20 parameters that the plan leaves" in str(warning.message) for warning in recwarn)
    assert said == (overrides is None)
