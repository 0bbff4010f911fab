"""Taps of streams where coordinates are not in the last axis."""

from typing import Any

import torch
from helpers.architectures.vision import ConvolutionalBlock
from helpers.residual_networks import Net
from helpers.taps import modules, read, streams
from torch import Tensor, nn

from mlu_lightning import discover


class Images(nn.Module):  # two stages of two blocks; the second begins with a strided shortcut
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(*(ConvolutionalBlock(8, 8, 8, 1, False) for _ in range(2)))
        self.layer2 = nn.Sequential(*(ConvolutionalBlock(inputs, 16, 16, 16 // inputs, False) for inputs in (8, 16)))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        h = self.pool(nn.functional.relu(self.bn(self.conv(x))))
        h = self.layer2(nn.functional.avg_pool2d(self.layer1(h), 2))
        return self.fc(h.mean((2, 3)))


def test_activations_stand_for_sums_that_no_module_is_given_first() -> None:
    module, x = Images().eval(), torch.randn(8, 3, 16, 16)  # so that channels are as many as samples and pixels
    structure = discover(module, x)
    blocks = ["layer1.0 output", "layer1 output", "layer2.0 output", "layer2 output"]
    assert modules(structure.taps) == ["pool output", *blocks, "fc output"]
    assert [tap.axis for tap in structure.taps] == [1, 1, 1, 1, 1, -1]
    h = streams(read(module, structure.taps, lambda: module(x)))
    assert [value.shape[1] for value in h] == [8, 8, 8, 16, 16]
    torch.testing.assert_close(h[1], module.layer1[0](h[0]))
    torch.testing.assert_close(h[2], module.layer1[1](h[1]))
    torch.testing.assert_close(h[3], module.layer2[0](nn.functional.avg_pool2d(h[2], 2)))
    torch.testing.assert_close(h[4], module.layer2[1](h[3]))


def test_axis_of_the_coordinates_is_followed_through_permutations() -> None:
    def turned(net: Net, x: Tensor) -> Any:
        h = net.embed(x)
        for i, block in enumerate(net.blocks):
            made = block(h.permute(0, 2, 3, 1))
            h = (made.permute(0, -1, 1, 2) if i else made.transpose(-1, 1).transpose(2, 3)) + h
        return net.out(net.pool(h))

    parts = {"embed": nn.Conv2d(3, 8, 1), "out": nn.Conv2d(8, 5, 1), "pool": nn.AdaptiveAvgPool2d(1)}
    taps = discover(Net(turned, **parts), torch.randn(8, 3, 8, 8)).taps  # every axis of the stream has 8 entries
    assert {tap.axis for tap in taps} == {1}
    # the second block is given the stream the other way round
    assert modules(taps) == ["embed output", "pool input[0]", "out output"]


def test_axis_where_time_comes_first() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    parts = {"embed": nn.Linear(3, 16), "out": nn.Linear(16, 2), "blocks": encoder}
    module = Net(lambda net, x: net.out(net.blocks(net.embed(x))), **parts)
    taps = discover(module, torch.randn(16, 16, 3)).taps
    assert {tap.axis for tap in taps} == {-1}
    assert modules(taps) == ["embed output", "blocks.layers.0.norm2 input[0]", "blocks output", "out output"]
