"""Which operations belong to which stream, branch or readout where a network is not one row of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from helpers.architectures import LANGUAGE, VOCABULARY
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from mlu_lightning import discover

X = torch.linspace(-1, 1, 48).reshape(2, 3, 8)
IMAGES = torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8)


class Perceptron(nn.Sequential):
    """A branch: a norm, and two matrices around an activation."""

    def __init__(self, embedding: int, hidden: int = 12) -> None:
        super().__init__(nn.LayerNorm(embedding), nn.Linear(embedding, hidden), nn.Tanh(), nn.Linear(hidden, embedding))


class Blocks(nn.Module):
    """Residual perceptrons."""

    def __init__(self, embedding: int, depth: int = 2) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Perceptron(embedding) for _ in range(depth))

    def forward(self, h: Tensor) -> Tensor:
        for branch in self.branches:
            h = h + branch(h)
        return h


class Reader(nn.Module):
    """A decoder that reads an encoder of another dimension through a norm and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Linear(8, 24), nn.Linear(8, 16)
        self.encoder, self.decoder = Blocks(24, 3), Blocks(16)
        self.norm, self.project = nn.LayerNorm(24), nn.Linear(24, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        memory = self.project(self.norm(self.encoder(self.source(x))))
        h = self.decoder(self.target(x))
        h = h + self.attention(h, memory, memory)[0]
        return self.out(h)


def test_what_a_decoder_reads_an_encoder_through() -> None:
    structure = discover(Reader(), (X,))
    assert not structure.unassigned and not structure.warnings
    assert [(stream.depth, stream.embedding) for stream in structure.streams] == [(3, 16), (3, 24)]
    for name, role, fans in (
        ("source.weight", "embedding", (8, 24)),
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
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=16,
    )
    structure = discover(transformers.BartForConditionalGeneration(config), LANGUAGE)
    for name in ("model.encoder.layers.1.final_layer_norm.weight", "model.decoder.layers.1.final_layer_norm.weight"):
        assert structure.parameters[name].row == "stream_norm (post_norm)"
    assert structure.parameters["model.encoder.layers.1.final_layer_norm.weight"].stream == 1


class Towers(nn.Module):
    """Two networks whose outputs meet in a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.ModuleList((nn.Linear(8, 16), nn.Linear(8, 24)))
        self.blocks = nn.ModuleList((Blocks(16, 2), Blocks(24, 3)))
        self.out = nn.ModuleList((nn.Linear(16, 4), nn.Linear(24, 4)))
        self.temperature = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (
            out(blocks(embed(x))).mean(1) for embed, blocks, out in zip(self.embed, self.blocks, self.out, strict=True)
        )
        return F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T * self.temperature.exp()


def test_each_readout_is_of_the_stream_that_it_reads() -> None:
    structure = discover(Towers(), (X,))
    assert not structure.unassigned
    depths = [stream.depth for stream in structure.streams]
    assert sorted(depths) == [2, 3]
    assert {(r.parameter, depths[r.stream], r.fan_in) for r in structure.readouts} == {
        ("out.0.weight", 2, 16),
        ("out.1.weight", 3, 24),
    }
    assert structure.roles["temperature"] == "readout_bias"


class Denoiser(LightningModule):
    """The network's output is subtracted from, or added to, the data that it was computed from."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.embed, self.blocks, self.out = nn.Linear(8, 16), Blocks(16), nn.Linear(16, 8)

    def training_step(self, batch: Tensor) -> Tensor:
        output = self.out(self.blocks(self.embed(0.7 * batch)))
        if self.skip:
            return F.mse_loss(0.5 * batch + 0.3 * output, torch.zeros_like(batch))
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


class Pooled(nn.Module):
    """Tokens are mixed by pooling, without a matrix, before each perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(8, 16), nn.Linear(16, 5)
        self.branches = nn.ModuleList(Perceptron(16) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        h = self.embed(x)
        for branch in self.branches:
            h = h + (F.avg_pool1d(h.mT, 3, 1, 1).mT - h)
            h = h + branch(h)
        return self.out(h)


def test_an_addition_without_a_matrix_does_not_take_in_the_branch_before_it() -> None:
    structure = discover(Pooled(), (X,))
    assert not structure.unassigned
    assert [(b.name, b.position) for b in structure.branches] == [(f"branches.{i}", i) for i in range(3)]
    assert structure.roles["branches.0.1.weight"] == "branch_in"


class Inverted(nn.Module):
    """Inverted bottlenecks (MobileNet V2), of which those that change the shape have no shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(16, 5)
        shapes = ((8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 16, 2))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, 4 * inputs, 1, bias=False),
                nn.BatchNorm2d(4 * inputs),
                nn.ReLU6(),
                nn.Conv2d(4 * inputs, 4 * inputs, 3, stride, 1, groups=4 * inputs, bias=False),
                nn.BatchNorm2d(4 * inputs),
                nn.ReLU6(),
                nn.Conv2d(4 * inputs, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )
            for inputs, outputs, stride in shapes
        )

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


class Staged(nn.Module):
    """Positions are added a second time, halfway."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(8, 16), nn.Linear(16, 5)
        self.first, self.second = Blocks(16), Blocks(16)
        self.positions, self.table = nn.Parameter(torch.randn(1, 3, 16)), nn.Embedding(3, 16)

    def forward(self, x: Tensor) -> Any:
        h = self.first(self.embed(x)) + self.positions + self.table(torch.arange(3))
        return self.out(self.second(h))


def test_tables_that_are_added_on_the_way_are_embeddings() -> None:
    structure = discover(Staged(), (X,))
    assert not structure.unassigned
    for name in ("positions", "table.weight"):
        assert (structure.roles[name], structure.parameters[name].fan_out) == ("embedding", 16)


class Flattened(Blocks):
    """Every second branch sees all tokens of all samples in one row, and so does what it is added to."""

    def forward(self, h: Tensor) -> Tensor:
        for i, branch in enumerate(self.branches):
            rows = h.flatten(0, 1) if i % 2 else h
            h = (rows + branch(rows)).view(h.shape)
        return h


def test_a_stream_that_is_flattened_on_the_way_can_be_read() -> None:
    module = nn.Sequential(nn.Linear(8, 16), Flattened(16, 4), nn.Linear(16, 5))
    structure = discover(module, (X,))
    taps = [(tap.reads, tap.position, tap.module, tap.axis) for tap in structure.taps]
    assert taps[:-1] == [
        ("stream", 0, "0", -1),
        *(("stream", i, f"1.branches.{i}", -1) for i in (1, 2, 3)),
        ("stream", 4, "1", -1),
    ]
