"""Streams that attend to each other, that are skipped by U-shaped networks, or that views and activations hide, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlu_lightning import Plan, attach_multipliers, discover, fold

X = torch.linspace(-1, 1, 60).reshape(4, 5, 3)
IMAGES = torch.linspace(-1, 1, 4 * 3 * 64).reshape(4, 3, 8, 8).sin()


class Cross(nn.Module):
    """Each of two streams reads the other, with the same layers, and after it has changed."""

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, width), nn.Linear(width, 2)
        self.mix = nn.ModuleList(nn.Linear(2 * width, 3 * width) for _ in range(depth))
        self.write = nn.ModuleList(nn.Linear(3 * width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Any:
        one, other = self.embed(x), self.embed(x.flip(1))
        for mix, write in zip(self.mix, self.write, strict=True):
            one = one + write(torch.tanh(mix(torch.cat([one, other.mean(1, keepdim=True).expand_as(one)], -1))))
            other = other + write(torch.tanh(mix(torch.cat([other, one.mean(1, keepdim=True).expand_as(one)], -1))))
        return self.out(one), self.out(other)


def block(width: int, activation: nn.Module | None = None) -> nn.Sequential:
    first, second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
    norms = (nn.InstanceNorm2d(width, affine=True) for _ in range(2))
    return nn.Sequential(first, next(norms), activation or nn.LeakyReLU(inplace=True), second, next(norms))


class Shaped(nn.Module):
    """An inner network at half the resolution, around which the outer stream skips; sums and activations in place."""

    def __init__(self, width: int = 8, depth: int = 2, learned: bool = False) -> None:
        super().__init__()
        self.embed, self.out = nn.Conv2d(3, width, 1), nn.Conv2d(width, 2, 1)
        self.down, self.up = nn.Conv2d(width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.outer, self.end = block(width), block(width)
        self.inner = nn.ModuleList(block(2 * width, nn.PReLU(2 * width) if learned else None) for _ in range(depth))

    def forward(self, x: Tensor) -> Any:
        h = self.embed(x)
        skip = self.added(self.outer, h)
        h = self.down(skip)
        for inner in self.inner:
            h = self.added(inner, h)
        h = self.up(h)
        h += skip
        return self.out(self.added(self.end, h))

    def added(self, layers: nn.Module, h: Tensor) -> Tensor:
        y: Tensor = layers(h)
        y += h
        return torch.nn.functional.relu(y, inplace=True)


class Weighted(nn.Module):
    """Weights of edges, one number each, write to the coordinates of points: a product whose first factor is written."""

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1)) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Any:
        for layers in self.blocks:
            apart = x[:, :, None] - x[:, None]
            x = x + torch.einsum("bij,bijc->bic", layers(apart.square().sum(-1, keepdim=True))[..., 0], apart)
        return x


def test_streams_that_read_each_other_are_no_recurrence() -> None:
    structure = discover(Cross(), X)
    assert not structure.unassigned
    assert {branch.kind for branch in structure.branches} == {"mlp"}
    assert {str(structure.roles[f"{name}.1.weight"]) for name in ("mix", "write")} == {"branch_in", "branch_out"}


@pytest.mark.parametrize("learned", [False, True], ids=["leaky", "learned slopes"])
def test_skipped_network_is_a_part_of_the_stream_whatever_is_done_in_place(learned: bool) -> None:
    structure = discover(Shaped(depth=3, learned=learned), IMAGES)
    rows = {name: str(facts.row) for name, facts in structure.parameters.items()}
    assert (structure.depth, len(structure.branches)) == (5, 5)
    assert {rows[f"{name}.weight"] for name in ("down", "up")} == {"stream_matrix"}
    for name in ("outer", "inner.0", "inner.2", "end"):
        found = [rows[f"{name}.{i}.weight"] for i in (0, 1, 3, 4)]
        assert found == ["branch_in", "branch_in_bias", "branch_out (before_norm)", "branch_norm"]
    assert rows.get("inner.1.2.weight", "branch_in_bias") == "branch_in_bias"


def test_first_factor_of_a_product_is_multiplied() -> None:
    points = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    module = Weighted(depth=4)
    plan = Plan.from_model(module, points, base=Weighted(depth=2))
    expected = points
    with torch.no_grad():
        for layers in module.blocks:
            apart = expected[:, :, None] - expected[:, None]
            expected = expected + (layers(apart.square().sum(-1, keepdim=True)) / 2 * apart).sum(2)
        folded = fold(module, plan)(points)
        attach_multipliers(again := Weighted(depth=4), plan)
    torch.testing.assert_close(folded, expected)
    assert len(again.blocks) == 4
