"""Attention is what compares queries with keys: its heads, and the rows of what lies between its projections, by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import residual_networks
from torch import Tensor, nn
from torch.nn import functional as F

from mlu_lightning import Plan, discover
from mlu_lightning.discovery.structure import Structure

TOKENS = torch.zeros(2, 6, dtype=torch.long)
OFFSETS = (torch.arange(6)[:, None] - torch.arange(6)).abs()


class Block(nn.Module):
    """Projections of heads, and parameters of a form of attention, which takes queries, keys and values."""

    def __init__(self, form: str, d: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.shape, self.form = (heads, head_dim), form
        self.norm = nn.LayerNorm(d)
        self.q, self.k, self.v = (nn.Linear(d, heads * head_dim, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * head_dim, d)
        for name, sizes in FORMS[form][1].items():
            known = {"H": heads, "C": head_dim, "D": d, "M": heads * head_dim}
            setattr(self, name, nn.Parameter(torch.randn([known.get(size, size) for size in sizes])))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, self.shape).transpose(-2, -3)

    def forward(self, h: Tensor, logits: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = self.norm(h)
        made = FORMS[self.form][0](self, x, *(self.heads(f(x)) for f in (self.q, self.k, self.v)), logits)
        made, logits = made if isinstance(made, tuple) else (made, None)
        return h + self.o(made.transpose(1, 2).flatten(2)), logits


class Net(nn.Module):
    def __init__(self, form: str, d: int = 16, heads: int = 4, head_dim: int = 4) -> None:
        super().__init__()
        self.embed, self.read = nn.Embedding(9, d), nn.Linear(d, 2)
        self.blocks = nn.ModuleList(Block(form, d, heads, head_dim) for _ in range(2))

    def forward(self, tokens: Tensor) -> Any:
        h, logits = self.embed(tokens), None
        for block in self.blocks:
            h, logits = block(h, logits)
        return self.read(h)


def products(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * q.shape[-1] ** -0.5


def mixed(net: Any, a: Tensor, name: str) -> Tensor:
    return torch.einsum("bhij,hg->bgij", a, getattr(net, name))


def remixed(net: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
    a = mixed(net, products(q, k).softmax(-1), "mix").permute(0, 2, 3, 1)
    return F.layer_norm(a, a.shape[-1:], net.gain).permute(0, 3, 1, 2) @ v


def handed_on(net: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, logits: Any) -> tuple[Tensor, Tensor]:
    logits = products(q, k) if logits is None else logits + products(q, k)
    return logits.softmax(-1) @ v, logits


def over_channels(net: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
    q, k = (F.normalize(t.mT, dim=-1) for t in (q, k))
    return ((q @ k.mT * net.temperature).softmax(-1) @ v.mT).mT


def memory(net: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
    k = torch.cat((net.key.expand(2, -1, -1, -1), k), 2)
    v = torch.cat((net.null.expand(2, k.shape[1], -1, -1), v), 2)
    return products(q, k).softmax(-1) @ v


def relative(net: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
    bias = torch.einsum("bhid,ijd->bhij", q, net.table[OFFSETS]) + net.bias[:, OFFSETS]
    return ((q + net.u[:, None]) @ k.mT + bias).mul(0.5).softmax(-1) @ v


def linear(net: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
    return q.softmax(-1) @ (k.softmax(2).mT @ v)


FORMS: dict[str, tuple[Callable[..., Any], dict[str, list[Any]], dict[str, str]]] = {
    "talking heads": (
        lambda net, x, q, k, v, _: mixed(net, mixed(net, products(q, k), "before").softmax(-1), "after") @ v,
        {"before": ["H", "H"], "after": ["H", "H"]},
        {"before": "branch_hidden 4 4", "after": "branch_hidden 4 4"},
    ),
    "weights mixed and normalized": (
        *(remixed, {"mix": ["H", "H"], "gain": ["H"]}),
        {"mix": "branch_hidden 4 4", "gain": "branch_in_bias 1 4"},
    ),
    "logits handed on": (handed_on, {}, {}),
    "over channels": (over_channels, {"temperature": ["H", 1, 1]}, {"temperature": "branch_in_bias 1 4"}),
    "memory": (
        *(memory, {"key": ["H", 3, "C"], "null": [3, "C"]}),
        {"key": "branch_in_bias 1 48", "null": "branch_bounded 1 12"},
    ),
    "relative": (
        *(relative, {"table": [6, "C"], "bias": ["H", 6], "u": ["H", "C"]}),
        {"table": "branch_bounded 1 4", "bias": "branch_in_bias 1 4", "u": "branch_in_bias 1 16"},
    ),
    "biases of places": (
        lambda net, x, q, k, v, _: (products(q, k) + net.own + net.shared).softmax(-1) @ v,
        {"own": ["H", 6, 6], "shared": [6, 6]},
        {"own": "branch_in_bias 1 144", "shared": "branch_bounded 1 36"},
    ),
    "no softmax": (lambda net, x, q, k, v, _: torch.sigmoid(products(q, k)) @ v, {}, {}),
    "linear": (linear, {}, {}),
    "distances": (lambda net, x, q, k, v, _: (-torch.cdist(q, k)).softmax(-1) @ v, {}, {}),
    "sums of products": (lambda net, x, q, k, v, _: (q[..., None, :] * k[:, :, None]).sum(-1).softmax(-1) @ v, {}, {}),
}
READ = {"weights mixed and normalized", "logits handed on", "memory", "biases of places", "no softmax"}
"""Forms with a factor on logits that can be read, and queries that can be multiplied."""


def rows(structure: Structure) -> dict[str, str]:
    return {n: f"{f.row} {f.fan_in} {f.fan_out}" for n, f in structure.parameters.items()}


@pytest.mark.parametrize("form", FORMS)
def test_heads_and_rows(form: str) -> None:
    structure = discover(Net(form), TOKENS)
    assert [(b.name, b.kind, b.hidden, b.head_dim) for b in structure.branches] == [
        (f"blocks.{i}", "attention", 4, 4) for i in range(2)
    ]
    found = rows(structure)
    expected = {f"blocks.1.{name}": row for name, row in FORMS[form][2].items()}
    expected |= {f"blocks.1.{name}.weight": "branch_in 16 16" for name in "qkv"} | {
        "blocks.1.o.weight": "branch_out 16 16"
    }
    assert {name: found[name] for name in expected} == expected
    assert (structure.unassigned, structure.warnings) == ({}, ())


@pytest.mark.parametrize("form", FORMS)
def test_another_head_dim(form: str) -> None:
    """The factor of logits follows where it can be read, and nothing is planned as a perceptron where it cannot."""
    base = Net(form, d=8, heads=2)
    same = Plan.from_model(Net(form), TOKENS, base=base)
    assert not [m for m in same.multipliers if m.kind == "logits"] and not same.warnings
    if form not in READ:
        with pytest.raises(
            ValueError, match=r"head_dim of blocks\.0 is 8 and the base's is 4.*(cannot be read|nowhere)"
        ):
            Plan.from_model(Net(form, d=8, heads=2, head_dim=8), TOKENS, base=base)
        return
    plan = Plan.from_model(Net(form, d=8, heads=2, head_dim=8), TOKENS, base=base)
    assert [m.value for m in plan.multipliers if m.kind == "logits"] == [pytest.approx(0.5**0.5)] * 2


def test_keys_that_lose_their_gradients_are_refused() -> None:
    """As those that are written into a cache under no_grad, which a model may have on by default."""
    parts = {name: nn.Linear(8, 8) for name in ("embed", "q", "k", "o", "out")}

    def forward(net: residual_networks.Net, x: Tensor) -> Tensor:
        h = net.embed(x)
        cache = net.k(h).detach()
        return net.out(h + net.o(F.scaled_dot_product_attention(net.q(h), cache, cache)))

    with pytest.raises(
        ValueError, match=r"attention do not depend .* or lose their gradients in a cache.*use_cache=False"
    ):
        discover(residual_networks.Net(forward, blocks=nn.ModuleList(), **parts), torch.ones(2, 1, 4, 8))
