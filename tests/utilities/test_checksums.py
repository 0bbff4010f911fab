"""Checksums: changes that they see, and moves and casts that they do not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mlu_lightning.utilities.checksums import checksums


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SHAPES: dict[str, Any] = {"matrix": (32, 48), "vector": (64,), "convolution": (8, 4, 3, 3)}
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "drawn again": lambda x: x.copy_(draw(*x.shape, seed=1)),
    "multiplied": lambda x: x.mul_(2),
    "two signs": lambda x: x.view(-1)[:2].neg_(),
    "two entries exchanged": lambda x: x.view(-1)[:2].copy_(x.view(-1)[:2].flip(0).clone()),
    "transposed": lambda x: x.copy_(x.flip(0)),
    "one bit": lambda x: x.view(torch.int32).view(-1)[3].bitwise_xor_(1),
    "through data": lambda x: x.data.view(-1)[0].add_(1),
}


def same(before: Tensor, after: Tensor) -> bool:
    one, two = (checksums({"x": x}, rough=True)["x"] for x in (before, after))
    return one.is_of(two) and two.is_of(one)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_seen(change: str, shape: str) -> None:
    before = draw(*SHAPES[shape])
    after = before.clone()
    assert same(before, after)
    CHANGES[change](after)
    assert not same(before, after)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_cast_is_no_change(dtype: torch.dtype) -> None:
    """Over draws of many sizes, also constant ones; what was drawn again is told from what was cast."""
    for seed, shape in enumerate([(3,), (300,), (5, 7), (128, 16), (16, 512), (64, 8, 3), (1, 1)] * 5):
        values = draw(*shape, seed=seed) * 0.02
        assert same(values, values.to(dtype)) and same(
            torch.full_like(values, 0.1), torch.full_like(values, 0.1).to(dtype)
        )
        if values.numel() > 100:
            assert not same(values, (draw(*shape, seed=seed + 1000) * 0.02).to(dtype))


def test_what_has_no_values_or_other_strides() -> None:
    assert not checksums({"x": torch.ones(2, device="meta"), "y": torch.ones(0)})
    for values in (torch.tensor(1.0), torch.ones(2, 2, dtype=torch.int8), draw(2, 2) > 0, torch.full((2,), torch.nan)):
        assert same(values, values.clone())
    images = draw(2, 3, 4, 4)
    assert same(images, images.to(memory_format=torch.channels_last))
    assert not same(torch.complex(draw(4), draw(4)), torch.complex(draw(4), -draw(4)))
