"""Roles that errors suggest: taken over as they stand, they settle what they are about."""

import ast
import re
from typing import Any

import pytest
import torch
from helpers.residual_networks import X
from torch import Tensor, nn

from mlu_lightning import Plan


class Block(nn.Module):
    """Between its matrices, spare vectors multiply groups of units, so that they fit neither side of one."""

    def __init__(self, width: int = 8, **spare: int) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(width, 16), nn.Linear(16, width)
        self.spare_names = [*spare]
        for name, size in spare.items():
            setattr(self, name, nn.Parameter(torch.ones(size)))

    def forward(self, x: Tensor) -> Tensor:
        units = torch.tanh(self.read(x))
        for name in self.spare_names:
            vector = getattr(self, name)
            units = (units.unflatten(-1, (-1, len(vector))) * vector).flatten(-2)
        return x + self.write(units)


def network(depth: int, odd_block: int | None = None, **spare: int) -> nn.Module:
    blocks = (Block(**(spare if odd_block in (None, number) else {})) for number in range(depth))
    return nn.Sequential(nn.Linear(3, 8), *blocks, nn.Linear(8, 2))


def suggested(message: str) -> dict[str, str]:
    line: dict[str, str] = ast.literal_eval(re.findall(r"overrides=(\{.*?\})", message)[0])
    return line


@pytest.mark.parametrize(
    ("arguments", "patterns"),
    [
        ({"spare": 4}, ["*.spare"]),
        ({"spare": 4, "other": 2}, ["*.spare", "*.other"]),
        ({"spare": 4, "odd_block": 1}, ["*.spare"]),
    ],
    ids=str,
)
def test_suggestion_for_a_model_deeper_than_its_base(arguments: dict[str, Any], patterns: list[str]) -> None:
    model, base = network(40, **arguments), network(2, **arguments)
    with pytest.raises(ValueError, match="could not be placed") as error:
        Plan.from_model(model, X, base=base)
    line = suggested(str(error.value))
    assert [*line] == patterns and len(str(error.value)) < 950
    assert Plan.from_model(model, X, base=base, overrides=line).roles.keys() == dict(model.named_parameters()).keys()


def test_pattern_of_a_block_that_the_base_has_not() -> None:
    model, base = network(4), network(2)
    assert Plan.from_model(model, X, base=base, overrides={"4.read.weight": "branch_in"}).streams[0].base_depth == 2
    with pytest.raises(ValueError, match=r"override '5\.read\.weight'.*matches no parameter"):
        Plan.from_model(base, X, base=model, overrides={"5.read.weight": "branch_in"})


def test_names_are_written_out_where_a_glob_would_match_others() -> None:
    class Mixed(Block):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.spare

    model = nn.Sequential(nn.Linear(3, 8), Block(spare=4), Mixed(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="could not be placed") as error:
        Plan.from_model(model, X)
    assert [*suggested(str(error.value))] == ["1.spare"]


def test_positions_that_autograd_does_not_show_are_a_table() -> None:
    class Positions(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, width))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table.data[: len(x)]

    def build(width: int) -> nn.Module:
        positions = Positions(width)
        return nn.Sequential(nn.Linear(3, width), positions, *(Block(width) for _ in range(2)), nn.Linear(width, 2))

    plan = Plan.from_model(build(32), X[:3], base=build(8), overrides={"1.table": "embedding"})
    for name in ("1.table", "0.weight"):  # as of data, of which 0.weight is the matrix
        assert (plan.scales("adam")[name].lr, plan.scales("adam")[name].std) == (1, 1)
