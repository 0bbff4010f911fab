"""Samples and checksums: changes that they see, and moves and casts that they do not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mlu_lightning.utilities.checksums import checksums
from mlu_lightning.utilities.samples import samples


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SHAPES: dict[str, Any] = {"matrix": (32, 48), "vector": (64,), "convolution": (8, 4, 3, 3)}
LARGE: dict[str, Any] = {"wide": (64, 300), "square": (192, 192), "convolution": (64, 32, 3, 3), "experts": (4, 96, 32)}
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
    one, two = (samples({"x": x})["x"] for x in (before, after))
    return one.is_of(two) and two.is_of(one)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_seen(change: str, shape: str) -> None:
    before = draw(*SHAPES[shape])
    after = before.clone()
    assert same(before, after) and checksums({"x": before}) == checksums({"x": after})
    CHANGES[change](after)
    assert not same(before, after) and checksums({"x": before}) != checksums({"x": after})


@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_any_slice_of_a_large_tensor_is_seen(shape: Any) -> None:
    """A row, a column, a unit, an input, or an expert: whatever lies along an axis."""
    before = draw(*shape)
    assert len(samples({"x": before})["x"].values) < before.numel() / 10
    for axis, length in enumerate(shape):
        if before.numel() // length < max(shape):
            for place in range(length):
                after = before.clone()
                after.select(axis, place).mul_(1.01)
                assert not same(before, after)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_a_cast_is_no_change(dtype: torch.dtype) -> None:
    """Over draws of many sizes, also constant ones; what was drawn again is told from what was cast."""
    for seed, shape in enumerate([(3,), (300,), (5, 7), (128, 16), (16, 512), (64, 8, 3), (1, 1)] * 5):
        values = draw(*shape, seed=seed) * 0.02
        same_values = torch.full_like(values, 0.1)
        assert same(values, values.to(dtype)) and same(same_values, same_values.to(dtype))
        if values.numel() > 100:
            assert not same(values, (draw(*shape, seed=seed + 1000) * 0.02).to(dtype))


def test_what_has_no_values_or_other_strides() -> None:
    empty = {"x": torch.ones(2, device="meta"), "y": torch.ones(0)}
    assert not samples(empty) and not checksums(empty)
    for values in (torch.tensor(1.0), torch.ones(2, 2, dtype=torch.int8), draw(2, 2) > 0, torch.full((2,), torch.nan)):
        assert same(values, values.clone())
    images = draw(64, 32, 4, 4)
    assert same(images, images.to(memory_format=torch.channels_last))
    assert not same(torch.complex(draw(4), draw(4)), torch.complex(draw(4), -draw(4)))
