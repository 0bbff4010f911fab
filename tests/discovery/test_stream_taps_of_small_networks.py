"""Taps of streams in small networks: what may stand for a sum, what may not, and what is read of several passes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.architectures import TOKENS
from helpers.residual_networks import Block, Net, X, in_a_row, stepwise
from helpers.taps import listed, modules, read, streams
from torch import Tensor, nn
from torch.nn import functional as F

from mlu_lightning import Plan, attach_multipliers, discover
from mlu_lightning.observation import locate, observe


class Masked(Block):  # it is given a mask without a gradient first, and the stream by keyword
    def forward(self, *, mask: Tensor, stream: Tensor) -> Tensor:
        return super().forward(stream) * mask


def through_factors(net: Net, x: Tensor) -> Any:
    h, mask = net.embed(x) * 3, torch.ones(4, 1).expand(4, 8)
    for block in net.blocks:
        h = (h + block(h)) * mask
    return net.out(2 * h)


def in_turn(net: Net, x: Tensor) -> Any:
    h, (first, second) = net.embed(x), net.blocks
    return net.out(net.drop(h + first(h)) + second(h))


def reversible(net: Net, x: Tensor) -> Any:
    """Half of the coordinates are the stream of the other half's branch, which the block is given before it."""
    first, second = net.embed(x).chunk(2, -1)
    return net.out(first + net.blocks(second))


THROUGH_A_MATRIX = stepwise(lambda net, h, block: F.linear(h + block(h), block.read.weight[:8]))
MASKED = nn.ModuleList([Masked(), Masked()])
WITH_A_MASK = stepwise(lambda net, h, block: h + block(mask=torch.ones(4, 1), stream=h), blocks=MASKED)
LISTED = {
    "tensors without gradient count": (
        WITH_A_MASK,
        "stream 0: embed output, stream 1: blocks.1 input[1], stream 2: out input[0]",
    ),
    "factors": (Net(through_factors), "stream 0: blocks.0 input[0], branch 0: blocks.0 output"),
    "a matrix of no module": (THROUGH_A_MATRIX, "stream 0: embed output, branch 0: blocks.0 output"),
    "one position": (Net(in_turn, drop=nn.Dropout(0.5)), "stream 0: embed output, stream 1: out input[0]"),
    "first calls": (
        Net(blocks=nn.ModuleList([Block()] * 3)),
        "stream 0: embed output, branch 0: blocks.0 output, stream 3: out input[0]",
    ),
    "outputs of one operation": (Net(reversible, embed=nn.Linear(3, 16), blocks=Block()), "stream 1: out input[0]"),
}


@pytest.mark.parametrize(("module", "expected"), LISTED.values(), ids=LISTED)
def test_what_stands_for_a_sum_and_what_does_not(module: Net, expected: str) -> None:
    assert listed(module, X) == f"{expected}, readout 0: out output"


class Adding(Block):  # the sum is made in place, which changes what the block was given while it runs
    def forward(self, stream: Tensor) -> Tensor:
        stream += super().forward(stream)
        return stream


def test_sums_in_place() -> None:
    module = Net(adds=True, blocks=nn.ModuleList([Adding(), Adding()]))
    structure = discover(module, X)
    assert modules(structure.taps) == ["embed output", "blocks.0 output", "blocks.1 output", "out output"]
    h = streams(read(module, structure.taps, lambda: module(X)))
    torch.testing.assert_close(h[1], h[0] + Block.forward(module.blocks[0], h[0]))


def test_dropout_is_nothing_when_the_stream_is_read() -> None:
    def forward(net: Net, x: Tensor) -> Any:
        h = F.dropout(net.embed(x), 0.5, net.training)
        for block in net.blocks:
            h = net.drop(h + block(h))
        return F.dropout(h, 0.5, net.training) @ net.out.weight.T + net.out.bias

    torch.manual_seed(0)
    module = Net(forward, drop=nn.Dropout(0.5)).eval()
    structure = discover(module, X)
    assert [str(tap) for tap in structure.taps] == [
        "stream 0 after 0 additions: embed output",
        "stream 0 after 1 additions: blocks.1 input[0]",
        # only the second call of the dropout module is given the last sum
        "branch 0 after 1 additions: blocks.1 output",
        "readout 0: (module itself) output",
    ]
    h = streams(read(module, structure.taps, lambda: module(X)))
    torch.testing.assert_close(h[1], h[0] + module.blocks[0](h[0]))


def bare(change: Callable[[Any, Tensor, Tensor], Tensor]) -> Net:
    """Nothing is given the last sum, which the mean over samples follows."""
    return Net(lambda net, x: change(net, net.embed(x), x).mean(0) @ net.out.weight.T + net.out.bias)


def one_by_one(net: Any, h: Tensor, x: Tensor) -> Tensor:
    h = h + net.blocks[0](h)
    return h + net.blocks[1](h)


BARE: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "one": one_by_one,
    "parallel": lambda net, h, x: h + (net.blocks[1](h) + net.blocks[0](h)),
    "in turn": lambda net, h, x: h + net.blocks[0](h) + net.blocks[1](h),
    "scaled": lambda net, h, x: h + 0.5 * net.blocks[0](h),
    "alpha": lambda net, h, x: torch.add(h, net.blocks[0](h), alpha=2),
    "difference": lambda net, h, x: h - net.blocks[0](h),
    "more": lambda net, h, x: h + (net.blocks[0](h) + net.embed(x)),
}


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("form", ["one", "parallel", "in turn"])
def test_a_sum_that_is_given_to_nothing_is_read_as_its_summands(form: str, hooked: bool) -> None:
    module = bare(BARE[form])
    plan = Plan.from_model(module, X)
    if hooked:
        # that of the readout has no site, which is not what this is about
        branches = tuple(multiplier for multiplier in plan.multipliers if multiplier.kind == "branch")
        attach_multipliers(module, replace(plan, multipliers=branches))
    assert discover(module, X).taps == plan.taps
    depth = plan.streams[0].depth
    taps = [(tap.reads, tap.position, tap.module, tap.where) for tap in plan.taps[:-1]]
    before = ("stream", 0, "embed", "output")
    if form == "one":
        assert taps == [before, ("stream", 1, "blocks.1", "input"), ("branch", 1, "blocks.1", "output")]
    else:
        assert sorted(taps) == [("branch", 0, f"blocks.{i}", "output") for i in (0, 1)] + [before]
    found = observe(module, X, locate(plan.taps, [depth], [0, 1]))
    factor = 1 / depth if hooked else 1.0
    first, second = (lambda h, block=block: factor * Block.forward(block, h) for block in module.blocks)
    h = module.embed(X)
    after = h + first(h) + (second(h + first(h)) if form == "one" else second(h))
    torch.testing.assert_close(found["s=1"], after)


@pytest.mark.parametrize("form", ["scaled", "alpha", "difference", "more"])
def test_a_sum_of_anything_else_is_not_read(form: str) -> None:
    structure = discover(bare(BARE[form]), X)
    assert [tap.reads for tap in structure.taps if tap.position == 0] == ["stream", "readout"][: len(structure.taps)]


def test_the_first_of_two_passes_is_read() -> None:
    module = Net(lambda net, x: in_a_row(net, 2 * x) - in_a_row(net, x), adds=True)
    structure = discover(module, X)
    assert [tap.position for tap in structure.taps] == [0, 1, 2, 0]
    found = read(module, structure.taps, lambda: module(X))
    torch.testing.assert_close(found["stream", 0, 2], nn.Sequential(module.embed, *module.blocks)(2 * X))
    torch.testing.assert_close(found["readout", 0, 0], in_a_row(module, 2 * X))


def test_a_pass_after_one_without_gradients_cannot_be_read() -> None:
    def forward(net: Net, x: Tensor) -> Any:
        with torch.no_grad():
            in_a_row(net, -x)
        return in_a_row(net, 2 * x) - in_a_row(net, x)

    assert discover(Net(forward, adds=True), X).taps == ()


@pytest.mark.parametrize(
    ("adds", "site", "expected"),
    [
        (True, "blocks.1 output", ["embed output", "blocks.0 output", "blocks.1.write output"]),
        (False, "out.0 output", ["embed output", "blocks.1 input[0]", "out input[0]"]),
    ],
)
def test_what_a_multiplier_changes_is_not_read(adds: bool, site: str, expected: list[str]) -> None:
    """The tied readout's 1/d goes to the first module that returns the last sum; then that is not given to any other."""

    parts = {"embed": nn.Embedding(50, 8), "out": nn.Sequential(nn.Identity())}
    module = Net(lambda net, tokens: in_a_row(net, tokens) @ net.embed.weight.T, adds, **parts)
    plan = Plan.from_model(module, TOKENS)  # in the absolute form: d = 8
    assert [str(m.site) for m in plan.multipliers if m.kind == "readout"] == [site]
    assert modules(plan.taps) == [*expected, "(module itself) output"]
    attach_multipliers(module, replace(plan, multipliers=plan.multipliers[-1:]))
    assert discover(module, TOKENS).taps == plan.taps


def test_an_output_is_read_with_its_bias() -> None:
    bias = nn.Parameter(torch.randn(2))
    parts = {"out": nn.Linear(8, 2, bias=False), "bias": bias, "flat": nn.Flatten(0)}
    module = Net(lambda net, x: net.flat(in_a_row(net, x) + net.bias), adds=True, **parts)
    structure = discover(module, X[None])
    assert str(structure.taps[-1]) == "readout 0: flat input[0]"
    found = read(module, structure.taps, lambda: module(X[None]))
    torch.testing.assert_close(found["readout", 0, 0], (in_a_row(module, X[None]) + bias).detach())


def whole(net: Any, h: Tensor) -> Tensor:
    return F.layer_norm(h, (8,))


def by_hand(net: Any, h: Tensor) -> Tensor:
    """A norm whose squares are given to ``sizes``."""
    return h * torch.rsqrt(net.sizes(h.square()).mean(-1, keepdim=True) + 1e-5)


@pytest.mark.parametrize("norm", [whole, by_hand])
def test_norms_stand_for_sums_that_no_module_is_given(norm: Callable[[Any, Tensor], Tensor]) -> None:
    module = stepwise(lambda net, h, block: norm(net, h + block(h)), sizes=nn.Identity())
    structure = discover(module, X)
    # what follows the last sum has many parts if it is written by hand, and is not known to be a norm
    last = "out input[0]" if norm is whole else "blocks.1 output"
    assert modules(structure.taps) == ["embed output", "blocks.1 input[0]", last, "out output"]
    h = streams(read(module, structure.taps, lambda: module(X)))
    torch.testing.assert_close(h[1], norm(module, h[0] + module.blocks[0](h[0])))


def test_parts_of_a_norm_do_not_stand_for_sums() -> None:
    def step(net: Net, h: Tensor, block: Block) -> Tensor:
        return by_hand(net, h + F.linear(torch.tanh(F.linear(h, block.read.weight)), block.write.weight))

    taps = discover(stepwise(step, sizes=nn.Identity()), X).taps
    assert [(tap.module, tap.position) for tap in taps if tap.reads == "stream"] == [("embed", 0)]


def test_the_head_does_not_stand_for_the_last_sum() -> None:
    def forward(net: Net, x: Tensor) -> Any:
        h, (first, second) = net.embed(x), net.blocks
        h = torch.relu(h + first(h))
        return net.out(torch.tanh(h + second(h)))

    assert [tap.position for tap in discover(Net(forward), X).taps if tap.reads == "stream"] == [0, 1]
