"""Weights that act at several places along the depth: theory.md, "Weights that are used more than once along the depth"."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.architectures import LANGUAGE_MODELS
from lightning.pytorch import LightningModule
from torch import Tensor, nn, optim
from torch.nn import functional as F

from mlu_lightning import Plan, Shape, check, discover, initialize, scale_optimizer
from mlu_lightning.application import attach_multipliers, fold
from mlu_lightning.table import OptimizerFamily, Parameterization, Ratios, Role, scale

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, stream: Tensor) -> Tensor:
        return self.write(torch.tanh(self.read(stream)))


class Looped(nn.Module):
    """Blocks of which each is applied again and again, with a norm after each addition if ``post_norm``."""

    def __init__(
        self, depth: int, hidden: int = 8, embedding: int = 4, blocks: int = 1, post_norm: bool = False
    ) -> None:
        super().__init__()
        self.embed, self.readout = nn.Linear(3, embedding), nn.Linear(embedding, 2)
        self.blocks = nn.ModuleList(Block(hidden, embedding) for _ in range(blocks))
        self.norm = nn.LayerNorm(embedding) if post_norm else nn.Identity()
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embed(x)
        for place in range(self.depth):
            stream = self.norm(stream + self.blocks[place % len(self.blocks)](stream))
        return self.readout(stream)


class Modulated(nn.Module):
    """Blocks that read what one matrix makes for all of them: the same if ``again``, or each a part of its own."""

    def __init__(self, depth: int, again: bool) -> None:
        super().__init__()
        self.embed, self.readout = nn.Linear(3, 4), nn.Linear(4, 2)
        self.blocks = nn.ModuleList(Block(8, 4) for _ in range(depth))
        self.modulation, self.again = nn.Linear(3, 4 if again else 4 * depth), again

    def forward(self, x: Tensor) -> Tensor:
        stream, made = self.embed(x), torch.tanh(self.modulation(x))
        parts = [made] * len(self.blocks) if self.again else made.chunk(len(self.blocks), -1)
        for block, part in zip(self.blocks, parts, strict=True):
            stream = stream + block(stream * part)
        return self.readout(stream)


class Steps(nn.Module):
    """Two matrices applied again and again, with what each time has of its own, and the input given to it each time."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed, self.join, self.readout = nn.Linear(3, 4), nn.Linear(8, 4), nn.Linear(4, 2)
        self.read, self.write = nn.Linear(4, 8), nn.Linear(8, 4)
        self.times, self.rows = nn.Embedding(depth, 4), nn.Parameter(torch.randn(depth, 4))
        self.own = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        given = self.embed(x)
        stream = torch.zeros_like(given)
        for step, own in enumerate(self.own):
            stream = self.join(torch.cat((stream + self.times(torch.tensor([step])), given), -1))
            stream = stream + self.write(torch.tanh(self.read(stream) + own(stream + self.rows[step]).repeat(1, 2)))
        return self.readout(stream)


class Twice(nn.Module):
    """Two forward passes of a network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Looped(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) - self.net(-x)


PLACES = {
    "one block, looped": (Looped(3), "blocks.0.read.weight", 3),
    "two blocks in turn": (Looped(6, blocks=2), "blocks.1.write.bias", 3),
    "a norm of the stream": (Looped(3, blocks=3, post_norm=True), "norm.weight", 3),
    "blocks of their own": (Looped(3, blocks=3), "blocks.1.read.weight", 1),
    "a readout": (Looped(3), "readout.weight", 1),
    "two forward passes": (Twice(), "net.blocks.0.read.weight", 3),
    "what all blocks read": (Modulated(3, again=True), "modulation.weight", 3),
    "parts of what all blocks read": (Modulated(3, again=False), "modulation.weight", 1),
}


@pytest.mark.parametrize(("module", "name", "uses"), PLACES.values(), ids=PLACES.keys())
def test_places_at_which_a_parameter_acts(module: nn.Module, name: str, uses: int) -> None:
    structure = discover(module, X)
    assert structure.parameters[name].uses == uses
    assert not any("share" in warning for warning in structure.warnings)


def test_what_each_loop_has_of_its_own_acts_once() -> None:
    parameters = Plan.from_model(Steps(6), X, base=Steps(2)).parameters
    again = {"join", "read", "write"}
    ratios = {name: parameter.uses / parameter.base_uses for name, parameter in parameters.items()}
    assert ratios == {name: 3 if name.split(".")[0] in again else 1 for name in ratios}
    assert {parameters[name].role for name in ("times.weight", "embed.weight")} == {Role.EMBEDDING}


def test_branches_that_write_with_one_matrix_are_multiplied_as_one() -> None:
    torch.manual_seed(0)
    module, plain = Steps(6), Steps(6)
    plain.load_state_dict(module.state_dict())
    plan = Plan.from_model(module, X, base=Steps(2))
    (branch,) = plan.branches
    assert (branch.name, set(plan.multipliers[0].folds)) == ("", {"write.weight", "write.bias"})
    plain.write.register_forward_hook(lambda module, args, output: output / 3)
    torch.testing.assert_close(fold(copy.deepcopy(module), plan)(X), plain(X))
    attach_multipliers(module, plan)
    torch.testing.assert_close(module(X), plain(X))


def test_tables_of_positions_of_t5() -> None:
    t5 = LANGUAGE_MODELS["t5"]
    plan = Plan.from_model(t5.build(2, 2, 16), t5.example, base=t5.build(1, 2, 16))
    uses = {name: (parameter.uses, parameter.base_uses) for name, parameter in plan.parameters.items()}
    table = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    tables = {table.format(part): (2, 1) for part in ("encoder", "decoder")}
    assert uses == dict.fromkeys(uses, (1, 1)) | tables


@pytest.mark.parametrize("family", OptimizerFamily)
@pytest.mark.parametrize("role", [role for role in Role if role is not Role.FROZEN])
def test_gradients_of_all_uses_add_up(role: Role, family: OptimizerFamily) -> None:
    once = scale(role, Ratios(depth=4.0, inputs=2.0, outputs=8.0), family)
    often = scale(role, Ratios(depth=4.0, inputs=2.0, outputs=8.0, uses=4.0), family)
    l2 = 4 if family in ("sgd", "adam") else 1
    expected = replace(
        once, lr=once.lr / (4 if family == "sgd" else 1), eps=once.eps * 4, weight_decay=once.weight_decay * l2
    )
    assert often == expected
    for other in (Parameterization.MUP, Parameterization.SP):
        looped, plain = (scale(role, Ratios(uses=k), family, parameterization=other) for k in (4.0, 1.0))
        assert looped == plain


# l and k are 4, m is 8 and d is 2: g loses 1/l at each looped parameter, and keeps it at the others
LOOPED = {"read.weight": (2, 1 / 8), "read.bias": (1, 1 / 8), "write.weight": (8, 1 / 2), "write.bias": (1, 1 / 2)}
OTHERS = {"embed.weight": (1, 1 / 2), "embed.bias": (1, 1 / 2), "readout.weight": (1, 1 / 2), "readout.bias": (1, 1)}
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda groups: optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.25),
    "adam": lambda groups: optim.Adam(groups, lr=0.01, weight_decay=0.25, eps=1e-3),
    "adamw": lambda groups: optim.AdamW(groups, lr=0.01, weight_decay=0.25, eps=1e-3),
}


@pytest.mark.parametrize("family", OPTIMIZERS)
def test_run_is_that_of_groups_by_hand(family: str) -> None:
    torch.manual_seed(0)
    base, module = Looped(2), Looped(8, 64, 8)
    plan = Plan.from_yaml(Plan.from_model(module, X, base=base).to_yaml(), "saved")
    by_hand = Looped(8, 64, 8)
    by_hand.load_state_dict(initialize(module, plan).state_dict())
    attach_multipliers(module, plan)
    optimizer = OPTIMIZERS[family](module.parameters())
    scale_optimizer(optimizer, module, plan)
    groups = []
    for name, parameter in by_hand.named_parameters():
        n, g = {f"blocks.0.{key}": value for key, value in LOOPED.items()}.get(name) or OTHERS[name]
        made = OPTIMIZERS[family]([parameter]).param_groups[0]
        lr, decay = (1 / (n * g), n * g) if family == "sgd" else (1 / n, n if family == "adamw" else n * g)
        group = {"params": [parameter], "lr": made["lr"] * lr, "weight_decay": made["weight_decay"] * decay}
        groups.append(group | ({"eps": made["eps"] * g} if "eps" in made else {}))
    other = OPTIMIZERS[family](groups)
    by_hand.blocks[0].register_forward_hook(lambda module, args, output: output / 4)
    by_hand.readout.register_forward_pre_hook(lambda module, args: (args[0] / 2,))
    for net, steps in ((module, optimizer), (by_hand, other)):
        for _ in range(4):
            steps.zero_grad()
            net(X).square().mean().backward()
            steps.step()
    for mine, theirs in zip(module.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


class Training(LightningModule):
    """A looped network in a training."""

    def __init__(self, depth: int, hidden: int, embedding: int, family: str) -> None:
        super().__init__()
        self.net, self.family = Looped(depth, hidden, embedding), family

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.family](self.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sgd", "adamw"])
def test_check_passes_along_the_number_of_loops(family: str) -> None:
    inputs = torch.randn(8, 16, 3, generator=torch.Generator().manual_seed(0))
    batches = [(x, torch.stack((x[:, 0] * x[:, 1], x[:, 2].abs()), 1)) for x in inputs]

    def build(depth: int, hidden: int, embedding: int) -> LightningModule:
        return Training(depth, hidden, embedding, family)

    report = check(build, Shape(2, 64, 16), batches, axes=["depth"])
    assert report.verdict == "pass", report
