"""Numbers and names are checked where they enter, so that whatever is written can be read again."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mlu_lightning import Plan, attach_multipliers, scale_optimizer
from mlu_lightning.models import ResNet

BATCH = torch.ones(4, 3), torch.ones(4, 2)
INFINITE = "blocks.1.read.weight of the base ResNet has values that are not finite"
RATIOS, WRONG = ("batch_ratio", "token_ratio"), (1e21, 1e-21, 0, float("nan"), "x", None)


def resnet(hidden: int = 16, embedding: int = 8, value: float | None = None, constant: float = 1.0) -> ResNet:
    net = ResNet(depth=2, hidden=hidden, embedding=embedding, inputs=3, outputs=2)
    net.register_buffer("scale", torch.tensor(constant))
    if value is not None:
        with torch.no_grad():
            net.blocks[1].read.weight[3, 4] = value
    return net


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan.from_model(resnet(), BATCH, base=resnet(4))


class Empty(ResNet):
    """Parameters without entries."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.none = nn.ParameterList(torch.zeros(size) for size in ((0,), (0, 3), (3, 0)))

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + sum(each.sum() for each in self.none)


def test_parameters_without_entries() -> None:
    module, base = (Empty(depth=depth, hidden=8, embedding=4, inputs=3, outputs=2) for depth in (2, 1))
    empty = Plan.from_model(module, BATCH, base=base)
    assert Plan.from_yaml(empty.to_yaml(), "a") == empty
    attach_multipliers(module, empty)
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        scale_optimizer(kind(module.parameters(), lr=0.1), module, empty).remove()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({"base": {"value": value}}, INFINITE) for value in (float("nan"), float("-inf"))),
        *(
            ({own: {size: 0}}, "of ResNet .* no units")
            for own in ("base", "module")
            for size in ("hidden", "embedding")
        ),
        *(({key: value}, f"{key} is .*, and it has to be a") for key in ("alpha", *RATIOS) for value in WRONG),
        *(({own: {"constant": float("nan")}}, r"scale of ResNet is not a number") for own in ("base", "module")),
        ({"alpha": 1e15, "tuned": {"branch_out": {"multiplier": 1e15}}}, "blocks.0 would be multiplied by 1e.30, with"),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_what_cannot_be_planned(arguments: dict[str, Any], message: str) -> None:
    module, base = (resnet(**arguments.pop(key, {})) for key in ("module", "base"))
    with pytest.raises(ValueError, match=message):
        Plan.from_model(module, BATCH, base=base, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": 0.0}, "multiplier of .* has value = 0.0, and it should be a number from 1e-20"),
        ({"constant": float("inf")}, "has constant = inf"),
        ({"folds": ("a", "b", "a")}, "The multiplier of the branch 'blocks.0' folds twice into one parameter"),
    ],
)
def test_multipliers(change: dict[str, Any], message: str, plan: Plan) -> None:
    with pytest.raises(ValueError, match=message):
        replace(plan, multipliers=(replace(plan.multipliers[0], **change), *plan.multipliers[1:]))


def test_a_line_that_is_there_twice(plan: Plan) -> None:
    text = plan.to_yaml()
    (line,) = (line for line in text.splitlines() if "name: blocks.0, kind: branch" in line)
    for again in (
        line,
        line.replace("value: 1.0", "value: 0.5"),
        line.replace("module: blocks.0,", "module: blocks.1,"),
    ):
        with pytest.raises(ValueError, match=r"a.yaml: The multiplier of the branch 'blocks.0' is there twice"):
            Plan.from_yaml(text.replace(line, f"{line}\n{again}"), "a.yaml")


names = st.text(st.characters(), max_size=30) | st.text("x\n\U0001f600\"'", min_size=900, max_size=1100)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(names, st.floats(1e-30, 1e30), st.floats(1e-30, 1e30))
def test_whatever_is_planned_is_read_again(plan: Plan, name: str, alpha: float, std: float) -> None:
    entry = next(iter(plan.parameters.values()))
    try:
        made = replace(plan, parameters={name: replace(entry, base_std=std)}, warnings=(name,), alpha=alpha)
    except ValueError:
        assert not 1e-20 <= alpha <= 1e20 or any("\ud800" <= character <= "\udfff" for character in name)
    else:
        assert Plan.from_yaml(made.to_yaml(), "a") == made
