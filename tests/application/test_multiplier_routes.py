"""Which places are on every route from a loss to its leaves, in graphs that are small enough to see it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mlu_lightning import Plan, Role, attach_multipliers
from mlu_lightning.application.multiplier_routes import ActingMultipliers, routes
from mlu_lightning.discovery.structure import Site
from mlu_lightning.planning import Multiplier, ParameterPlan


def test_places_are_on_all_routes_or_not() -> None:
    a, b, c = (torch.full((2, 2), 0.5, requires_grad=True) for _ in range(3))
    first = (a @ b) * 2
    looped = ((first @ b) + c) * 3  # b is used before the first place and after it
    detour = looped + c.sin()
    found = routes(detour.sum(), [[first.grad_fn], [looped.grad_fn]])
    assert [found[id(leaf)].passed for leaf in (a, b, c)] == [0b11, 0b10, 0b00]
    assert found[id(b)].beside == 0  # its first product has no place before it
    assert routes((first @ c).sum(), [[first.grad_fn]])[id(c)].beside == 1
    assert routes(torch.ones(()), []) == {}


def test_a_long_graph_is_no_recursion() -> None:
    leaf = torch.ones(1, requires_grad=True)
    value = leaf
    for _ in range(20_000):
        value = value + 1
    assert routes(value, [[value.grad_fn]])[id(leaf)].passed == 1


class Tied(nn.Module):
    """An embedding that is the readout, too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, how: str) -> Tensor:
        h = self.tokens(torch.arange(3))
        if how == "without logits":
            return h
        return self.head(h) if how == "called" else functional.linear(h, self.head.weight)


@pytest.mark.parametrize("how", ["called", "without logits", "around"])
def test_a_tied_readout_is_seen_where_its_weights_make_logits(how: Any) -> None:
    module = Tied()
    entry = ParameterPlan(Role.EMBEDDING, (5, 4), fans=(1, 4), base_fans=(1, 2), transposed=True)
    plan = Plan({"tokens.weight": entry}, (), (), (Multiplier("tokens.weight", "readout", 0.5, Site("head"), ()),))
    attach_multipliers(module, plan)
    acting = ActingMultipliers(module, plan)
    acting.track()
    loss = module(how).square().sum()
    if how != "around":
        return acting.refuse_detours(loss)
    with pytest.raises(ValueError, match=r"readout 'tokens.weight' was not seen.*Call the module"):
        acting.refuse_detours(loss)
