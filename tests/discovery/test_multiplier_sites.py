"""Where branches of small networks can be multiplied, and which additions are branches at all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.architectures import TOKENS
from helpers.residual_networks import Block, Net, X
from helpers.taps import listed
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from mlu_lightning import discover
from mlu_lightning.discovery.structure import Structure
from mlu_lightning.models import ResNet

Change = Callable[[Any, Tensor, int], Tensor]
"""What a branch adds to the stream, from the network, the stream and the number of the block."""


def blocks(branch: Change, **parts: Any) -> Structure:
    """Two residual blocks between an embedding and a readout, each of which adds ``branch``."""

    def forward(net: Net, x: Tensor) -> Any:
        h = net.embed(x)
        for i in range(2):
            h = h + branch(net, h, i)
        return net.out(h)

    return discover(Net(forward, **parts), X)


def write(i: int) -> set[str]:
    return {f"blocks.{i}.write.weight", f"blocks.{i}.write.bias"}


def test_weights_shared_across_depth_are_one_branch() -> None:
    structure = discover(Net(blocks=nn.ModuleList([Block()] * 3)), X)
    assert structure.depth == 3 and structure.roles["blocks.0.write.weight"] == "branch_out"
    (branch,) = structure.branches
    assert str(branch.site) == "blocks.0 output" and set(branch.folds) == write(0)


class Twice(LightningModule):  # two forward passes in one step, and a look at the trainer
    def __init__(self) -> None:
        super().__init__()
        self.net = ResNet(2, 8, 4, inputs=3, outputs=2)

    def training_step(self, batch: Tensor) -> Tensor:
        first, second = self.net(batch), self.net(batch.flip(0))
        return (first - second).square().mean() * (1 + self.trainer.current_epoch)


def test_two_forward_passes_are_one_network() -> None:
    module = Twice()
    module.trainer = Trainer(barebones=True, accelerator="cpu")
    structure = discover(module, X)
    assert [stream.depth for stream in structure.streams] == [2]
    assert [(str(branch.site), branch.folds) for branch in structure.branches] == [
        (f"net.blocks.{i} output", (f"net.blocks.{i}.write.weight",)) for i in (0, 1)
    ]
    (readout,) = structure.readouts
    assert (str(readout.site), readout.folds) == ("net.readout input", ("net.readout.weight",))
    assert module.trainer is not None
    places = [
        f"stream {i}: net.{place}" for i, place in enumerate(("embed output", "blocks.1 input[0]", "readout input[0]"))
    ]
    assert listed(module, X) == ", ".join([*places, "readout 0: net.readout output"])


def test_parallel_branches_that_are_added_in_turn_count_once() -> None:
    def forward(net: Net, x: Tensor) -> Any:
        h = net.embed(x)
        for block, more in zip(net.blocks, net.more, strict=True):
            h = (h + block(h)) + torch.tanh(more(h))
        return net.out(h)

    structure = discover(Net(forward, more=nn.ModuleList(nn.Linear(8, 8) for _ in range(2))), X)
    assert structure.depth == 2
    assert [branch.position for branch in structure.branches] == [0, 0, 1, 1]


def through_dropout(net: Net, h: Tensor, i: int) -> Any:
    units, last = torch.tanh(net.blocks[i].read(h)), net.blocks[i].write
    return net.drop(nn.functional.linear(units, last.weight, last.bias))


NORMS = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
nn.init.normal_(NORMS[1].bias)
NORMED = {"norm.1.weight", "norm.1.bias"}
GATED = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
SITES: dict[str, tuple[Change, dict[str, Any], str, set[str]]] = {
    "other branches call the module too": (through_dropout, {"drop": nn.Dropout(0.0)}, "None", write(1)),
    "called twice": (lambda net, h, i: net.blocks[i](h) + net.blocks[i](-h), {}, "blocks.1 output", write(1)),
    "times the stream": (lambda net, h, i: h * net.blocks[i](h), {}, "blocks.1 output", write(1)),
    "the largest": (lambda net, h, i: net.blocks[i](h[:, None]).amax(1), {}, "blocks.1 output", write(1)),
    "gated": (lambda net, h, i: nn.functional.glu(net.g[i](h)), {"g": GATED}, "g.1 output, entries 0 to 8", set()),
    "a norm at the end": (lambda net, h, i: net.norm[i](net.blocks[i](h)), {"norm": NORMS}, "norm.1 output", NORMED),
    "with a constant": (lambda net, h, i: net.blocks[i](h) + 1.0, {}, "None", set()),
}


@pytest.mark.parametrize(("branch", "parts", "site", "folds"), SITES.values(), ids=SITES)
def test_where_branches_are_multiplied(branch: Change, parts: dict[str, Any], site: str, folds: set[str]) -> None:
    structure = blocks(branch, **parts)
    first, second = ((str(branch.site), set(branch.folds)) for branch in structure.branches)
    assert structure.depth == 2 and second == (site, folds)
    assert first == (site.replace("1", "0"), {name.replace("1", "0") for name in folds})


def test_a_branch_that_something_else_reads_cannot_be_folded() -> None:
    def forward(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        made = net.blocks[0](h := net.embed(x))
        return net.out(h + made), net.side(made)

    (branch,) = discover(Net(forward, side=nn.Linear(8, 2)), X).branches
    assert (branch.site, branch.folds) == (None, ())


def test_a_norm_that_is_written_by_hand_compares_no_gated_units() -> None:
    def gated(net: Any, h: Tensor, i: int) -> Tensor:
        units, gates = net.blocks[i].read(h).chunk(2, -1)
        units = units * torch.sigmoid(gates)
        normed = (units - units.mean(-1, keepdim=True)) * torch.rsqrt(units.var(-1, keepdim=True) + 1e-5)
        return net.narrow[i](normed)

    structure = blocks(gated, narrow=nn.ModuleList(nn.Linear(8, 8) for _ in range(2)))
    assert [(branch.kind, branch.hidden) for branch in structure.branches] == [("mlp", 8)] * 2


class Both(Block):
    def forward(self, stream: Tensor) -> Any:  # after the sum was made, its branch is no place to multiply it
        branch = super().forward(stream)
        return stream + branch, branch


def test_a_branch_that_is_returned_beside_the_sum_is_multiplied_before() -> None:
    parts = {"blocks": nn.ModuleList([Both(), Both()])}
    structure = discover(Net(lambda net, x: net.out(net.blocks[1](net.blocks[0](net.embed(x))[0])[0]), **parts), X)
    assert [str(branch.site) for branch in structure.branches] == [f"blocks.{i}.write output" for i in range(2)]


def test_a_number_for_each_branch_is_of_bounded_size() -> None:
    structure = blocks(lambda net, h, i: net.scales[i] * net.blocks[i](h), scales=nn.Parameter(torch.ones(2)))
    facts = structure.parameters["scales"]
    assert (facts.role, facts.fan_in, facts.fan_out) == ("branch_bounded", 1, 1)


@pytest.mark.parametrize("modulated", [False, True])
def test_a_branch_is_folded_into_what_writes_it_and_not_into_its_gate(modulated: bool) -> None:
    """A condition shifts, scales and gates branches, by parts of one matrix, as in a diffusion transformer."""

    def forward(net: Net, x: Tensor, condition: Tensor) -> Any:
        h = net.embed(x)
        parts = net.modulation(nn.functional.silu(net.condition(condition)))[:, None].chunk(6, -1)
        for i, block in enumerate(net.blocks):
            shift, scale, gate = parts[3 * i : 3 * i + 3]
            h = h + gate * block(h * (1 + scale) + shift if modulated else h)
        return net.out(h)

    torch.manual_seed(0)
    module = Net(forward, condition=nn.Linear(2, 8), modulation=nn.Linear(8, 48))
    example = (torch.linspace(-1, 1, 60).reshape(4, 5, 3), torch.ones(4, 2))
    structure = discover(module, example)
    assert not structure.unassigned and not structure.warnings
    assert [set(branch.folds) for branch in structure.branches] == [write(0), write(1)]
    for i, branch in enumerate(structure.branches):
        assert str(branch.site) in (f"blocks.{i} output", f"blocks.{i}.write output"), "the same tensor"
    assert structure.parameters["modulation.weight"].fan_in == 8
    assert structure.roles["condition.weight"] == "embedding"
    # without its branches the module is its embedding and readout
    with torch.no_grad():
        for name in (name for branch in structure.branches for name in branch.folds):
            module.get_parameter(name).zero_()
        assert torch.equal(module(*example), module.out(module.embed(example[0])))


def test_a_pooler_after_the_stream_is_a_matrix_on_it() -> None:
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    structure = discover(BertModel(config), {"input_ids": TOKENS})
    assert structure.roles["pooler.dense.weight"] == "stream_matrix"
    assert structure.readouts == ()


def test_a_gelu_written_by_hand_is_no_residual_addition() -> None:
    """x + 0.044715 x³ adds what a matrix made to a power of it."""

    def forward(net: Net, x: Tensor) -> Any:
        h = net.embed(x)
        h = net.more(h + net.blocks[0](h))
        return net.out(0.5 * h * (1 + torch.tanh(0.79788456 * (h + 0.044715 * h**3))))

    structure = discover(Net(forward, more=nn.Linear(8, 8)), X)
    assert structure.depth == 1 and not structure.warnings
    assert structure.roles["more.weight"] == "stream_matrix"
