"""Attention logits of chosen rows: as torch's own attention has them, no more than are read, masked ones left out."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mlu_lightning.discovery import Tap
from mlu_lightning.observation import rms_change
from mlu_lightning.observation.features import chosen_logits, spread, watch_features
from mlu_lightning.utilities.function_calls import ATTENTION_CALL, CallPlace


def test_masked_logits_are_left_out_and_nothing_else_is() -> None:
    hidden, seen = -math.inf, torch.tensor([[1.0, 2.0]])
    assert rms_change(torch.tensor([[0.0, hidden]]), torch.tensor([[3.0, hidden]])) == 3
    for wrong in (math.nan, math.inf):
        assert not math.isfinite(rms_change(seen, torch.tensor([[wrong, 2.0]])))
    assert rms_change(seen, torch.tensor([[hidden, 2.0]])) == math.inf  # seen before


def test_attention_of_which_nothing_can_be_seen_is_left_out() -> None:
    kept: list[Tensor] = []
    tap = Tap("logits", 0, 0, "", "input", 0, -1, ATTENTION_CALL)
    watch, place = watch_features([tap], lambda tap, values: kept.append(values)), CallPlace("", ATTENTION_CALL, 0)
    watch(place, (), {"self": torch.full((1, 2, 3), -math.inf), "dim": -1})
    assert kept == []
    watch(place, (), {"self": torch.zeros(1, 2, 3), "dim": -1})
    assert torch.equal(kept[0], torch.zeros(2, 3))


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Notes how large the largest tensor is that is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and not func.is_view:
            self.entries = max(self.entries, made.numel())
        return made


FUSED = {"query": (8, 8, 1024, 16), "key": (8, 2, 1024, 16), "attn_mask": (8, 1, 1024, 1024)}


@pytest.mark.parametrize("shapes", [{"self": (8, 8, 1024, 1024)}, FUSED])
def test_of_many_logits_only_the_chosen_ones_are_computed(shapes: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {name: torch.ones(()).expand(shape) for name, shape in shapes.items()}
    with Largest() as largest:
        assert chosen_logits(arguments | {"dim": -1} if "self" in shapes else arguments, 32, 256).shape == (32, 256)
    assert largest.entries <= 32 * 256 * 16


@given(st.integers(1, 10**6), st.integers(1, 300))
def test_spread_takes_one_of_each_part(size: int, count: int) -> None:
    chosen = spread(size, count)
    assert len(chosen) == min(size, count) and chosen.equal(chosen.unique()) and 0 <= chosen[0] <= size // count
    assert size - 1 - size // count - 1 <= chosen[-1] < size


def test_spread_rows_are_of_many_queries() -> None:
    """At one distance, 31 of 32 rows would be of the same query where samples times heads are a multiple of 31."""
    heads, length = 62, 64
    assert len((spread(heads * length, 32) % length).unique()) > 20


@pytest.mark.parametrize(("mask", "causal"), [(None, False), (None, True), ("bool", False), ("float", False)])
def test_attention_by_these_logits_is_torchs(mask: str | None, causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 4, generator=generator) for _ in range(3))
    biases = torch.rand(5, 5, generator=generator)
    masks = {None: None, "bool": (biases > 0.3) | torch.eye(5).bool(), "float": biases}
    given: dict[str, Any] = {"attn_mask": masks[mask], "is_causal": causal, "scale": 0.7}
    weights = chosen_logits({"query": query, "key": key, **given}, 2 * 3 * 5, 5).softmax(-1).reshape(2, 3, 5, 5)
    expected = F.scaled_dot_product_attention(query, key, value, **given)
    torch.testing.assert_close(weights @ value, expected, rtol=1e-5, atol=1e-6)  # single precision
