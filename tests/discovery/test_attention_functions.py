"""Attention that somebody's own function computes is planned as torch's fused one is, whose plan is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from mlu_lightning import Plan
from mlu_lightning.discovery.trace import trace_module
from mlu_lightning.utilities.function_calls import watched

TOKENS = torch.zeros(2, 6, dtype=torch.long)


class Recomputed(Function):
    """Attention that keeps its inputs alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Any:
        weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        ctx.save_for_backward(query, key, value)
        ctx.set_materialize_grads(False)
        return weights @ value, weights.detach()


class Separate(Function):
    """The same with a context that is set up after the forward pass."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor) -> Any:  # type: ignore[override]
        return (query @ key.mT).div(query.shape[-1] ** 0.5).softmax(-1) @ value

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)


def masked(query: Tensor, key: Tensor, value: Tensor) -> Any:
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 6, 6, device="cpu")
    return flex_attention(query, key, value, lambda s, b, h, i, j: 20 * torch.tanh((s + 0.1 * (i - j)) / 20), mask)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "fused": F.scaled_dot_product_attention,
    "recomputed": lambda *given: Recomputed.apply(*given)[0],
    "separate": lambda *given: Separate.apply(*given),
    "flex": flex_attention,
    "flex, masked and capped": masked,
}


class Attending(nn.Module):
    def __init__(self, function: Callable[..., Any], heads: int, head_dim: int) -> None:
        super().__init__()
        self.function, self.heads = function, heads
        self.embed, self.norm, self.readout = nn.Embedding(9, 16), nn.LayerNorm(16), nn.Linear(16, 9)
        self.q, self.k, self.v = (nn.Linear(16, heads * head_dim) for _ in range(3))
        self.o = nn.Linear(heads * head_dim, 16)

    def forward(self, tokens: Tensor) -> Any:
        h = self.embed(tokens)
        x = self.norm(h)
        parts = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.readout(h + self.o(self.function(*parts).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("heads_and_dim", [(4, 4), (2, 16)])
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "fused"])
def test_a_plan_is_that_of_fused_attention(name: str, heads_and_dim: tuple[int, int]) -> None:
    plan, expected = (
        Plan.from_model(Attending(FUNCTIONS[each], *heads_and_dim), TOKENS, base=Attending(FUNCTIONS[each], 2, 4))
        for each in (name, "fused")
    )
    assert (plan.branches, plan.multipliers, plan.warnings) == (
        expected.branches,
        expected.multipliers,
        expected.warnings,
    )
    assert plan.scales("sgd") == expected.scales("sgd")


class Hidden(Function):
    """What it makes is not made by operations that autograd could follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return x.detach() * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * 2


def test_a_function_that_cannot_be_seen_through_stays_one_node() -> None:
    module = Attending(lambda q, k, v: F.scaled_dot_product_attention(Hidden.apply(q), k, v), 2, 8)
    trace = trace_module(module, TOKENS)
    (attention,) = (node for node in _behind(trace.roots[0]) if "ScaledDotProduct" in node.name())
    assert attention.next_functions[0][0].name() == "HiddenBackward"
    assert Hidden.apply(torch.ones(1, requires_grad=True).exp()).grad_fn.name() == "HiddenBackward"


def _behind(node: Any) -> Any:
    yield node
    for operand, _ in node.next_functions:
        if operand is not None:
            yield from _behind(operand)


def test_flex_attention_can_be_watched() -> None:
    module = Attending(flex_attention, 2, 8)
    with torch.no_grad(), watched(module, lambda place, *_: None):
        torch.testing.assert_close(module(TOKENS), module(TOKENS))
