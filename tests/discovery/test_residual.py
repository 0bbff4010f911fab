"""Which operations belong to which stream, branch or readout where a network is not one row of blocks."""

from typing import Any

import pytest
import torch
import transformers
from helpers.architectures import LANGUAGE, VOCABULARY
from helpers.residual_networks import Net, stepwise
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mlu_lightning import discover

X = torch.linspace(-1, 1, 48).reshape(2, 3, 8)
IMAGES = torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8)


class Perceptron(nn.Sequential):  # a branch: a norm, and two matrices around an activation
    def __init__(self, embedding: int, hidden: int = 12) -> None:
        super().__init__(nn.LayerNorm(embedding), nn.Linear(embedding, hidden), nn.Tanh(), nn.Linear(hidden, embedding))


class Blocks(nn.Module):  # residual perceptrons
    def __init__(self, embedding: int, depth: int = 2) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Perceptron(embedding) for _ in range(depth))

    def forward(self, h: Tensor) -> Tensor:
        for branch in self.branches:
            h = h + branch(h)
        return h


def test_what_a_decoder_reads_an_encoder_through() -> None:
    def reader(net: Net, x: Tensor) -> Any:
        memory, h = net.project(net.norm(net.blocks(net.embed(x)))), net.decoder(net.target(x))
        return net.out(h + net.attention(h, memory, memory)[0])

    parts = {"embed": nn.Linear(8, 24), "blocks": Blocks(24, 3), "norm": nn.LayerNorm(24), "project": nn.Linear(24, 16)}
    parts |= {"target": nn.Linear(8, 16), "decoder": Blocks(16), "out": nn.Linear(16, 5)}
    module = Net(reader, attention=nn.MultiheadAttention(16, 2, batch_first=True), **parts)
    structure = discover(module, (X,))
    assert not structure.unassigned and not structure.warnings
    assert [(stream.depth, stream.embedding) for stream in structure.streams] == [(3, 16), (3, 24)]
    for name, role, fans in (
        ("embed.weight", "embedding", (8, 24)),
        ("norm.weight", "stream_norm", (1, 24)),
        ("project.weight", "stream_matrix", (24, 16)),
        ("project.bias", "stream_norm", (1, 16)),
    ):
        facts = structure.parameters[name]
        assert (facts.role, (facts.fan_in, facts.fan_out), facts.stream) == (role, fans, 1), name
    queries_keys_values = structure.parameters["attention.in_proj_weight"]
    assert (queries_keys_values.fan_in, queries_keys_values.fan_out) == (16, 48), "one matrix, used in two parts"
    assert structure.parameters["attention.in_proj_bias"].fan_out == 48


def test_the_last_norm_of_a_post_norm_encoder_is_one_of_them() -> None:
    numbers = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}
    sizes = {f"{part}_{what}": number for part in ("encoder", "decoder") for what, number in numbers.items()}
    config = transformers.BartConfig(vocab_size=VOCABULARY, d_model=16, max_position_embeddings=16, **sizes)
    structure = discover(transformers.BartForConditionalGeneration(config), LANGUAGE)
    for name in ("model.encoder.layers.1.final_layer_norm.weight", "model.decoder.layers.1.final_layer_norm.weight"):
        assert structure.parameters[name].row == "stream_norm (post_norm)"
    assert structure.parameters["model.encoder.layers.1.final_layer_norm.weight"].stream == 1


class Denoiser(LightningModule):
    """The network's output is subtracted from, or added to, the data that it was computed from."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.embed, self.blocks, self.out = nn.Linear(8, 16), Blocks(16), nn.Linear(16, 8)

    def training_step(self, batch: Tensor) -> Tensor:
        output = self.out(self.blocks(self.embed(0.7 * batch)))
        if self.skip:
            return nn.functional.mse_loss(0.5 * batch + 0.3 * output, torch.zeros_like(batch))
        return (output - batch).square().mean()


@pytest.mark.parametrize("skip", [False, True])
def test_a_loss_or_a_skip_around_the_network_is_no_branch(skip: bool) -> None:
    structure = discover(Denoiser(skip), X)
    assert not structure.unassigned and not structure.warnings
    assert [(stream.depth, stream.embedding) for stream in structure.streams] == [(2, 16)]
    assert structure.roles["embed.weight"] == "embedding" and structure.roles["out.weight"] == "readout"


def test_data_can_be_the_stream_itself() -> None:
    structure = discover(nn.Sequential(Blocks(8, 3), nn.Linear(8, 2)), (X,))
    assert [(stream.depth, stream.embedding) for stream in structure.streams] == [(3, 8)]


def test_an_addition_without_a_matrix_does_not_take_in_the_branch_before_it() -> None:
    def pooled(net: Net, h: Tensor, branch: Perceptron) -> Any:
        h = h + (nn.functional.avg_pool1d(h.mT, 3, 1, 1).mT - h)
        return h + branch(h)

    branches = nn.ModuleList(Perceptron(16) for _ in range(3))
    module = stepwise(pooled, embed=nn.Linear(8, 16), out=nn.Linear(16, 5), blocks=branches)
    structure = discover(module, (X,))
    assert not structure.unassigned
    assert [b.name for b in structure.branches if b.kind == "mlp"] == [f"blocks.{i}" for i in range(3)]
    assert [(b.kind, b.position) for b in structure.branches] == [*zip(["mixing", "mlp"] * 3, range(6), strict=True)]
    assert structure.roles["blocks.0.1.weight"] == "branch_in"


class Inverted(nn.Module):  # inverted bottlenecks (MobileNet V2), of which those that change the shape have no shortcut
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(16, 5)
        shapes = ((8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 16, 2))
        self.blocks = nn.ModuleList(self._block(*shape) for shape in shapes)

    @staticmethod
    def _block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        units = 4 * inputs
        depthwise = nn.Conv2d(units, units, 3, stride, 1, groups=units, bias=False)
        first = nn.Conv2d(inputs, units, 1, bias=False), nn.BatchNorm2d(units), nn.ReLU6()
        last = nn.Conv2d(units, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        return nn.Sequential(*first, depthwise, nn.BatchNorm2d(units), nn.ReLU6(), *last)

    def forward(self, images: Tensor) -> Any:
        h = self.stem(images)
        for block in self.blocks:
            made = block(h)
            h = h + made if made.shape == h.shape else made
        return self.out(h.mean((2, 3)))


def test_norms_of_blocks_without_a_shortcut_do_not_make_a_stream_post_norm() -> None:
    structure = discover(Inverted(), (IMAGES,))
    assert not structure.unassigned and not structure.warnings
    assert [(stream.depth, stream.embedding) for stream in structure.streams] == [(2, 16)]
    assert structure.roles["blocks.1.7.weight"] == "stream_norm"
    assert structure.roles["blocks.1.6.weight"] == "stream_matrix"
    depthwise = structure.parameters["blocks.2.3.weight"]
    assert (depthwise.role, depthwise.fan_in, depthwise.fan_out) == ("branch_hidden", 1, 64)


class Flattened(Blocks):
    """Every second branch sees all tokens of all samples in one row, and so does what it is added to."""

    def forward(self, h: Tensor) -> Tensor:
        for i, branch in enumerate(self.branches):
            rows = h.flatten(0, 1) if i % 2 else h
            h = (rows + branch(rows)).view(h.shape)
        return h


def test_a_stream_that_is_flattened_on_the_way_can_be_read() -> None:
    module = nn.Sequential(nn.Linear(8, 16), Flattened(16, 4), nn.Linear(16, 5))
    taps = [(tap.reads, tap.position, tap.module, tap.axis) for tap in discover(module, (X,)).taps]
    modules = "0", *(f"1.branches.{i}" for i in (1, 2, 3)), "1"
    assert taps[:-1] == [("stream", position, name, -1) for position, name in enumerate(modules)]


def test_early_states_that_are_joined_late() -> None:
    def hourglass(net: Net, x: Tensor) -> Any:
        first = h = net.embed(x)
        for number, (read, write, skip) in enumerate(net.blocks):
            h = torch.cat([h, first], -1) if number else h
            h = skip(h) + write(torch.tanh(read(h)))
        return net.out(h)

    levels = [(nn.Linear(width, 16), nn.Linear(16, 8), nn.Linear(width, 8)) for width in (8, 16)]
    structure = discover(Net(hourglass, blocks=nn.ModuleList(map(nn.ModuleList, levels))), torch.ones(2, 3))
    assert structure.depth == 2 and not structure.unassigned
    assert {str(structure.roles[name]) for name in ("embed.weight", "embed.bias")} == {"embedding"}
    assert str(structure.roles["blocks.1.2.weight"]) == "stream_matrix"
