"""What a stream goes through again and again: norms after every k-th addition, matrices and gains beside branches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.residual_networks import Block, Net
from torch import Tensor, nn

from mlu_lightning import Plan, attach_multipliers, discover, initialize, scale_optimizer

X = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))


class Normed(nn.Module):
    """Several branches, and one norm on the stream."""

    def __init__(self, branches: int) -> None:
        super().__init__()
        self.branches, self.norm = nn.ModuleList(Block() for _ in range(branches)), nn.LayerNorm(8)

    def forward(self, h: Tensor) -> Any:
        for branch in self.branches:
            h = h + branch(h)
        return self.norm(h)


class Beside(Block):
    """A branch, and a matrix or a gain of the stream's own."""

    def __init__(self, matrix: bool, width: int = 8) -> None:
        super().__init__(width)
        self.skip = nn.Linear(width, width) if matrix else None
        self.gain = None if matrix else nn.Parameter(torch.ones(width))
        if self.skip is not None:
            nn.init.orthogonal_(self.skip.weight)

    def forward(self, h: Tensor) -> Any:
        return (self.gain * h if self.skip is None else self.skip(h)) + super().forward(h)


def network(blocks: list[nn.Module], width: int = 8) -> Net:
    embed, out = nn.Linear(3, width), nn.Linear(width, 2)
    return Net(
        lambda net, x: net.out(nn.Sequential(*net.blocks)(net.embed(x))),
        blocks=nn.ModuleList(blocks),
        embed=embed,
        out=out,
    )


@pytest.mark.parametrize("branches", [1, 2, 4])
@pytest.mark.parametrize("depths", [(1, 6), (2, 6), (6, 2)])
def test_norms_after_every_few_additions_compound(branches: int, depths: tuple[int, int]) -> None:
    base, module = (network([Normed(branches) for _ in range(n)]) for n in depths)
    plan = Plan.from_model(module, X, base=base)
    assert {parameter.row for name, parameter in plan.parameters.items() if "norm.weight" in name} == {
        "stream_norm (post_norm)"
    }
    factors = {scale.lr for name, scale in plan.scales("adamw").items() if "norm" in name and "weight" in name}
    assert factors == {depths[0] / depths[1]} and (
        any("post-norm" in w for w in plan.warnings) or depths[1] < depths[0]
    )
    again = Plan.from_model(module, X, base=plan)
    assert again.scales("sgd") == plan.scales("sgd")


def test_norms_before_branches_and_one_after_all_do_not() -> None:
    def forward(net: Net, x: Tensor) -> Any:
        h = net.embed(x)
        for block, norm in zip(net.blocks, net.norms, strict=True):
            h = h + block(norm(h))
        return net.out(net.last(h))

    structure = discover(Net(forward, norms=nn.ModuleList(nn.LayerNorm(8) for _ in range(2)), last=nn.LayerNorm(8)), X)
    assert structure.parameters["last.weight"].row == "stream_norm" and not structure.warnings


def moved(depth: int, matrix: bool) -> float:
    """Relative change of the output in one step of what is beside the branches alone, over a few draws."""
    changes = []
    for seed in range(6):
        torch.manual_seed(seed)
        module, base = (network([Beside(matrix, 64) for _ in range(n)], 64) for n in (depth, 2))
        plan = Plan.from_model(module, X, base=base)
        initialize(module, plan), attach_multipliers(module, plan)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("skip.weight" in name or "gain" in name)
        optimizer = torch.optim.AdamW(module.parameters(), 1e-4, weight_decay=0.0, eps=1e-12)
        scale_optimizer(optimizer, module, plan)
        before = module(X)
        (before - X[:, :2]).square().mean().backward()
        optimizer.step()
        changes.append(((module(X) - before).square().mean() / before.square().mean()).sqrt().item())
    return sum(changes) / len(changes)


@pytest.mark.parametrize("matrix", [True, False], ids=["matrix", "gain"])
def test_what_is_beside_branches_in_every_block_moves_the_output_as_much_at_every_depth(matrix: bool) -> None:
    plan = Plan.from_model(
        network([Beside(matrix) for _ in range(8)]), X, base=network([Beside(matrix) for _ in range(2)])
    )
    name = "blocks.3.skip.weight" if matrix else "blocks.3.gain"
    assert plan.scales("adamw")[name].lr == 1 / 4 and any(
        "beside the branch of every block" in w for w in plan.warnings
    )
    assert moved(16, matrix) == pytest.approx(moved(2, matrix), rel=0.4)
