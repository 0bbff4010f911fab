"""Shapes against the project's models, SciPy's optimizers, brute force and the theory's exponents."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from helpers.error_bound_by_hand import by_hand, squared_terms
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mlu_lightning import Architecture, ErrorConstants, Shape, error_bound, fit_error_bound, optimal_shape
from mlu_lightning.models import CausalTransformer, ResNet
from mlu_lightning.shapes.error_bound import ATTENTION, PAPER
from mlu_lightning.shapes.search import RESNET, Candidate, candidate_shapes

DEEP = ErrorConstants(1, 0.8, 2.5)
"""With which the best depths are large, so that it does not count that they are whole numbers."""
ANY_SHAPE = replace(RESNET, multiples=Shape(1, 1, 1), constants=DEEP)
GRID = [Shape(*sizes) for sizes in product((2, 8, 50), (16, 200), (32, 64, 512))]


# --- shapes and the bound


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -2, 1), (1, 1, 2.0), (True, 1, 1), (1, "2", 1)])
def test_shapes_are_whole_numbers_from_one(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(
        ValueError, match=r"(depth|hidden|embedding)=.* of a shape should be a whole number of 1 or more"
    ):
        Shape(*sizes)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_constants_are_finite_and_not_negative(value: float) -> None:
    with pytest.raises(ValueError, match=r"The constant hidden=.* should be finite and not negative"):
        ErrorConstants(1, value, 1)


@pytest.mark.parametrize(("embedding", "published"), [(64, 0.315), (256, 0.176), (1024, 0.180)])
def test_bound_is_the_published_fit_where_depth_does_not_count(embedding: int, published: float) -> None:
    """Values of theory.md, section 6; M = 500, L = 50."""
    shape = Shape(50, 500, embedding)
    assert error_bound(shape, replace(PAPER, depth=0.0)) == pytest.approx(published, abs=5e-4)
    assert error_bound(shape) == pytest.approx(published, abs=1e-3), "a depth of 50 does not count"


@pytest.mark.parametrize(("heads", "measured"), [(64, 1.69), (256, 0.80)])
def test_bound_of_attention_is_near_what_was_measured(heads: int, measured: float) -> None:
    """Errors of theory.md, section 6, at L = 8 and D = 256, which scatter around their fit."""
    assert error_bound(Shape(8, heads, 256), ATTENTION) == pytest.approx(measured, rel=0.1)


# --- fit


@pytest.mark.parametrize("constants", [PAPER, ATTENTION, ErrorConstants(30, 0.01, 1e-3), ErrorConstants(0, 1, 0)])
def test_exact_errors_give_back_their_constants(constants: ErrorConstants) -> None:
    fit = fit_error_bound({shape: by_hand(shape, constants) for shape in GRID})
    wanted = pytest.approx((constants.depth, constants.hidden, constants.embedding), rel=1e-6, abs=1e-6)
    assert (fit.depth, fit.hidden, fit.embedding) == wanted
    assert fit.scatter < 1e-9
    assert error_bound(GRID[0], fit) == pytest.approx(by_hand(GRID[0], constants), rel=1e-9)


def test_three_points_suffice_and_say_nothing_of_uncertainty() -> None:
    shapes = [Shape(2, 64, 32), Shape(20, 64, 32), Shape(20, 64, 512)]
    fit = fit_error_bound((shape, by_hand(shape, PAPER)) for shape in shapes)
    assert (fit.depth, fit.hidden, fit.embedding) == pytest.approx((0.13, 0.8, 2.5), rel=1e-9)
    assert fit.uncertainty is None


@pytest.mark.parametrize("seed", range(5))
def test_fit_is_the_least_squares_of_logarithms(seed: int) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(seed)
    errors = np.array([by_hand(shape, PAPER) for shape in GRID]) * np.exp(0.5 * rng.standard_normal(len(GRID)))
    terms = np.array([squared_terms(shape, ErrorConstants(1, 1, 1)) for shape in GRID])
    fit = fit_error_bound(zip(GRID, errors.tolist(), strict=True))

    def residuals(constants: np.ndarray) -> np.ndarray:
        return np.log(terms @ constants**2) / 2 - np.log(errors)

    starts = [rng.uniform(0.1, 5, 3) for _ in range(10)]
    tight = {"xtol": 1e-14, "ftol": 1e-14, "gtol": 1e-14}
    solutions = [optimize.least_squares(residuals, start, bounds=(0, np.inf), **tight) for start in starts]
    best = min(solutions, key=lambda solution: solution.cost)
    assert (fit.depth, fit.hidden, fit.embedding) == pytest.approx(best.x, rel=1e-4, abs=1e-3)
    assert fit.scatter == pytest.approx(np.sqrt(2 * best.cost / len(GRID)), rel=1e-8)


def test_uncertainty_is_the_spread_of_fits_to_noisy_errors() -> None:
    constants = ErrorConstants(2.0, 0.8, 2.5)
    rng = np.random.default_rng(0)
    fits = []
    for _ in range(200):
        noise = np.exp(0.05 * rng.standard_normal(len(GRID)))
        fits.append(fit_error_bound([(s, by_hand(s, constants) * n) for s, n in zip(GRID, noise, strict=True)]))
    found = np.array([[fit.depth, fit.hidden, fit.embedding] for fit in fits])
    said = np.array(
        [[f.uncertainty.depth, f.uncertainty.hidden, f.uncertainty.embedding] for f in fits if f.uncertainty]
    )
    assert len(said) == len(fits)
    wanted = [constants.depth, constants.hidden, constants.embedding]
    np.testing.assert_allclose(found.mean(0), wanted, rtol=0.02)  # 200 fits know their mean to a 14th of their spread
    np.testing.assert_allclose(said.mean(0), found.std(0), rtol=0.15)  # a spread of 200 is known to 5 %
    assert np.mean([fit.scatter for fit in fits]) == pytest.approx(0.05, rel=0.15)


def test_a_term_that_is_not_seen_becomes_zero_with_an_uncertainty() -> None:
    rng = np.random.default_rng(1)
    constants = ErrorConstants(0, 0.8, 2.5)
    fits = [
        fit_error_bound({shape: by_hand(shape, constants) * math.exp(0.05 * rng.standard_normal()) for shape in GRID})
        for _ in range(20)
    ]
    zero = [fit for fit in fits if fit.depth == 0]
    assert 5 <= len(zero) <= 15, "half of them"
    assert all(fit.uncertainty is not None and 0.01 < fit.uncertainty.depth < 0.5 for fit in zero)


@pytest.mark.parametrize("error", [0.0, -1.0, math.nan, math.inf])
def test_errors_that_no_bound_can_fit(error: float) -> None:
    points = [(shape, by_hand(shape, PAPER)) for shape in GRID] + [(Shape(3, 4, 5), error)]
    with pytest.raises(ValueError, match=r"measured at Shape\(depth=3, .*finite errors above zero. Leave out runs"):
        fit_error_bound(points)


def test_three_different_shapes_are_needed() -> None:
    points = [(shape, 0.1) for shape in GRID[:2] * 5]
    with pytest.raises(ValueError, match=r"are 2 different shapes.*three constants. Measure three shapes or more"):
        fit_error_bound(points)
    with pytest.raises(ValueError, match="are 0 different shapes"):
        fit_error_bound({})


APART = r"shapes cannot tell the constants"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            [Shape(50, 4 * d, d) for d in (8, 16, 32, 64)],
            r"shapes \(all have the same depth\) cannot tell the constants depth and hidden apart.*1/L\^2, .*"
            r"in depth alone, in hidden alone\.",
        ),
        ([Shape(depth, depth, 64) for depth in (2, 4, 8, 16)], rf"{APART} depth and hidden apart"),
        (
            [Shape(d, 64, d**2) for d in (2, 4, 8)],
            rf"{APART} depth and embedding apart.*depth alone, in embedding alone\.",
        ),
        ([Shape(d, d, d) for d in (2, 4, 8)], r"constants hidden and embedding apart"),
    ],
)
def test_shapes_that_change_together_are_refused(shapes: list[Shape], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_error_bound(dict.fromkeys(shapes, 0.1))


def test_what_the_refusal_asks_for_helps() -> None:
    more = [*(Shape(50, 4 * d, d) for d in (8, 16, 32, 64)), Shape(25, 256, 64), Shape(50, 512, 64)]
    fit = fit_error_bound({shape: by_hand(shape, PAPER) for shape in more})
    assert (fit.depth, fit.hidden, fit.embedding) == pytest.approx((0.13, 0.8, 2.5), rel=1e-6)


def test_on_outputs_the_second_term_is_a_square_of_that_of_the_stream() -> None:
    """theory.md, section 2: D/(LM) instead of sqrt(D/(LM))."""
    shapes = [Shape(50, m, d) for m, d in product((4, 40, 400), (8, 64, 512))] + [Shape(5, 400, 512)]
    measured = {
        s: math.sqrt(0.01 / s.depth**2 + (3 * s.embedding / (s.depth * s.hidden)) ** 2 + 0.25 / s.embedding)
        for s in shapes
    }
    fit = fit_error_bound(measured, of="output")
    assert (fit.depth, fit.hidden, fit.embedding) == pytest.approx((0.1, 3, 0.5), rel=1e-6)
    assert [error_bound(s, fit, of="output") for s in shapes] == pytest.approx([*measured.values()], rel=1e-6)


# --- parameters


@pytest.mark.parametrize("shape", [Shape(1, 1, 1), Shape(3, 8, 4), Shape(12, 640, 128)])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (784, 10)])
def test_parameters_of_a_resnet(shape: Shape, inputs: int, outputs: int) -> None:
    with torch.device("meta"):
        model = ResNet(shape.depth, shape.hidden, shape.embedding, inputs, outputs)
    assert Architecture.resnet(inputs, outputs).parameters(shape) == sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for p in model.blocks.parameters())
    assert RESNET.parameters(shape) == blocks


@pytest.mark.parametrize("shape", [Shape(2, 1, 1), Shape(6, 3, 20), Shape(24, 12, 768)])
@pytest.mark.parametrize(("vocabulary", "head_dim", "mlp_ratio"), [(1, 2, 4), (1000, 64, 4), (50, 16, 3)])
def test_parameters_of_a_transformer(shape: Shape, vocabulary: int, head_dim: int, mlp_ratio: int) -> None:
    units = None if mlp_ratio == 4 else mlp_ratio * shape.hidden * head_dim
    with torch.device("meta"):
        model = CausalTransformer(vocabulary, 8, shape.depth // 2, shape.embedding, shape.hidden, head_dim, units)
    architecture = Architecture.transformer(vocabulary, head_dim, mlp_ratio)
    assert architecture.parameters(shape) == sum(p.numel() for p in model.parameters())
    assert len(model.branches) == shape.depth


def test_architectures_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0 parameters per unit, .*give a head dimension of 1 or more"):
        Architecture.transformer(100, head_dim=0)
    with pytest.raises(ValueError, match=r"-3 per coordinate are none of a network.*no negative sizes"):
        Architecture.resnet(inputs=-3)


# --- the best shape


def test_best_shape_has_the_exponents_of_the_theory() -> None:
    """theory.md, section 2: L ~ P^(1/6), M ~ P^(1/2), D ~ P^(1/3), error ~ P^(-1/6)."""
    budgets = np.logspace(6, 12, 13)
    found = [optimal_shape(budget, ANY_SHAPE) for budget in budgets]
    columns = [(c.shape.depth, c.shape.hidden, c.shape.embedding, c.error) for c in found]
    exponents = np.polyfit(np.log(budgets), np.log(columns), 1)[0]
    np.testing.assert_allclose(exponents, [1 / 6, 1 / 2, 1 / 3, -1 / 6], atol=0.005)  # depths are whole numbers from 13


@pytest.mark.parametrize("constants", [DEEP, ATTENTION, ErrorConstants(5, 0.3, 1)])
@pytest.mark.parametrize("gain", [0.02, 0.05, 0.2])
@pytest.mark.parametrize("budget", [1e7, 1e10])
def test_best_shape_is_near_the_continuous_optimum(constants: ErrorConstants, gain: float, budget: float) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    inputs, outputs = 500, 100
    exponent = -math.log2(1 - gain)

    def terms(logarithms: np.ndarray) -> tuple[float, float, float]:
        depth, embedding = np.exp(logarithms)
        return depth, (budget - (inputs + outputs) * embedding) / (2 * depth * embedding), embedding

    def price(logarithms: np.ndarray) -> float:
        depth, hidden, embedding = terms(logarithms)
        if hidden <= 0:
            return math.inf
        c = constants
        square = (c.depth / depth) ** 2 + c.hidden**2 * embedding / (depth * hidden) + c.embedding**2 / embedding
        return float(np.log(square) / 2 + exponent * np.log(depth))

    options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 10_000}
    wanted = optimize.minimize(price, np.log([20, 100]), method="Nelder-Mead", options=options)
    depth, hidden, embedding = terms(wanted.x)
    best = optimal_shape(budget, Architecture.resnet(inputs, outputs, 1, constants), gain)
    found = price(np.log([best.shape.depth, best.shape.embedding]))
    # whole numbers: the least price is flat, its place less so
    assert wanted.fun - 1e-9 <= found
    assert best.error * best.shape.depth**exponent == pytest.approx(math.exp(wanted.fun), rel=2e-3)
    assert best.shape.depth == pytest.approx(depth, rel=0.1)
    assert best.shape.hidden == pytest.approx(hidden, rel=0.15)
    assert best.shape.embedding == pytest.approx(embedding, rel=0.05)
    assert best.parameters <= budget


positive = st.floats(0.05, 20)
sizes = st.integers(1, 6)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    budget=st.floats(10, 4000),
    architecture=st.builds(
        Architecture,
        st.integers(1, 8),
        st.integers(0, 3),
        st.integers(0, 20),
        st.builds(Shape, sizes, sizes, sizes),
        st.builds(ErrorConstants, st.just(0.0) | positive, st.just(0.0) | positive, st.just(0.0) | positive),
    ),
    gain=st.floats(0.01, 0.49),
)
def test_best_shape_is_that_of_brute_force(budget: float, architecture: Architecture, gain: float) -> None:
    step, (u, a, c) = (
        architecture.multiples,
        (architecture.per_unit, architecture.per_addition, architecture.per_coordinate),
    )
    prices = {}
    for embedding in range(step.embedding, int(budget) + 1, step.embedding):
        for depth in range(step.depth, int(budget) + 1, step.depth):
            if embedding * (depth * (u * step.hidden + a) + c) > budget:
                break
            for hidden in range(step.hidden, int(budget) + 1, step.hidden):
                if embedding * (depth * (u * hidden + a) + c) > budget:
                    break
                shape = Shape(depth, hidden, embedding)
                prices[shape] = by_hand(shape, architecture.constants) * 2 ** (-math.log2(1 - gain) * math.log2(depth))
    if not prices:
        with pytest.raises(ValueError, match="there is no shape"):
            optimal_shape(budget, architecture, gain)
        return
    best = optimal_shape(budget, architecture, gain)
    assert best.shape in prices, "in multiples and within the budget"
    assert prices[best.shape] <= min(prices.values()) * (1 + 1e-12)
    assert best == Candidate(
        best.shape, architecture.parameters(best.shape), error_bound(best.shape, architecture.constants)
    )
    assert best.parameters <= budget


def test_twice_the_depth_is_taken_for_the_gain() -> None:
    depths = [optimal_shape(1e9, ANY_SHAPE, gain).shape.depth for gain in (0.01, 0.05, 0.1, 0.3)]
    assert depths == sorted(depths, reverse=True) and len(set(depths)) == 4
    for gain in (0.02, 0.1):
        best = optimal_shape(1e9, ANY_SHAPE, gain)
        for factor in (0.5, 2):
            shape = replace(best.shape, depth=round(factor * best.shape.depth))
            other = Shape(shape.depth, 10**9 // (2 * shape.depth * shape.embedding), shape.embedding)
            assert error_bound(other, DEEP) * (other.depth / best.shape.depth) ** -math.log2(1 - gain) >= best.error


@pytest.mark.parametrize("architecture", [RESNET, ANY_SHAPE, Architecture.transformer(50257)])
def test_large_budgets_take_no_time(architecture: Architecture) -> None:
    start = time.perf_counter()
    for exponent in range(8, 13):
        best = optimal_shape(10.0**exponent, architecture)
        step = architecture.multiples
        for size, multiple in zip(vars(best.shape).values(), vars(step).values(), strict=True):
            assert size % multiple == 0
        assert 0.9 * 10**exponent < best.parameters <= 10**exponent
    assert time.perf_counter() - start < 2  # seconds; a tenth of one on an idle core


def test_the_smallest_budget_is_the_smallest_shape() -> None:
    architecture = Architecture.transformer(vocabulary=100, head_dim=16)
    least = architecture.parameters(Shape(2, 1, 64))
    assert optimal_shape(least, architecture).shape == Shape(2, 1, 64)
    with pytest.raises(ValueError, match=rf"smallest allowed one, Shape.*has {least:,} parameters. Allow as many, or"):
        optimal_shape(least - 1, architecture)


@pytest.mark.parametrize("parameters", [0, -1, math.nan, math.inf])
def test_budgets_that_are_none(parameters: float) -> None:
    with pytest.raises(ValueError, match=f"parameters={parameters:g} there is no shape"):
        optimal_shape(parameters)


@pytest.mark.parametrize("gain", [0, 0.009, 0.5, -1, math.nan])
def test_gains_that_are_none(gain: float) -> None:
    with pytest.raises(ValueError, match=rf"gain={gain} should be from 0.01 to below 0.5"):
        optimal_shape(1e6, gain=gain)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(exponent=st.floats(5, 10), multiples=st.builds(Shape, st.integers(1, 4), st.integers(1, 64), st.integers(1, 64)))
def test_candidates_surround_the_best(exponent: float, multiples: Shape) -> None:
    budget, architecture = 10**exponent, replace(Architecture.resnet(20, 5), multiples=multiples)
    assume(architecture.parameters(multiples) <= budget)
    best, candidates = optimal_shape(budget, architecture), candidate_shapes(budget, architecture)
    assert best in candidates
    keys = [(c.shape.depth, c.shape.embedding) for c in candidates]
    assert keys == sorted(set(keys))
    for c in candidates:
        assert all(size % m == 0 for size, m in zip(vars(c.shape).values(), vars(multiples).values(), strict=True))
        wider = replace(c.shape, hidden=c.shape.hidden + multiples.hidden)
        assert c.parameters <= budget < architecture.parameters(wider), "as wide as it can be"
        if c.shape.depth != best.shape.depth:
            at_depth = c.shape.embedding
            for embedding in (at_depth - multiples.embedding, at_depth + multiples.embedding):
                room = (int(budget) // max(1, embedding) - 25) // (2 * c.shape.depth) // multiples.hidden
                if embedding and room > 0:
                    neighbour = Shape(c.shape.depth, room * multiples.hidden, embedding)
                    assert error_bound(neighbour) >= c.error * (1 - 1e-12), "the best at its depth"
