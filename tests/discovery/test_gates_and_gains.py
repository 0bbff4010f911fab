"""Gains, temperatures and gates inside of branches: their roles, and what a branch's multiplier is folded into."""

from __future__ import annotations

import copy

import pytest
import torch
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

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        parts = self.qkv(h).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        queries, keys, values = parts.unbind(0)
        queries = F.rms_norm(queries, (self.head_dim,)) * self.shared_gain
        keys = F.rms_norm(keys, (self.head_dim,)) * self.gain[:, None]
        logits = queries @ keys.mT * self.temperature.exp()
        sinks = self.sink.reshape(1, -1, 1, 1).expand(len(x), -1, 8, 1)
        weights = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
        output: Tensor = self.out(h + self.write((weights @ values).transpose(1, 2).flatten(2)))
        return output


@pytest.mark.parametrize(("heads", "head_dim"), [(4, 4), (2, 8), (1, 16)])
def test_gains_of_heads(heads: int, head_dim: int) -> None:
    """What has an entry for every head grows with them; what all of them share does not, however many there are."""
    structure = discover(NormedAttention(heads, head_dim), (X,))
    assert not structure.unassigned
    (branch,) = structure.branches
    assert (branch.kind, branch.hidden, branch.head_dim) == ("attention", heads, head_dim)
    assert structure.roles["shared_gain"] == "branch_bounded"
    per_head = {"gain": heads * head_dim, "temperature": heads, "sink": heads}
    if heads == 1:  # a single number shows nothing of what it is for
        per_head = {"gain": head_dim}
        assert structure.roles["temperature"] == structure.roles["sink"] == "branch_bounded"
    for name, entries in per_head.items():
        facts = structure.parameters[name]
        if heads > 1:
            assert facts.role == "branch_in_bias", name
        assert facts.fan_out == entries, name


class FlatNorm(nn.Module):
    """A norm of all queries, of all heads together."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.out = nn.Linear(5, D), nn.Linear(D, 3)
        self.qkv, self.write = nn.Linear(D, 24 * heads), nn.Linear(8 * heads, D)
        self.norm = nn.RMSNorm(8 * heads)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        queries, keys, values = self.qkv(h).chunk(3, -1)
        heads = (
            part.unflatten(-1, (self.heads, 8)).transpose(1, 2)
            for part in (self.norm(queries), self.norm(keys), values)
        )
        made = F.scaled_dot_product_attention(*heads)
        output: Tensor = self.out(h + self.write(made.transpose(1, 2).flatten(2)))
        return output


@pytest.mark.parametrize("heads", [1, 2])
def test_a_norm_before_units_are_split_into_heads(heads: int) -> None:
    """It has the same role at one head, as a base may have, as at many."""
    assert discover(FlatNorm(heads), (X,)).roles["norm.weight"] == "branch_in_bias"


class Gated(nn.Module):
    """A condition shifts, scales and gates two branches, by parts of one matrix, as in a diffusion transformer."""

    def __init__(self, modulated: bool) -> None:
        super().__init__()
        self.modulated = modulated
        self.embed, self.condition, self.out = nn.Linear(5, D), nn.Linear(2, D), nn.Linear(D, 3)
        self.modulation = nn.Linear(D, 6 * D)
        self.read = nn.ModuleList(nn.Linear(D, 24) for _ in range(2))
        self.write = nn.ModuleList(nn.Linear(24, D) for _ in range(2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.embed(x)
        c = F.silu(self.condition(condition))[:, None]
        parts = self.modulation(c).chunk(6, -1)
        for i, (read, write) in enumerate(zip(self.read, self.write, strict=True)):
            shift, scale, gate = parts[3 * i : 3 * i + 3]
            z = h * (1 + scale) + shift if self.modulated else h
            h = h + gate * write(torch.tanh(read(z)))
        output: Tensor = self.out(h)
        return output


@pytest.mark.parametrize("modulated", [False, True])
def test_a_branch_is_folded_into_what_writes_it_and_not_into_its_gate(modulated: bool) -> None:
    torch.manual_seed(0)
    module, example = Gated(modulated), (X, torch.ones(3, 2))
    structure = discover(module, example)
    assert not structure.unassigned and not structure.warnings
    assert [branch.folds for branch in structure.branches] == [
        (f"write.{i}.bias", f"write.{i}.weight") for i in range(2)
    ]
    assert [str(branch.site) for branch in structure.branches] == [f"write.{i} output" for i in range(2)]
    assert structure.parameters["modulation.weight"].fan_in == D
    assert structure.roles["condition.weight"] == "embedding"
    # without its branches the module is its embedding and readout
    plain = copy.deepcopy(module)
    with torch.no_grad():
        for branch in structure.branches:
            for name in branch.folds:
                plain.get_parameter(name).zero_()
        assert torch.equal(plain(*example), module.out(module.embed(X)))


class Side(nn.Module):
    """What a branch writes is read by something else, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out, self.side = nn.Linear(5, D), nn.Linear(D, 3), nn.Linear(D, 2)
        self.read, self.write = nn.Linear(D, 24), nn.Linear(24, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embed(x)
        made = self.write(torch.tanh(self.read(h)))
        return self.out(h + made), self.side(made)


def test_a_branch_that_something_else_reads_cannot_be_folded() -> None:
    (branch,) = discover(Side(), (X,)).branches
    assert (branch.site, branch.folds) == (None, ())


class Scalars(nn.Module):
    """One number for each branch, all of them in one parameter (ReZero)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(5, D), nn.Linear(D, 3)
        self.scales = nn.Parameter(torch.ones(4))
        self.read = nn.ModuleList(nn.Linear(D, 24) for _ in range(4))
        self.write = nn.ModuleList(nn.Linear(24, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for i, (read, write) in enumerate(zip(self.read, self.write, strict=True)):
            h = h + self.scales[i] * write(torch.tanh(read(h)))
        output: Tensor = self.out(h)
        return output


def test_a_number_for_each_branch_is_of_bounded_size() -> None:
    facts = discover(Scalars(), (X,)).parameters["scales"]
    assert (facts.role, facts.fan_in, facts.fan_out) == ("branch_bounded", 1, 1)
