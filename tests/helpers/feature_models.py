"""Perceptrons and attentions written in many ways, each with what enters its nonlinearity or its softmax."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ATTENTIONS", "EMBEDDING", "HEADS", "INPUTS", "LENGTH", "UNITS", "AttentionNet", "UnitsNet"]

INPUTS, EMBEDDING, HIDDEN = 3, 6, 8
HEADS, LENGTH, HEAD_DIM = 4, 7, 4


@dataclass(frozen=True)
class Units:  # a perceptron's hidden units, from its block and the output of the first matrix
    form: Callable[[Any, Tensor], Tensor]
    entering: Callable[[Any, Tensor], Tensor] = lambda block, made: made  # the nonlinearity
    made: int = HIDDEN  # outputs of the first matrix


def normed(block: Any, made: Tensor) -> Tensor:
    return made * torch.rsqrt(made.square().mean(-1, keepdim=True) + 1e-6) * block.gain


def layer_normed(made: Tensor) -> Tensor:
    return F.layer_norm(made, (HIDDEN,))


def gate_last(first: Tensor, last: Tensor) -> Tensor:
    return F.silu(last) * first


FIRST, LAST = (lambda _, made: made[..., :HIDDEN]), (lambda _, made: made[..., HIDDEN:])
UNITS = {
    "relu in place": Units(lambda _, made: F.relu(made, inplace=True)),
    "doubled, relu in place": Units(lambda _, made: (2 * made).relu_(), lambda _, made: 2 * made),
    "silu by hand": Units(lambda _, made: made * torch.sigmoid(made)),
    "quick gelu": Units(lambda _, made: made * torch.sigmoid(1.702 * made)),
    "gelu by erf": Units(lambda _, made: made * 0.5 * (1 + torch.erf(made / math.sqrt(2)))),
    "squared relu": Units(lambda _, made: F.relu(made).square()),
    "leaky by hand": Units(lambda _, made: torch.maximum(made, 0.1 * made)),
    "scaled before": Units(lambda _, made: torch.tanh(made / 3), lambda _, made: made / 3),
    "swiglu of chunks": Units(lambda _, made: F.silu(made.chunk(2, -1)[0]) * made.chunk(2, -1)[1], FIRST, 2 * HIDDEN),
    "swiglu, gate last": Units(lambda _, made: gate_last(*made.chunk(2, -1)), LAST, 2 * HIDDEN),
    "swiglu of slices": Units(lambda _, made: made[..., :HIDDEN] * F.silu(made[..., HIDDEN:]), LAST, 2 * HIDDEN),
    "glu": Units(lambda _, made: F.glu(made, -1), LAST, 2 * HIDDEN),
    "bilinear": Units(lambda _, made: made[..., :HIDDEN] * made[..., HIDDEN:], FIRST, 2 * HIDDEN),
    "norm before": Units(lambda _, made: F.gelu(layer_normed(made)), lambda _, made: layer_normed(made)),
    "norm after": Units(lambda _, made: layer_normed(F.gelu(made))),
    "norm by hand": Units(lambda block, made: F.gelu(normed(block, made)), normed),
    "linear": Units(lambda _, made: made),
}


class UnitsNet(nn.Module):  # two residual perceptrons with units of one form
    def __init__(self, units: Units) -> None:
        super().__init__()
        self.embed, self.readout = nn.Linear(INPUTS, EMBEDDING), nn.Linear(EMBEDDING, 2)
        self.blocks = nn.Sequential(UnitsBlock(units), UnitsBlock(units))

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.blocks(self.embed(x)))


class UnitsBlock(nn.Module):
    def __init__(self, units: Units) -> None:
        super().__init__()
        self.norm, self.read = nn.LayerNorm(EMBEDDING), nn.Linear(EMBEDDING, units.made)
        self.gain = nn.Parameter(torch.rand(HIDDEN) + 0.5)
        self.write, self.units = nn.Linear(HIDDEN, EMBEDDING), units

    def forward(self, stream: Tensor) -> Tensor:
        return stream + self.write(self.units.form(self, self.read(self.norm(stream))))


CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
BIAS = torch.randn(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2))
fused = F.scaled_dot_product_attention


def eager(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return (query @ key.mT / math.sqrt(HEAD_DIM) + mask).softmax(-1) @ value


def routed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Another softmax comes before that of the attention."""
    return eager(query, key, value * value.softmax(-1), torch.zeros(()))


def hide(logits: Tensor) -> Tensor:
    return logits.masked_fill(~CAUSAL, -math.inf)


@dataclass(frozen=True)
class AttentionForm:  # attention as a function of queries, keys and values
    form: Callable[[Tensor, Tensor, Tensor], Tensor]
    logits: Callable[[Tensor], Tensor] = lambda logits: logits  # from products of queries and keys divided by sqrt(d_k)
    groups: int = HEADS  # heads of keys and values


ATTENTIONS = {
    "causal": AttentionForm(lambda q, k, v: fused(q, k, v, is_causal=True), hide),
    "scale": AttentionForm(lambda q, k, v: fused(q, k, v, scale=0.3), lambda logits: 0.6 * logits),
    "grouped": AttentionForm(lambda q, k, v: fused(q, k, v, enable_gqa=True), groups=2),
    "one key head": AttentionForm(lambda q, k, v: fused(q, k.expand_as(q), v.expand_as(q)), groups=1),
    "added mask": AttentionForm(lambda q, k, v: fused(q, k, v, attn_mask=BIAS), lambda logits: logits + BIAS),
    "boolean mask": AttentionForm(lambda q, k, v: fused(q, k, v, CAUSAL), hide),
    "eager, -inf": AttentionForm(lambda q, k, v: eager(q, k, v, hide(torch.zeros(LENGTH, LENGTH))), hide),
    "eager, min": AttentionForm(lambda q, k, v: eager(q, k, v, torch.finfo(q.dtype).min * ~CAUSAL), hide),
    "eager, -1e4": AttentionForm(lambda q, k, v: eager(q, k, v, -1e4 * ~CAUSAL), hide),
    "softmax along another axis": AttentionForm(lambda q, k, v: (k @ q.mT / HEAD_DIM**0.5).softmax(-2).mT @ v),
    "another softmax before": AttentionForm(routed),
}


class AttentionNet(nn.Module):  # one residual attention, in the module itself
    def __init__(self, form: AttentionForm) -> None:
        super().__init__()
        self.embed, self.readout = nn.Linear(INPUTS, EMBEDDING), nn.Linear(EMBEDDING, 2)
        self.queries, self.out = nn.Linear(EMBEDDING, HEAD_DIM * HEADS), nn.Linear(HEAD_DIM * HEADS, EMBEDDING)
        self.keys = nn.Linear(EMBEDDING, HEAD_DIM * form.groups)
        self.values = nn.Linear(EMBEDDING, HEAD_DIM * form.groups)
        self.form = form

    def parts(self, stream: Tensor) -> list[Tensor]:
        made = (project(stream) for project in (self.queries, self.keys, self.values))
        return [part.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in made]

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embed(x)
        return self.readout(stream + self.out(self.form.form(*self.parts(stream)).transpose(1, 2).flatten(2)))
