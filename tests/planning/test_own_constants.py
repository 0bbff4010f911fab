"""Constants that a model itself has: with a plan, it trains as the same model does with the constants of its base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import residual_networks
from helpers.architectures import LANGUAGE_MODELS
from torch import Tensor, nn, optim
from torch.nn import functional as F

from mlu_lightning import Plan, attach_multipliers, discover, fold, initialize, scale_optimizer
from mlu_lightning.observation.verification import verify

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, c: Constants, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.read, self.write = (
            nn.LayerNorm(width, eps=0),
            nn.Linear(width, hidden),
            nn.Linear(hidden, width),
        )
        self.after = nn.LayerNorm(width, eps=0) if c.place == "on the stream" else nn.Identity()
        self.c = c

    def forward(self, stream: Tensor) -> Tensor:
        c = self.c
        units = torch.tanh(self.read(self.norm(stream) * c.of("before units")) * c.of("on units"))
        written = self.write(units * c.of("before writing"))
        if c.place == "added by alpha":
            return torch.add(stream, written, alpha=c.value)
        if c.place == "on the stream":
            return self.after(stream * c.value + written)
        return stream + c.of("on branches") * written


class Constants:
    """A number at one place of a network, or the same in a tensor."""

    def __init__(self, place: str, value: float) -> None:
        self.place, self.value = place, value

    def of(self, place: str) -> float:
        return self.value if place == self.place else 1.0


class Net(nn.Module):
    def __init__(self, place: str, value: float, depth: int, width: int, hidden: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c = c = Constants(place, value)
        self.embed, self.blocks = nn.Linear(3, width), nn.ModuleList(Block(c, width, hidden) for _ in range(depth))
        self.norm, self.readout = nn.LayerNorm(width), nn.Linear(width, 2)
        self.register_buffer("number", torch.tensor(c.of("in a buffer")))

    def forward(self, x: Tensor) -> Tensor:
        c = self.c
        stream = self.embed(x) * c.of("on embeddings") * self.number.to(x.dtype)
        for block in self.blocks:
            stream = block(stream)
        outputs = self.readout(self.norm(stream) * c.of("before the readout")) * torch.tensor(c.of("on outputs"))
        return 30 * torch.tanh(outputs / 30)


PLACES = ["before units", "on units", "before writing", "on branches", "added by alpha", "on the stream"]
PLACES += ["on embeddings", "in a buffer", "before the readout", "on outputs"]
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda parameters: optim.SGD(parameters, lr=0.02, momentum=0.5, weight_decay=0.1),
    "adam": lambda parameters: optim.Adam(parameters, lr=0.01, weight_decay=0.1, eps=1e-3),
    "adamw": lambda parameters: optim.AdamW(parameters, lr=0.01, weight_decay=0.1, eps=1e-3),
}


def trained(module: nn.Module, plan: Plan, folded: bool, make: Any) -> Tensor:
    initialize(module, plan)
    _ = fold(module, plan) if folded else attach_multipliers(module, plan)
    optimizer = make(module.parameters())
    scale_optimizer(optimizer, module, plan)
    for _ in range(4):
        optimizer.zero_grad()
        (module(X) - X[:, :2]).square().mean().backward()
        optimizer.step()
    found: Tensor = module(X)
    return found.detach()


@pytest.mark.parametrize("place", PLACES)
def test_product_of_constant_and_plan_follows_the_table(place: str) -> None:
    """The base has 1/2 where the module has 1/8."""
    base, shape = Net(place, 0.5, 2, 4, 8), (4, 16, 32)
    plan = Plan.from_model(Net(place, 0.125, *shape), X, base=base)
    said = "8 (base 2)" if place == "on the stream" else "0.125 (base 0.5)"
    assert plan.own_constants and said in str(plan) and "of the module's own" not in str(plan)
    as_base = Plan.from_model(Net(place, 0.5, *shape), X, base=base)
    assert not as_base.own_constants
    saved = Plan.from_yaml(plan.to_yaml(), "saved")
    for family, folded in (("sgd", False), ("adam", True), ("adamw", True)):
        outputs = [
            trained(Net(place, value, *shape), each, folded, OPTIMIZERS[family])
            for value, each in ((0.125, saved), (0.5, as_base))
        ]
        torch.testing.assert_close(*outputs)
    module = initialize(Net(place, 0.125, *shape), plan)
    attach_multipliers(module, plan)
    verify(module, base, plan, X)
    again = Plan.from_model(Net(place, 0.125, *shape), X, base=saved)
    assert again.multipliers == plan.multipliers and again.scales("sgd") == plan.scales("sgd")
    standard = Plan.from_model(Net(place, 0.125, *shape), X, base=base, parameterization="sp")
    assert not standard.own_constants and {m.value for m in standard.multipliers} == {1.0}


def test_gemma_and_t5() -> None:
    """sqrt(D) on a tied table, whose logits have a cap; D^(-1/2) on the logits of another, and no such thing untied."""
    plans = {
        name: Plan.from_model((a := LANGUAGE_MODELS[name]).build(1, 4, 64), a.example, base=a.build(1, 2, 16))
        for name in ("gemma2", "tied t5", "t5")
    }
    tables = {name: (plan, next(iter(plan.parameters))) for name, plan in plans.items()}
    products = {}
    for name, (plan, table) in tables.items():
        readout = next(multiplier for multiplier in plan.multipliers if multiplier.kind == "readout")
        own = 2.0 if name == "gemma2" else 1.0, 0.5 if name == "tied t5" else 1.0
        std = plan.scales("adamw")[table].std
        products[name] = std * own[0], (1.0 if name == "t5" else std) * own[1] * readout.value
    assert products == {name: pytest.approx((1.0, 0.25)) for name in plans}


class Attention(nn.Module):
    """Logits are multiplied by a power of D, which is not that of head_dim."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.width = heads, 8 * heads
        self.embed, self.readout = nn.Embedding(5, self.width), nn.Linear(self.width, 5)
        self.qkv, self.out = nn.Linear(self.width, 3 * self.width), nn.Linear(self.width, self.width)

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.embed(tokens)
        q, k, v = (t.unflatten(-1, (self.heads, 8)).transpose(1, 2) for t in self.qkv(stream).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2) * self.width**-0.5).softmax(-1)
        found: Tensor = self.readout(stream + self.out((weights @ v).transpose(1, 2).flatten(2)))
        return found


def test_factor_on_logits_that_depends_on_the_shape() -> None:
    plan = Plan.from_model(Attention(8), torch.ones(1, 3, dtype=torch.long), base=Attention(2))
    (logits,) = (multiplier for multiplier in plan.multipliers if multiplier.kind == "logits")
    assert logits.value == pytest.approx(2.0) and not plan.warnings


class Other(nn.Module):
    """Residual additions with what is read as no constant, or cannot be compensated."""

    def __init__(self, kind: str, depth: int) -> None:
        super().__init__()
        self.embed, self.readout, self.kind = nn.Linear(3, 4), nn.Linear(4, 2), kind
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embed(x)
        for place, block in enumerate(self.blocks, 1):
            added, keep = block(stream), 1 - place / 10
            if self.kind == "kept with a probability":
                stream = stream + added / keep * torch.floor(keep + torch.rand(len(x), 1))
            elif self.kind == "along the depth":
                stream = stream + added / place
            elif self.kind == "of the stream":
                stream = (stream + added) * 0.5**0.5
        return self.readout(F.dropout(stream, 0.5))


@pytest.mark.parametrize(
    ("kind", "warning"),
    [
        ("kept with a probability", ""),
        ("along the depth", "multiplied by numbers of the module's own that differ along the depth"),
        ("of the stream", "the stream is multiplied by 0.7071 from each addition to the next"),
    ],
)
def test_what_cannot_be_compensated_is_said(kind: str, warning: str) -> None:
    plan = Plan.from_model(Other(kind, 4), X, base=Other(kind, 2))
    assert not plan.own_constants and {multiplier.value for multiplier in plan.multipliers} == {0.5, 1.0}
    assert warning in " ".join(plan.warnings) and bool(plan.warnings) == bool(warning)


def test_a_gain_on_what_has_length_one_and_is_multiplied_by_the_root_of_its_entries() -> None:
    def net(width: int) -> nn.Module:
        def forward(net: Any, x: Tensor) -> Any:
            h = net.embed(x)
            normed = F.normalize(net.read(h), dim=-1) * net.gain * width**0.5
            return net.out(h + net.write(torch.tanh(normed)))

        shapes = {"embed": (3, 4), "read": (4, width), "write": (width, 4), "out": (4, 2)}
        parts = {name: nn.Linear(*shape) for name, shape in shapes.items()}
        return residual_networks.Net(forward, blocks=nn.Identity(), gain=nn.Parameter(torch.ones(width)), **parts)

    plan = Plan.from_model(net(32), X, base=net(8))
    assert plan.parameters["gain"].constant_ratio == 1 and plan.scales("adamw")["gain"].std == 1


def test_a_learned_scalar_is_no_constant() -> None:
    net = Net("on branches", 0.5, 2, 4, 8)
    net.blocks[0].c.value = nn.Parameter(torch.tensor(0.5))  # type: ignore[assignment]
    net.gain = net.blocks[0].c.value  # type: ignore[assignment]
    structure = discover(net, X)
    assert {branch.constant for branch in structure.branches} == {1.0} and structure.roles["gain"] == "branch_bounded"
