"""What errors suggest, pasted as it is printed, leads to a right plan: in all blocks of every architecture."""

import ast
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.third_party import MODELS, expected
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from mlu_lightning import Plan

Build = Callable[[int], tuple[nn.Module, Any]]


class Left(nn.Module):
    """Makes a weight a product, whose entries mix."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.eye(rows))

    def forward(self, weight: torch.Tensor) -> Any:
        return self.left @ weight


def spare(part: Any) -> None:
    """Multiplies units in turn by two numbers, which are of bounded size in a branch."""
    part.spare = nn.Parameter(torch.ones(2))
    part.register_forward_hook(lambda m, _, made: (made.unflatten(-1, (-1, 2)) * m.spare).flatten(-2))


def waves(part: Any) -> None:
    part.modes = nn.Parameter(torch.ones(1, dtype=torch.cfloat))
    part.register_forward_hook(lambda m, _, made: torch.fft.irfft(torch.fft.rfft(made) * m.modes, n=made.shape[-1]))


def product(part: Any) -> None:
    register_parametrization(part, "weight", Left(part.out_features))


def settled(module: nn.Module, example: Any, base: nn.Module) -> Plan:
    overrides: dict[str, str] = {}
    for _ in range(3):
        try:
            return Plan.from_model(module, example, base=base, overrides=overrides)
        except ValueError as error:
            overrides |= ast.literal_eval(re.findall(r"overrides=(\{.*?\})", str(error))[0])
    raise AssertionError(f"{overrides} did not settle it")


def pasted(build: Build, spoil: Callable[[Any], None]) -> None:
    """Spoil the first matrices of all perceptrons of a module and its base, and paste what is suggested."""
    (module, example), (base, _) = build(1), build(0)
    plain = Plan.from_model(module, example, base=base)
    of_units = [n for n, p in plain.parameters.items() if p.branch is not None and p.row == "branch_in"]
    of_mlp = [n for n in of_units if plain.branches[plain.parameters[n].branch or 0].kind == "mlp"]
    of_base = {re.sub(r"\d+", "*", name) for name in of_mlp}
    for name in of_mlp:
        spoil(module.get_submodule(name.removesuffix(".weight")))
    for name, _ in [*base.named_parameters()]:
        if re.sub(r"\d+", "*", name) in of_base:
            spoil(base.get_submodule(name.removesuffix(".weight")))
    plan = settled(module, example, base)
    assert of_mlp and len(plan.parameters) >= len(plain.parameters) + len(of_mlp)
    for name, entry in plan.parameters.items():
        if name in plain.parameters:
            assert (entry.row, entry.ratios) == (plain.parameters[name].row, plain.parameters[name].ratios), name
        elif name.endswith("spare"):
            depth = plan.streams[0].depth / plan.streams[0].base_depth
            assert (plan.scales("adamw")[name].lr, plan.scales("sgd")[name].lr) == (1, depth), name
        else:
            assert entry.row == "frozen"


OWN = {
    name: lambda size, of=of: (of.build(*((1, 2, 16), (3, 4, 32))[size]), of.example)
    for name, of in ARCHITECTURES.items()
}
OTHERS: dict[str, Build] = {name: lambda size, build=MODELS[name]: build(size + 1) for name in expected()}  # type: ignore[misc]


@pytest.mark.parametrize("spoil", [spare, waves, product])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "gpt neox" else pytest.mark.slow) for name in {**OWN, **OTHERS}]
)
def test_suggestions_are_right(name: str, spoil: Callable[[Any], None]) -> None:
    try:
        pasted({**OWN, **OTHERS}[name], spoil)
    except (ImportError, IndexError, AttributeError) as error:
        pytest.skip(f"not installed, or no perceptron of nn.Linear: {error}")
