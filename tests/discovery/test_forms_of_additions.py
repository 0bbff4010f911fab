"""Residual additions in other forms than ``h + branch(h)``, and sums that look like them, by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.residual_networks import Block, Net
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from mlu_lightning import Plan, attach_multipliers, discover, fold

X = torch.linspace(-1, 1, 60).reshape(4, 5, 3)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 4)).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, queries: Tensor, memory: Tensor) -> Any:
        attended = F.scaled_dot_product_attention(heads(self.q(queries)), heads(self.k(memory)), heads(self.v(memory)))
        return self.o(attended.transpose(1, 2).flatten(2))


def pooled(net: Net, x: Tensor) -> Any:
    """The last block has one query, whose branch is added to all tokens."""
    h = net.embed(x)
    for last, attention in enumerate(net.mixers):
        normed = attention.norm(h)
        h = h + attention(normed[:, :1] if last else normed, normed)
    return net.out(h)


def summed(net: Net, x: Tensor) -> Any:
    h = net.embed(x)
    for block in net.blocks:
        h = sum([h, block(h)])
    return net.out(h)


def skipped(net: Net, x: Tensor) -> Any:
    """All blocks are skipped by one sum, and the embedding is added again to each."""
    h = start = net.embed(x)
    for block in net.blocks:
        h = h + 0.1 * start
        h = h + block(h)
    return net.out(net.last(h) + start)


def gained(net: Net, x: Tensor) -> Any:
    h = net.embed(x)
    for gain, block in zip(net.gains, net.blocks, strict=True):
        h = gain * h + block(h)
    return net.out(h)


def reversible(net: Net, x: Tensor) -> Any:
    """Two streams, each of which is added to the other."""
    a = b = net.embed(x)
    for block in (*net.blocks, *net.more):
        a, b = b, a + block(b)
    return net.out(torch.cat((a, b), 1))


def queried(net: Net, x: Tensor) -> Any:
    """Latents begin as a parameter and read data."""
    h = net.latents.expand(len(x), -1, -1)
    for attention, block in zip(net.mixers, net.blocks, strict=True):
        h = h + attention(attention.norm(h), net.embed(x))
        h = h + block(h)
    return net.out(h)


def placed(net: Net, x: Tensor) -> Any:
    """Learned positions of queries are added to what every block reads; the stream begins at 0."""
    memory, positions = net.embed(x), net.latents.expand(len(x), -1, -1)
    h = torch.zeros(len(x), 2, 8)
    for attention, block in zip(net.mixers, net.blocks, strict=True):
        h = attention.norm(h + attention(h + positions, memory))
        h = h + block(h)
    return net.out(h)


def prompted(net: Net, x: Tensor) -> Any:
    """A class token is joined with what it reads."""
    h, token = net.embed(x), net.latents[:, :1].expand(len(x), -1, -1)
    for attention in net.mixers:
        both = attention.norm(torch.cat((token, h), 1))
        token = token + attention(both[:, :1], both)
    return net.out(token)


def handed_on(net: Net, x: Tensor) -> Any:
    """Logits are added to those of the block before."""
    h, before = net.embed(x), None
    for attention in net.mixers:
        normed = attention.norm(h)
        logits = heads(attention.q(normed)) @ heads(attention.k(normed)).mT / 2
        before = logits if before is None else logits + before
        h = h + attention.o((before.softmax(-1) @ heads(attention.v(normed))).transpose(1, 2).flatten(2))
    return net.out(h)


def two_outputs(net: Net, x: Tensor) -> Any:
    h = net.embed(x)
    for block in net.blocks:
        h = h + block(h)
    return net.out(h[:, 0]) + 0.5 * net.side(h[:, 1:]).max(1)[0]


def residual_head(net: Net, x: Tensor) -> Any:
    h = net.embed(x)
    for block in net.blocks:
        h = h + block(h)
    return net.out(h) + net.side(torch.tanh(net.last(h)))


def ends_nonlinear(net: Net, x: Tensor) -> Any:
    h = net.embed(x)
    for block in net.blocks:
        h = h + torch.tanh(block(h))
    return net.out(h)


def ends_depthwise(net: Net, x: Tensor) -> Any:
    h = net.embed(x)
    for kernel, block in zip(net.kernels, net.blocks, strict=True):
        h = h + kernel(block(h).mT).mT
    return net.out(h)


def several(make: Callable[[], Any]) -> Any:
    return lambda: (nn.ParameterList if isinstance(make(), nn.Parameter) else nn.ModuleList)(make() for _ in range(2))


def linear() -> nn.Module:
    return nn.Linear(8, 8)


def vector() -> nn.Parameter:
    return nn.Parameter(torch.ones(8))


def kernel() -> nn.Module:
    return nn.Conv1d(8, 8, 3, padding=1, groups=8, bias=False)


PARTS: dict[str, Callable[[], Any]] = {
    "mixers": several(Attention),
    "gains": several(vector),
    "kernels": several(kernel),
    "last": linear,
    "blocks": several(Block),
    "more": several(Block),
    "side": lambda: nn.Linear(8, 2),
    "latents": lambda: nn.Parameter(torch.randn(1, 2, 8)),
}
CASES: list[tuple[Callable[..., Any], str, list[int], str]] = [
    (pooled, "mixers", [2], "mixers.1.q: branch_in, mixers.1.o: branch_out, mixers.1.norm: branch_norm"),
    (summed, "blocks", [2], "blocks.0.write: branch_out"),
    (skipped, "blocks last", [2], "blocks.0.write: branch_out, last: stream_matrix, embed: embedding"),
    (gained, "blocks gains", [2], "blocks.1.read: branch_in, gains.0: stream_norm"),
    (reversible, "blocks more", [4], "blocks.0.read: branch_in, more.1.write: branch_out, embed: embedding"),
    (queried, "blocks mixers latents", [4], "latents: embedding, mixers.0.q: branch_in, mixers.0.norm: branch_norm"),
    (placed, "blocks mixers latents", [3], "latents: embedding, mixers.1.q: branch_hidden, blocks.0.read: branch_in"),
    (prompted, "mixers latents", [2], "latents: embedding, mixers.0.q: branch_in, mixers.0.o: branch_out"),
    (handed_on, "mixers", [2], "mixers.1.q: branch_in, mixers.1.v: branch_in, mixers.1.o: branch_out"),
    (two_outputs, "blocks side", [2], "out: readout, side: readout"),
    (residual_head, "blocks side last", [2], "out: readout, side: readout, last: stream_matrix"),
    (ends_nonlinear, "blocks", [2], "blocks.0.write: branch_out, blocks.0.read: branch_in"),
    (ends_depthwise, "blocks kernels", [2], "blocks.0.write: branch_out, kernels.0: branch_hidden"),
]


@pytest.mark.parametrize(("forward", "names", "depths", "roles"), CASES, ids=[case[0].__name__ for case in CASES])
def test_forms_of_residual_additions(forward: Callable[..., Any], names: str, depths: list[int], roles: str) -> None:
    module = Net(forward, **{name: PARTS[name]() for name in names.split()})
    if "blocks" not in names:
        module.blocks = nn.ModuleList()
    structure = discover(module, X)
    assert not structure.unassigned
    assert [stream.depth for stream in structure.streams] == depths
    for name, role in (pair.split(": ") for pair in roles.split(", ")):
        assert structure.roles.get(f"{name}.weight", structure.roles.get(name)) == role, name
    assert {branch.hidden for branch in structure.branches} <= {16, 2}, "units, heads"


def mixing(net: Net, x: Tensor) -> Any:
    h = net.embed(x)
    for norm, block in zip(net.norms, net.blocks, strict=True):
        z = norm(h)
        h = h + (F.avg_pool1d(z.mT, 3, 1, 1).mT - z if net.pools else torch.fft.fft2(z).real)
        h = h + block(h)
    return net.out(h)


@pytest.mark.parametrize("pools", [True, False], ids=["pooling", "Fourier"])
def test_branches_without_a_matrix_have_their_multiplier(pools: bool) -> None:
    def network(depth: int) -> Net:
        torch.manual_seed(0)
        blocks, norms = (nn.ModuleList(make(8) for _ in range(depth)) for make in (Block, nn.LayerNorm))
        return Net(mixing, pools=pools, blocks=blocks, norms=norms)

    module, base = network(4), network(2)
    plan = Plan.from_model(module, X, base=base)
    assert plan.streams[0].depth == 8 and [branch.kind for branch in plan.branches] == ["mixing", "mlp"] * 4
    assert plan.roles["norms.0.weight"] == "branch_norm" and not plan.warnings
    by_hand = network(4)
    for block, norm in zip(by_hand.blocks, by_hand.norms, strict=True):
        for parameter in (*block.write.parameters(), *norm.parameters()):
            parameter.data.mul_(0.5)
    expected = by_hand(X)
    torch.testing.assert_close(fold(network(4), plan)(X), expected)
    attach_multipliers(module, plan)
    torch.testing.assert_close(module(X), expected)


class Step(LightningModule):
    def __init__(self, loss: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.loss = Net(), loss

    def training_step(self, x: Tensor) -> Tensor:
        return self.loss(self.net, x)


def _weights(net: Net) -> Tensor:
    return sum(p.square().sum() for p in net.parameters()) + (net.out.weight @ net.out.weight.mT - torch.eye(2)).norm()


LOSSES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "penalty": lambda net, x: net(x).square().mean() + 1e-3 * _weights(net),
    "penalty through a constant": lambda net, x: net(x).square().mean() + (net.out.weight @ torch.eye(8)).sum(),
    "target of the data": lambda net, x: (x[..., :2] - net(x)).abs().mean(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_terms_of_a_loss_are_no_additions(loss: Callable[[Any, Tensor], Tensor]) -> None:
    structure, usual = (discover(Step(each), X) for each in (loss, lambda net, x: net(x).mean()))
    assert structure.roles == usual.roles and structure.streams == usual.streams and not structure.unassigned


def test_the_error_of_a_prediction_of_the_stream_is_no_addition() -> None:
    def forward(net: Net, x: Tensor) -> Any:
        h = net.embed(x)
        z = h + net.blocks[0](h)
        return net.out(z), (z[:, 1:] - net.side(torch.tanh(net.last(z)))[:, :-1]).square()

    structure = discover(Net(forward, last=nn.Linear(8, 8), side=nn.Linear(8, 8), blocks=nn.ModuleList([Block()])), X)
    assert (structure.depth, structure.roles["side.weight"]) == (1, "readout")


def test_a_network_without_residual_additions_is_refused_whatever_its_loss() -> None:
    module = Step(lambda net, x: (x[..., :2] - net.out(torch.relu(net.embed(x)))).abs().mean())
    with pytest.raises(ValueError, match="has no residual branches"):
        discover(module, X)


def test_what_other_blocks_read_again_acts_there_too() -> None:
    def forward(net: Net, x: Tensor) -> Any:
        h = net.embed(x)
        gate = torch.tanh(net.gate(h))
        for block in net.blocks:
            h = h + block.write(block.read(h) * gate)
        return net.out(h)

    assert discover(Net(forward, gate=nn.Linear(8, 16)), X).parameters["gate.weight"].uses == 2
