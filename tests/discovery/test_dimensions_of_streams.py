"""Dimensions of streams that are kept in parts, or several of which matrices mix."""

import pytest
import torch
from torch import Tensor, nn

from mlu_lightning import Plan


class Streams(nn.Module):
    """A stream that is kept in parts, or several streams along an axis, which matrices mix (hyper-connections)."""

    def __init__(self, depth: int, size: int, streams: int) -> None:
        super().__init__()
        self.embed, self.readout, self.streams = nn.Linear(3, size), nn.Linear(size, 2), streams
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 9), nn.ReLU(), nn.Linear(9, size)) for _ in range(depth)
        )
        self.mix = nn.ParameterList(nn.Parameter(torch.eye(streams or 1)) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if not self.streams:
            x = x.unflatten(-1, (4, -1))
            for block in self.blocks:
                x = x + block(x.flatten(-2)).unflatten(-1, (4, -1))
            return self.readout(x.flatten(-2))
        x = x.unsqueeze(1).repeat(1, self.streams, 1)
        for block, mix in zip(self.blocks, self.mix, strict=True):
            x = torch.einsum("nm,bnd->bmd", mix, x) + block(x.mean(1))[:, None]
        return self.readout(x.sum(1))


@pytest.mark.parametrize("streams", [0, 3])
def test_dimension_of_streams_that_are_kept_in_parts_or_mixed(streams: int) -> None:
    plan = Plan.from_model(Streams(4, 16, streams), (torch.ones(5, 3),), base=Streams(2, 8, streams))
    assert [(stream.embedding, stream.base_embedding) for stream in plan.streams] == [(16, 8)]
