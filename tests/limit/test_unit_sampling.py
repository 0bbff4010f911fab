"""Hidden units of the infinite model: each is a Gaussian draw, together they have less noise than independent ones."""

import importlib
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from mlu_lightning.limit.infinite_model import infinite_model
from mlu_lightning.limit.unit_sampling import Sampling, draw_units, exact_units

recipe: Any = importlib.import_module("recipes.common.gradient_descent")

SHAPES = [(10, 2, 3), (12, 4, 4), (26, 3, 3), (14, 9, 3)]
"""Units, reads and writes: a block that is as tall as it is wide, a lower one, two, and the units of attention heads."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def many(units: int, reads: int, writes: int, sampling: Sampling) -> Tensor:
    return torch.stack([draw_units(units, reads, writes, sampling, generator(seed)) for seed in range(2000)])


def p_value(values: Tensor, distribution: Any) -> float:
    return float(stats.kstest(values.double().numpy(), distribution).pvalue)


@pytest.mark.parametrize("sampling", ["orthogonal", "independent"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_unit_is_a_gaussian_draw(shape: tuple[int, int, int], sampling: Sampling) -> None:
    """One unit at a time, over seeds, which are independent: its entries, its length, and sums over its entries."""
    draws = many(*shape, sampling)
    units, dimensions = shape[0], shape[1] + shape[2]
    signs = torch.tensor([(-1) ** (i // 2) for i in range(dimensions)]) / dimensions**0.5
    found = []
    for unit in (0, units // 2 - 1, units // 2, units - 1):
        found += [p_value(draws[:, unit, entry], "norm") for entry in (0, shape[1] - 1, dimensions - 1)]
        found += [p_value(draws[:, unit] @ signs, "norm")]
        found += [p_value(draws[:, unit].square().sum(1), stats.chi2(dimensions).cdf)]
    # of 20 tests the least p is below 1e-3 in one of 50 sets of seeds; these are always the same seeds
    assert min(found) > 1e-3, found


@pytest.mark.parametrize("sampling", ["orthogonal", "independent"])
def test_moments_over_many_units(sampling: Sampling) -> None:
    drawn = draw_units(20000, 3, 2, sampling, generator(1)).double()
    moments = drawn.T @ drawn / len(drawn)
    # 1/sqrt(20000) = 0.007 for independent units and not more for others; 4.5 of it, as 25 entries are looked at
    torch.testing.assert_close(moments, torch.eye(5, dtype=torch.float64), rtol=0, atol=4.5 * math.sqrt(2 / 20000))
    assert (drawn.mean(0).abs() < 4.5 / math.sqrt(20000)).all()
    assert (drawn**4).mean().item() == pytest.approx(3, abs=4.5 * math.sqrt(96 / drawn.numel()))


@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_read_the_same_and_write_the_opposite(shape: tuple[int, int, int]) -> None:
    units, reads, _ = shape
    drawn = draw_units(*shape, "orthogonal", generator(0))
    assert drawn.shape == (units, sum(shape[1:])) and drawn.dtype == torch.float32
    first, second = drawn.chunk(2)
    assert torch.equal(first[:, :reads], second[:, :reads])
    assert torch.equal(first[:, reads:], -second[:, reads:])


@pytest.mark.parametrize(("shape", "blocks"), [*zip(SHAPES, ([5], [6], [5, 5, 3], [7]), strict=True)])
def test_blocks_are_perpendicular(shape: tuple[int, int, int], blocks: list[int]) -> None:
    """As few blocks as dimensions allow, and all of one height but the last."""
    pairs = draw_units(*shape, "orthogonal", generator(0))[: shape[0] // 2].double()
    assert sum(blocks) == len(pairs)
    directions = pairs / pairs.norm(dim=1, keepdim=True)
    products = (directions @ directions.T).abs()
    inside = torch.block_diag(*(torch.ones(height, height) for height in blocks)) == 1
    identity = torch.eye(len(pairs), dtype=torch.float64)
    torch.testing.assert_close(products[inside], identity[inside], rtol=0, atol=1e-6)  # of float32
    assert (products[~inside] > 1e-3).all(), "blocks are drawn independently"


def test_lengths_differ_and_are_independent_of_each_other() -> None:
    lengths = many(26, 3, 3, "orthogonal")[:, :13].norm(dim=2)
    correlations = np.corrcoef(lengths.numpy().T) - np.eye(13)
    # 78 pairs, 2000 seeds: 1/sqrt(2000) = 0.022 each
    assert np.abs(correlations).max() < 4 / math.sqrt(2000)


@pytest.mark.parametrize("sampling", ["orthogonal", "independent"])
def test_draws_depend_on_the_generator_alone(sampling: Sampling) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = draw_units(26, 3, 3, sampling, generator(5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    torch.set_default_dtype(torch.float64)
    try:
        other = draw_units(26, 3, 3, sampling, generator(5))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(other, one), "float32 whatever the default is"
    assert not torch.equal(draw_units(26, 3, 3, sampling, generator(6)), one)


def test_unknown_sampling_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sampling='antithetic' is none of: orthogonal, independent\."):
        draw_units(8, 2, 2, "antithetic", generator(0))  # type: ignore[arg-type]


@pytest.mark.parametrize("dimension", [1, 3, 8])
def test_exact_units_have_the_moments_of_the_population(dimension: int) -> None:
    units = exact_units(dimension).double()
    assert units.shape == (2 * dimension, 2 * dimension)
    moments = units.T @ units / len(units)
    torch.testing.assert_close(moments, torch.eye(2 * dimension, dtype=torch.float64), rtol=1e-7, atol=0)
    assert ((units != 0).sum(1) == 1).all()


def test_orthogonal_units_leave_less_noise_than_independent_ones() -> None:
    """Variance over eight seeds of trained infinite models; over other seeds the ratios are from 0.36 to 0.45 for
    outputs and from 0.20 to 0.27 for streams."""
    draws = generator(0)
    inputs, targets = (torch.randn(10, 5, generator=draws) for _ in range(2))
    problem = recipe.Problem(inputs, targets, 5**-0.5, 5**0.5, lr=1.0, loss_scale=1 / 100, steps=8)

    def variances(sampling: Sampling) -> dict[str, float]:
        looks = []
        for seed in range(8):
            limit = infinite_model(*problem.model(1, 1, 1), depth=4, units=256, sampling=sampling, seed=seed)
            recipe.descend(limit.module, limit.plan, problem)
            looks.append(recipe.look(limit.module, limit.plan, problem))
        return {name: torch.stack([look[name] for look in looks]).var(0).mean().item() for name in ("output", "s=1")}

    ours, independent = variances("orthogonal"), variances("independent")
    assert ours["output"] < 0.6 * independent["output"] and ours["s=1"] < 0.35 * independent["s=1"]
