"""Roles that errors suggest: taken over as they stand, they settle what they are about."""

import ast
import fnmatch
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.residual_networks import X
from helpers.third_party import MODELS, expected
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


@pytest.mark.parametrize("arguments", [{"spare": 4}, {"spare": 4, "other": 2}, {"spare": 4, "odd_block": 1}], ids=str)
def test_suggestion_for_a_model_deeper_than_its_base(arguments: dict[str, Any]) -> None:
    model, base = network(40, **arguments), network(2, **arguments)
    with pytest.raises(ValueError, match="could not be placed") as error:
        Plan.from_model(model, X, base=base)
    line = suggested(str(error.value))
    assert [*line] == [f"*.{name}" for name in ("spare", "other") if name in arguments] and len(str(error.value)) < 950
    plan = Plan.from_model(model, X, base=base, overrides=line)
    assert plan.roles.keys() == dict(model.named_parameters()).keys()
    # of bounded size in a branch
    found = {
        (plan.scales("adamw")[n].lr, plan.scales("sgd")[n].lr) for n in plan.roles if n.endswith(("spare", "other"))
    }
    assert found == {(1, 20)}


SHAPES = (1, 2, 16), (3, 4, 32)
REGISTRY: dict[str, Callable[[int], Any]] = {
    **{n: lambda size, of=of: (of.build(*SHAPES[size]), of.example) for n, of in ARCHITECTURES.items()},  # type: ignore[misc]
    **{n: lambda size, n=n: MODELS[n](size + 1) for n in expected()},  # type: ignore[misc]
}


def spoil(part: Any) -> None:
    """Multiply a weight by a matrix, what it makes by a complex number, and units in turn by two numbers."""
    part.left = nn.Parameter(torch.eye(part.out_features))
    part.mode, part.spare = nn.Parameter(torch.ones((), dtype=torch.cfloat)), nn.Parameter(torch.ones(2))

    def forward(x: Tensor) -> Any:
        made = torch.nn.functional.linear(x, part.left @ part.weight, part.bias)
        return ((made * part.mode).real.unflatten(-1, (-1, 2)) * part.spare).flatten(-2)

    part.forward = forward


@pytest.mark.parametrize("name", [n if n == "llama" else pytest.param(n, marks=pytest.mark.slow) for n in REGISTRY])
def test_suggestions_in_the_registry(name: str) -> None:
    if name in MODELS:
        pytest.importorskip(name.partition(".")[0])
    (module, example), (base, _) = REGISTRY[name](1), REGISTRY[name](0)
    plain, overrides = Plan.from_model(module, example, base=base), dict[str, str]()
    of_mlp = {number for number, branch in enumerate(plain.branches) if branch.kind == "mlp"}
    rows = {re.sub(r"\d+", "*", n): p.row for n, p in plain.parameters.items() if p.branch in of_mlp}
    for each in (module, base):
        for part_name, part in [*each.named_modules()]:
            if isinstance(part, nn.Linear) and rows.get(re.sub(r"\d+", "*", f"{part_name}.weight")) == "branch_in":
                spoil(part)
    if not any(n.endswith("spare") for n, _ in module.named_parameters()):
        pytest.skip("no perceptrons of nn.Linear")
    for _ in range(3):
        with pytest.raises(ValueError, match="overrides=") as error:
            Plan.from_model(module, example, base=base, overrides=overrides)
        overrides |= suggested(str(error.value))
    plan = Plan.from_model(module, example, base=base, overrides=overrides)
    lr = {n: (plan.scales("adamw")[n].lr, plan.scales("sgd")[n].lr) for n in plan.roles}
    for n, entry in plan.parameters.items():
        if n.endswith("spare"):
            depth = plan.streams[plan.branches[entry.branch or 0].stream]
            assert lr[n] == (1, depth.depth / depth.base_depth), n
        elif any(fnmatch.fnmatch(n, pattern) for pattern in overrides):
            assert (entry.row, lr[n]) == ("frozen", (1, 1)), n
        else:
            assert (entry.row, entry.ratios) == (plain.parameters[n].row, plain.parameters[n].ratios), n


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
