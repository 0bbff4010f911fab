"""Roles of gains, temperatures and sinks of attention heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.residual_networks import Net
from torch import Tensor, nn
from torch.nn import functional as F

from mlu_lightning import discover

X = torch.linspace(-1, 1, 120).reshape(3, 8, 5)
D = 16


class NormedAttention(nn.Module):
    """Attention with norms of queries and keys, a temperature and a sink for every head."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.embed, self.out = nn.Linear(5, D), nn.Linear(D, 3)
        self.qkv = nn.Linear(D, 3 * heads * head_dim, bias=False)
        self.write = nn.Linear(heads * head_dim, D, bias=False)
        self.shared_gain = nn.Parameter(torch.ones(head_dim))
        self.gain = nn.Parameter(torch.ones(heads, head_dim))
        self.temperature = nn.Parameter(torch.zeros(heads, 1, 1))
        self.sink = nn.Parameter(torch.zeros(heads))

    def forward(self, x: Tensor) -> Any:
        h = self.embed(x)
        parts = self.qkv(h).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        queries, keys, values = parts.unbind(0)
        queries = F.rms_norm(queries, (self.head_dim,)) * self.shared_gain
        keys = F.rms_norm(keys, (self.head_dim,)) * self.gain[:, None]
        logits = queries @ keys.mT * self.temperature.exp()
        sinks = self.sink.reshape(1, -1, 1, 1).expand(len(x), -1, 8, 1)
        weights = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
        return self.out(h + self.write((weights @ values).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(("heads", "head_dim"), [(4, 4), (2, 8), (1, 16)])
def test_gains_of_heads(heads: int, head_dim: int) -> None:
    """What has an entry for every head grows with them; what all of them share does not, however many there are."""
    structure = discover(NormedAttention(heads, head_dim), (X,))
    assert not structure.unassigned
    (branch,) = structure.branches
    assert (branch.kind, branch.hidden, branch.head_dim) == ("attention", heads, head_dim)
    assert structure.roles["shared_gain"] == "branch_bounded"
    assert structure.parameters["gain"].fan_out == heads * head_dim
    if heads == 1:  # a single number shows nothing of what it is for
        assert structure.roles["temperature"] == structure.roles["sink"] == "branch_bounded"
        return
    assert {structure.roles[name] for name in ("gain", "temperature", "sink")} == {"branch_in_bias"}
    assert structure.parameters["temperature"].fan_out == structure.parameters["sink"].fan_out == heads


def flat_norm(heads: int) -> Net:
    """A norm of all queries, of all heads together."""

    def forward(net: Net, x: Tensor) -> Any:
        h = net.embed(x)
        queries, keys, values = net.blocks(h).chunk(3, -1)
        parts = (net.norm(queries), net.norm(keys), values)
        made = F.scaled_dot_product_attention(*(part.unflatten(-1, (heads, 8)).transpose(1, 2) for part in parts))
        return net.out(h + net.write(made.transpose(1, 2).flatten(2)))

    parts = {"embed": nn.Linear(5, D), "out": nn.Linear(D, 3), "blocks": nn.Linear(D, 24 * heads)}
    return Net(forward, write=nn.Linear(8 * heads, D), norm=nn.RMSNorm(8 * heads), **parts)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_norm_before_units_are_split_into_heads(heads: int) -> None:
    """It has the same role at one head, as a base may have, as at many."""
    assert discover(flat_norm(heads), (X,)).roles["norm.weight"] == "branch_in_bias"
