"""Stages of other widths and head dimensions under one name pattern: each branch is planned next to its own counterpart."""

import pytest
import torch
from torch import Tensor, nn

from mlu_lightning import Plan


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.query, self.key = heads, nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))


def network(widths: tuple[int, int] = (8, 24), heads: tuple[int, int] = (2, 2), blocks: int = 1) -> nn.Module:
    first, second = (
        nn.Sequential(*(Attention(w, h) for _ in range(blocks))) for w, h in zip(widths, heads, strict=True)
    )
    narrow, wide = widths
    return nn.Sequential(
        nn.Linear(3, narrow), nn.Sequential(first, nn.Linear(narrow, wide), second), nn.Linear(wide, 2)
    )


@pytest.mark.parametrize("blocks", [1, 3])
def test_stages_keep_their_own_base(blocks: int) -> None:
    example = torch.ones(1, 4, 3)
    plan = Plan.from_model(network((16, 48), (4, 4), blocks), example, base=network())
    assert {(b.head_dim, b.base_head_dim, b.hidden, b.base_hidden) for b in plan.branches} == {
        (4, 4, 4, 2),
        (12, 12, 4, 2),
    }
    assert {multiplier.kind for multiplier in plan.multipliers} == {"branch", "readout"}
    again = Plan.from_model(network((32, 96), (8, 8), blocks), example, base=plan)
    assert {b.base_hidden for b in again.branches} == {2} and {m.kind for m in again.multipliers} == {
        "branch",
        "readout",
    }


def test_identity_at_the_base() -> None:
    plan = Plan.from_model(network(), torch.ones(1, 4, 3), base=network())
    assert all(multiplier.value == 1 for multiplier in plan.multipliers)
