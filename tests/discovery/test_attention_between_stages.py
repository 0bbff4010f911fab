"""Biases of the logits of an attention that the stream goes through where stages meet: one for each head."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlu_lightning import Plan

X = torch.linspace(-1, 1, 2 * 4 * 3).reshape(2, 4, 3)
PAIRS = torch.arange(16).reshape(4, 4)


class Stages(nn.Module):
    """A block, an attention without a residual addition, and a block of another dimension."""

    def __init__(self, heads: int, bias: Callable[[Any], Tensor], shape: Callable[[int], tuple[int, ...]]) -> None:
        super().__init__()
        sizes, self.bias = (8 * heads, 12 * heads), bias
        self.embed, self.readout, self.heads = nn.Linear(3, sizes[0]), nn.Linear(sizes[1], 5), heads
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(s, 9), nn.ReLU(), nn.Linear(9, s)) for s in sizes)
        self.queries, self.keys, self.values = (nn.Linear(sizes[0], 4 * heads) for _ in range(3))
        self.write, self.table = nn.Linear(4 * heads, sizes[1]), nn.Parameter(torch.zeros(shape(heads)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.blocks[0](x)
        q, k, v = (m(x).unflatten(-1, (self.heads, 4)).transpose(1, 2) for m in (self.queries, self.keys, self.values))
        x = self.write(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return self.readout(x + self.blocks[1](x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT / 2 + self.bias(self.table)).softmax(-1) @ v


class Fused(Stages):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, self.bias(self.table).expand(2, -1, -1, -1))


BIASES: dict[str, tuple[Callable[[Any], Tensor], Callable[[int], tuple[int, ...]]]] = {
    "indexed": (lambda table: table[:, PAIRS], lambda heads: (heads, 16)),
    "looked up": (lambda table: F.embedding(PAIRS, table).permute(2, 0, 1), lambda heads: (16, heads)),
    "whole": (lambda table: table, lambda heads: (heads, 4, 4)),
    "a slope": (lambda table: table * PAIRS, lambda heads: (1, heads, 1, 1)),
}


@pytest.mark.parametrize("kind", [Stages, Fused])
@pytest.mark.parametrize("name", BIASES)
def test_biases_of_logits_have_the_gradients_of_heads(name: str, kind: type[Stages]) -> None:
    plan = Plan.from_model(kind(6, *BIASES[name]), (X,), base=kind(2, *BIASES[name]))
    found = {family: plan.scales(family)["table"] for family in ("adamw", "sgd")}
    # one of m = 3 heads makes 1/m of the output, at any depth
    assert [(scale.std, scale.lr) for scale in found.values()] == [(1, 1), (1, pytest.approx(3))]
