"""Residual additions that are a part of other functions, or changes in place, are multiplied as those of ``+`` are."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce

import pytest
import torch
from helpers.residual_networks import Block, Net, stepwise
from torch import Tensor, nn

from mlu_lightning import Plan, attach_multipliers, fold

X = torch.linspace(-1, 1, 60).reshape(4, 5, 3)
ORDER = torch.arange(5)


def changed_view(h: Tensor, y: Tensor) -> Tensor:
    h = h.clone()
    h[:, 1:] += y[:, 1:]
    return h


def changed_flat(h: Tensor, y: Tensor) -> Tensor:
    h = h.clone()
    h.view(-1, h.shape[-1]).sub_(-y.flatten(0, 1))
    return h


def filled(h: Tensor, y: Tensor) -> Tensor:
    h = h.clone()
    h[:, 0] = h[:, 0] + y[:, 0]
    return h


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "alpha": lambda h, y: torch.add(h, y, alpha=2),
    "rsub": lambda h, y: torch.rsub(-y, h),
    "stack": lambda h, y: torch.stack([h, y]).sum(0),
    "mean": lambda h, y: 2 * torch.stack([y, h], 1).mean(1),
    "cat": lambda h, y: torch.cat([h, y], -1).unflatten(-1, (2, -1)).sum(-2),
    "einsum": lambda h, y: torch.einsum("sbnd,s->bnd", torch.stack([h, y]), torch.ones(2)),
    "matmul": lambda h, y: torch.stack([h, y], -1) @ torch.ones(2),
    "foreach": lambda h, y: torch._foreach_add([h], [y])[0],
    "addcmul": lambda h, y: torch.addcmul(h, y, torch.ones(1), value=0.5),
    "addcdiv": lambda h, y: torch.addcdiv(h, y, torch.full((1,), 2.0)),
    "lerp": lambda h, y: 2 * torch.lerp(h, y, 0.5),
    "lerp_": lambda h, y: h.clone().lerp_(y, 0.1),
    "view": changed_view,
    "flat": changed_flat,
    "filled": filled,
    "index_add": lambda h, y: h.index_add(1, ORDER[:3], y[:, :3], alpha=0.5),
    "scatter_add": lambda h, y: h.scatter_add(1, ORDER[None, :, None].expand_as(h), y),
    "index_put": lambda h, y: h.clone().index_put_((ORDER[:4],), y, accumulate=True),
    "reduce": lambda h, y: reduce(operator.iadd, [h.clone(), y]),
}


def network(add: Callable[[Tensor, Tensor], Tensor], depth: int) -> Net:
    return stepwise(lambda net, h, block: add(h, block(h)), blocks=nn.ModuleList(Block() for _ in range(depth)))


class Product(nn.Module):
    """Adds the product of its last matrix itself."""

    def __init__(self, batched: bool, depth: int) -> None:
        super().__init__()
        self.batched, self.embed, self.out = batched, nn.Linear(3, 8), nn.Linear(8, 2)
        self.inner = nn.ModuleList(nn.Linear(8, 12) for _ in range(depth))
        self.outer = nn.ParameterList(torch.randn(12, 8) / 12 for _ in range(depth))

    def forward(self, x: Tensor, multiplier: float = 1.0) -> Tensor:
        h: Tensor = self.embed(x)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            units, matrix = torch.tanh(inner(h)), multiplier * outer
            if self.batched:
                h = torch.baddbmm(h, units, matrix.expand(4, -1, -1), alpha=0.5)
            else:
                h = torch.addmm(h.flatten(0, 1), units.flatten(0, 1), matrix).view_as(h)
        return torch.as_tensor(self.out(h))


@pytest.mark.parametrize("form", FORMS)
def test_branch_is_multiplied_as_by_hand(form: str) -> None:
    add = FORMS[form]
    net = network(add, depth=4)
    plan = Plan.from_model(net, X, base=network(add, depth=2))
    by_hand = network(lambda h, y: add(h, y / 2), depth=4)
    by_hand.load_state_dict(net.state_dict())
    attach_multipliers(net, plan)
    torch.testing.assert_close(net(X), by_hand(X))


@pytest.mark.parametrize("batched", [False, True])
def test_matrix_of_a_sum_in_one_step_is_multiplied_as_by_hand(batched: bool) -> None:
    net = Product(batched, depth=4)
    plan = Plan.from_model(net, X, base=Product(batched, depth=2))
    expected = net(X, multiplier=0.5)
    torch.testing.assert_close(fold(net, plan)(X), expected)
