"""How far a shape is from its limit: the distance ratio of theory.md, section 3, by hand, and as forward passes show it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlu_lightning import Plan, initialize
from mlu_lightning.application import attach_multipliers
from mlu_lightning.models import CausalTransformer


class Block(nn.Module):
    def __init__(self, hidden: int, width: int, norm: bool) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        self.norm = nn.RMSNorm(width) if norm else nn.Identity()

    def forward(self, stream: Tensor) -> Tensor:
        return self.norm(self.write(torch.tanh(self.read(stream))))


class Net(nn.Module):
    """A stream through blocks, each of which is applied ``again`` times."""

    def __init__(
        self, depth: int = 2, hidden: int = 256, width: int = 64, again: int = 1, norm: bool = False, zero: bool = False
    ) -> None:
        super().__init__()
        self.embed, self.readout = nn.Linear(3, width), nn.Linear(width, 2)
        self.blocks = nn.ModuleList(Block(hidden, width, norm) for _ in range(depth))
        self.again = again
        for block in self.blocks if zero else ():
            nn.init.zeros_(block.write.weight)

    def random_part(self, x: Tensor) -> float:
        """What blocks at their initial weights, each next to a stream without others, write to it."""
        with torch.no_grad():
            stream = self.embed(x)
            written = sum(self.again * block(stream) for block in self.blocks)
            return float(written.square().mean() / stream.square().mean()) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embed(x)
        for block in self.blocks:
            for _ in range(self.again):
                stream = stream + block(stream)
        return self.readout(stream)


X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("settings", "sizes", "ratio"),
    [
        ({}, {"width": 256}, 2),
        ({}, {"width": 256, "hidden": 1024}, 1),
        ({}, {"hidden": 64}, 2),
        ({}, {"depth": 8}, 1 / 2),
        ({}, {"depth": 8, "width": 512}, math.sqrt(2)),
        ({}, {"again": 4}, 1),  # uses of one weight are not independent of each other
        ({"norm": True}, {"width": 256}, 1),  # which undoes the size of what is written
        ({"norm": True}, {"depth": 8, "hidden": 64}, 1 / 2),
    ],
)
def test_ratio_is_that_of_forward_passes(settings: dict[str, Any], sizes: dict[str, int], ratio: float) -> None:
    torch.manual_seed(0)
    base, module = Net(**settings), Net(**settings | sizes)
    plan = Plan.from_model(module, X, base=base)
    (distance,) = plan.distances
    assert distance.ratio == pytest.approx(ratio) and distance.kind == "mlp"
    assert bool(plan.advice) == distance.is_far == (ratio > 1.5)
    assert Plan.from_yaml(plan.to_yaml(), "plan").distances == plan.distances
    assert Plan.from_model(module, X, base=plan).distances == plan.distances
    initialize(module, plan, seed=0)
    attach_multipliers(module, plan)
    assert module.random_part(X) / base.random_part(X) == pytest.approx(ratio, rel=0.12)
    assert Plan.from_model(base, X, base=base).distances[0].ratio == 1


def test_each_kind_of_branch_has_its_own() -> None:
    def build(depth: int, heads: int, units: int, embedding: int) -> CausalTransformer:
        return CausalTransformer(11, 4, depth, embedding, heads, head_dim=2, mlp_hidden=units)

    base, module = build(1, 2, 16, 4), build(2, 2, 64, 16)
    plan = Plan.from_model(module, base=base)
    # L is 4, with two branches for each block
    expected = {"attention": (math.sqrt(2), math.sqrt(16 / (4 * 2))), "mlp": (math.sqrt(4 / 8), math.sqrt(16 / 256))}
    assert {d.kind: (d.ratio, d.absolute) for d in plan.distances} == {
        kind: pytest.approx(of) for kind, of in expected.items()
    }
    assert "attention 1.41, 1.41 times the base's (farther); mlp 0.25, 0.707 times the base's (nearer)" in str(plan)
    absolute = Plan.from_model(module)
    assert [(d.ratio, d.absolute) for d in absolute.distances] == [
        (None, pytest.approx(of[1])) for of in expected.values()
    ]
    assert "√(D/(L·M)): attention 1.41; mlp 0.25\n" in str(absolute) and not absolute.advice


def test_warning_says_what_to_do(tmp_path: Path) -> None:
    plan = Plan.from_model(Net(width=1024), X, base=Net())
    (warning,) = plan.advice
    assert "mlp branches write 4 times as much to the stream as the base's" in warning
    assert warning.endswith(
        "grow hidden width or depth along with the embedding, or tune at a base with a larger L·M/D"
    )
    assert "Warning: the initial weights of mlp" in str(plan) and not plan.warnings
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml").advice == (warning,)


def test_nothing_is_said_where_there_is_no_random_part() -> None:
    """Matrices that start at zero, and other parameterizations, whose random part is another."""
    assert not Plan.from_model(Net(width=1024, zero=True), X, base=Net(zero=True)).distances
    plan = Plan.from_model(Net(width=1024), X, base=Net(), parameterization="completep")
    assert (plan.distances, plan.advice) == ((), ()) and "random part" not in str(plan)
