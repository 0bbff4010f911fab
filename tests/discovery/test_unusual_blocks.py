"""Blocks whose attention is a part of a branch, and streams that are joined, read by other streams, or gated, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlu_lightning import Plan, discover

X = torch.linspace(-1, 1, 60).reshape(4, 5, 3)


class Parts(nn.Module):
    """An embedding, two blocks of the same parts, and a readout, put together by ``run``."""

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, width), nn.Linear(width, 2)
        self.blocks = nn.ModuleList(nn.ModuleDict(self.parts(width)) for _ in range(depth))

    def parts(self, width: int) -> dict[str, nn.Module]:
        raise NotImplementedError

    def step(self, h: Any, block: Any) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        h = self.embed(x)
        for block in self.blocks:
            h = self.step(h, block)
        return self.out(h)


def perceptron(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 3 * width), nn.Tanh(), nn.Linear(3 * width, width))


class Temperature(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def attend(block: Any, h: Tensor) -> Tensor:
    q, k, v = (block[name](h).unflatten(-1, (-1, 4)).transpose(1, 2) for name in "qkv")
    scale = block["scale"] if "scale" in block else nn.Identity()
    attended: Tensor = scale(q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
    return attended.transpose(1, 2).flatten(2)


def projections(width: int) -> dict[str, nn.Module]:
    return {name: nn.Linear(width, width, bias=False) for name in "qkvo"}


class OfClass(Parts):
    """One token attends, and the norms of the others are added next to what it gets."""

    def parts(self, width: int) -> dict[str, nn.Module]:
        return {"norm": nn.LayerNorm(width), **projections(width)}

    def step(self, h: Any, block: Any) -> Any:
        normed = block["norm"](h)
        return h + torch.cat([block["o"](attend(block, normed))[:, :1], normed[:, 1:]], 1)


class Within(Parts):
    """A perceptron reads an inner stream, to which an attention is added."""

    def parts(self, width: int) -> dict[str, nn.Module]:
        inner = {"norm": nn.LayerNorm(width), "scale": Temperature(width // 4), **projections(width)}
        return {"first": nn.Conv1d(width, width, 1, groups=width), **inner, "mlp": perceptron(width)}

    def step(self, h: Any, block: Any) -> Any:
        inner = block["first"](h.transpose(1, 2)).transpose(1, 2)
        return h + block["mlp"](inner + block["o"](attend(block, block["norm"](inner))))


class Positions(Parts):
    """Positions are added in every block: one number for each, and in place."""

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__(width, depth)
        self.places = nn.Parameter(torch.zeros(5))

    def parts(self, width: int) -> dict[str, nn.Module]:
        return {"mlp": perceptron(width)}

    def step(self, h: Any, block: Any) -> Any:
        h = h + block["mlp"](h)
        view = h.flatten(1).view_as(h)
        view += self.places.view(1, 5, 1)
        return h


class Joined(Parts):
    """Two streams, one of each part, which are joined before the last block."""

    def parts(self, width: int) -> dict[str, nn.Module]:
        return {"one": perceptron(width), "other": perceptron(width)}

    def step(self, h: Any, block: Any) -> Any:
        one, other = h[:, :2], h[:, 2:]
        if block is self.blocks[-1]:
            return h + block["one"](h)
        return torch.cat([one + block["one"](one), other + block["other"](other)], 1)


class ReadByAnother(Parts):
    """A stream with norms between its additions, and one that attends to it."""

    def parts(self, width: int) -> dict[str, nn.Module]:
        return {"mlp": perceptron(width), "norm": nn.LayerNorm(width), **projections(width)}

    def forward(self, x: Tensor) -> Any:
        h = second = self.embed(x)
        for block in self.blocks:
            h = block["norm"](h + block["mlp"](h))
            second = second + block["o"](block["q"](second) * torch.sigmoid(block["k"](h)).mean(1, keepdim=True))
        return self.out(second) + self.out(h)


class Recurrent(Parts):
    def parts(self, width: int) -> dict[str, nn.Module]:
        return {"mlp": perceptron(width), "cell": nn.GRUCell(width, width)}

    def step(self, h: Any, block: Any) -> Any:
        return block["cell"](block["mlp"](h).flatten(0, 1), h.flatten(0, 1)).view_as(h)


class Gated(Parts):
    """The stream is multiplied by a number for each token that is made of it, between additions."""

    def parts(self, width: int) -> dict[str, nn.Module]:
        return {"mlp": perceptron(width), "gate": nn.Linear(width, 1)}

    def step(self, h: Any, block: Any) -> Any:
        h = h * torch.sigmoid(block["gate"](h))
        return h + block["mlp"](h)


def rows(module: nn.Module) -> dict[str, str]:
    facts = discover(module, X).parameters
    return {name.removeprefix("blocks.1."): str(facts[name].row) for name in facts}


def test_writer_comes_before_no_norm_that_another_part_of_the_branch_ends_in() -> None:
    found = rows(OfClass())
    assert (found["o.weight"], found["norm.weight"]) == ("branch_out", "branch_norm")


def test_heads_are_no_units_of_a_branch_that_a_perceptron_writes() -> None:
    found = rows(Within())
    assert {found[f"{name}.weight"] for name in "qkvo"} == {"branch_hidden"}
    assert {found[f"{name}.weight"] for name in ("norm", "scale")} == {"branch_in_bias"}
    plan = Plan.from_model(Within(16), X, base=Within())
    assert {branch.hidden for branch in plan.branches} == {48}
    ratios = {name: plan.parameters[f"blocks.0.{name}.weight"].ratios for name in ("norm", "scale", "mlp.2", "o")}
    assert [(ratio.inputs, ratio.outputs) for ratio in ratios.values()] == [(1, 2), (1, 2), (2, 2), (2, 2)]


def test_positions_between_additions_are_no_branch_and_sum_over_coordinates() -> None:
    plan = Plan.from_model(Positions(16), X, base=Positions())
    assert len(plan.branches) == 2
    assert plan.scales("sgd")["places"].lr == 1  # one number for all coordinates, whose gradients it sums


def test_depth_of_joined_streams_is_that_of_the_longest() -> None:
    assert discover(Joined(depth=3), X).depth == 3


def test_norm_of_a_stream_is_not_that_of_a_branch_that_reads_it() -> None:
    assert rows(ReadByAnother())["norm.weight"] == "stream_norm (post_norm)"


@pytest.mark.parametrize("kind", [Recurrent, Gated])
def test_gates_on_the_stream_are_refused(kind: type[Parts]) -> None:
    with pytest.raises(ValueError, match=r"multiplies its stream by what blocks\.\d\.(cell|gate) makes of the stream"):
        discover(kind(depth=3), X)
