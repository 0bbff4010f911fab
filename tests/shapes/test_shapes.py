"""Shapes against the project's models, SciPy's optimizers, brute force and the theory's exponents."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from helpers.error_bound_by_hand import by_hand, squared_terms
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import optimize

from mlu_lightning import Architecture, ErrorConstants, Shape, error_bound, fit_error_bound, optimal_shape
from mlu_lightning.models import CausalTransformer, ResNet
from mlu_lightning.shapes.error_bound import ATTENTION, PAPER
from mlu_lightning.shapes.search import RESNET, Candidate, candidate_shapes

DEEP = ErrorConstants(1, 0.8, 2.5)  # best depths are so large that it does not count that they are whole numbers
ANY_SHAPE = replace(RESNET, multiples=Shape(1, 1, 1), constants=DEEP)
NAN, INF = math.nan, math.inf
GRID = [Shape(*sizes) for sizes in product((2, 8, 50), (16, 200), (32, 64, 512))]


RIGHT = [(shape, by_hand(shape, PAPER)) for shape in GRID]
AT_ONE_DEPTH = [Shape(50, 4 * d, d) for d in (8, 16, 32, 64)]
NO_SIZES = [(0, 1, 1), (1, -2, 1), (1, 1, 2.0), (True, 1, 1), (1, "2", 1)]
NO_SIZE = r"(depth|hidden|embedding)=.* of a shape should be a whole number of 1 or more"
NO_CONSTANT = "The constant hidden=.* should be finite and not negative"
NO_ERROR = r"measured at Shape\(depth=3, .*finite errors above zero. Leave out runs"
APART, ALONE = "cannot tell the constants", r"in depth alone, in hidden alone\."
CONSTANT = rf"shapes \(all have the same depth\) {APART} depth and hidden apart.*1/L\^2, .*{ALONE}"
SQUARE = rf"shapes {APART} depth and embedding apart.*depth alone, in embedding alone\."
TOGETHER = [
    (AT_ONE_DEPTH, CONSTANT),
    ([Shape(depth, depth, 64) for depth in (2, 4, 8, 16)], rf"shapes {APART} depth and hidden apart"),
    ([Shape(d, 64, d**2) for d in (2, 4, 8)], SQUARE),
    ([Shape(d, d, d) for d in (2, 4, 8)], r"constants hidden and embedding apart"),
    (GRID[:2] * 5, r"are 2 different shapes.*three constants. Measure three shapes or more"),
    ([], "are 0 different shapes"),
]
REFUSED: list[tuple[Any, str]] = [
    *((partial(Shape, *sizes), NO_SIZE) for sizes in NO_SIZES),
    *((partial(ErrorConstants, 1, value, 1), NO_CONSTANT) for value in (-0.1, NAN, INF)),
    *((partial(fit_error_bound, [*RIGHT, (Shape(3, 4, 5), error)]), NO_ERROR) for error in (0.0, -1.0, NAN, INF)),
    *((partial(fit_error_bound, [(shape, 0.1) for shape in shapes]), says) for shapes, says in TOGETHER),
    (partial(Architecture.transformer, 100, head_dim=0), "0 parameters per unit, .*give a head dimension of 1 or more"),
    (partial(Architecture.resnet, inputs=-3), "-3 per coordinate are none of a network.*no negative sizes"),
    *((partial(optimal_shape, budget), f"parameters={budget:g} there is no shape") for budget in (0, -1, NAN, INF)),
    *(
        (partial(optimal_shape, 1e6, gain=g), f"gain={g} should be from 0.01 to below")
        for g in (0, 0.009, 0.5, -1, NAN)
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


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


def constants_of(found: ErrorConstants) -> tuple[float, float, float]:
    return found.depth, found.hidden, found.embedding


THREE = [Shape(2, 64, 32), Shape(20, 64, 32), Shape(20, 64, 512)]  # which suffice, and say nothing of uncertainty
APART_NOW = [*AT_ONE_DEPTH, Shape(25, 256, 64), Shape(50, 512, 64)]  # what the refusal asks for helps
EXACT: list[tuple[ErrorConstants, list[Shape]]] = [(PAPER, THREE), (PAPER, APART_NOW), (PAPER, GRID), (ATTENTION, GRID)]
EXACT += [(ErrorConstants(30, 0.01, 1e-3), GRID), (ErrorConstants(0, 1, 0), GRID)]


@pytest.mark.parametrize(("constants", "shapes"), EXACT)
def test_exact_errors_give_back_their_constants(constants: ErrorConstants, shapes: list[Shape]) -> None:
    fit = fit_error_bound((shape, by_hand(shape, constants)) for shape in shapes)
    assert (fit.uncertainty is None) == (shapes is THREE)
    assert constants_of(fit) == pytest.approx(constants_of(constants), rel=1e-6, abs=1e-6) and fit.scatter < 1e-9
    assert error_bound(GRID[0], fit) == pytest.approx(by_hand(GRID[0], constants), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_fit_is_the_least_squares_of_logarithms(seed: int) -> None:
    rng = np.random.default_rng(seed)
    errors = np.array([by_hand(shape, PAPER) for shape in GRID]) * np.exp(0.5 * rng.standard_normal(len(GRID)))
    terms = np.array([squared_terms(shape, ErrorConstants(1, 1, 1)) for shape in GRID])
    fit = fit_error_bound(zip(GRID, errors.tolist(), strict=True))

    def residuals(constants: np.ndarray) -> np.ndarray:
        return np.log(terms @ constants**2) / 2 - np.log(errors)

    exact = {"bounds": (0, np.inf)} | dict.fromkeys(("xtol", "ftol", "gtol"), 1e-14)
    solutions = [optimize.least_squares(residuals, rng.uniform(0.1, 5, 3), **exact) for _ in range(10)]
    best = min(solutions, key=lambda solution: solution.cost)
    assert constants_of(fit) == pytest.approx(best.x, rel=1e-4, abs=1e-3)
    assert fit.scatter == pytest.approx(np.sqrt(2 * best.cost / len(GRID)), rel=1e-8)


def noisy_fit(constants: ErrorConstants, rng: np.random.Generator) -> Any:
    return fit_error_bound({s: by_hand(s, constants) * math.exp(0.05 * rng.standard_normal()) for s in GRID})


def test_uncertainty_is_the_spread_of_fits_to_noisy_errors() -> None:
    constants = ErrorConstants(2.0, 0.8, 2.5)
    rng = np.random.default_rng(0)
    fits = [noisy_fit(constants, rng) for _ in range(200)]
    found = np.array([constants_of(fit) for fit in fits])
    said = np.array([constants_of(fit.uncertainty) for fit in fits if fit.uncertainty])
    assert len(said) == len(fits)
    # 200 fits know their mean to a 14th of their spread
    np.testing.assert_allclose(found.mean(0), constants_of(constants), rtol=0.02)
    np.testing.assert_allclose(said.mean(0), found.std(0), rtol=0.15)  # a spread of 200 is known to 5 %
    assert np.mean([fit.scatter for fit in fits]) == pytest.approx(0.05, rel=0.15)


def test_a_term_that_is_not_seen_becomes_zero_with_an_uncertainty() -> None:
    rng = np.random.default_rng(1)
    fits = [noisy_fit(ErrorConstants(0, 0.8, 2.5), rng) for _ in range(20)]
    zero = [fit for fit in fits if fit.depth == 0]
    assert 5 <= len(zero) <= 15, "half of them"
    assert all(fit.uncertainty is not None and 0.01 < fit.uncertainty.depth < 0.5 for fit in zero)


def test_on_outputs_the_second_term_is_a_square_of_that_of_the_stream() -> None:
    """theory.md, section 2: D/(LM) instead of sqrt(D/(LM))."""
    shapes = [Shape(50, m, d) for m, d in product((4, 40, 400), (8, 64, 512))] + [Shape(5, 400, 512)]
    sizes = [(s.depth, s.hidden, s.embedding) for s in shapes]
    measured = [math.sqrt(0.01 / depth**2 + (3 * d / (depth * m)) ** 2 + 0.25 / d) for depth, m, d in sizes]
    fit = fit_error_bound(zip(shapes, measured, strict=True), of="output")
    assert constants_of(fit) == pytest.approx((0.1, 3, 0.5), rel=1e-6)
    assert [error_bound(s, fit, of="output") for s in shapes] == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize("shape", [Shape(1, 1, 1), Shape(3, 8, 4), Shape(12, 640, 128)])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (784, 10)])
def test_parameters_of_a_resnet(shape: Shape, inputs: int, outputs: int) -> None:
    with torch.device("meta"):
        model = ResNet(shape.depth, shape.hidden, shape.embedding, inputs, outputs)
    assert Architecture.resnet(inputs, outputs).parameters(shape) == sum(p.numel() for p in model.parameters())
    assert RESNET.parameters(shape) == sum(p.numel() for p in model.blocks.parameters())


@pytest.mark.parametrize("shape", [Shape(2, 1, 1), Shape(6, 3, 20), Shape(24, 12, 768)])
@pytest.mark.parametrize(("vocabulary", "head_dim", "mlp_ratio"), [(1, 2, 4), (1000, 64, 4), (50, 16, 3)])
def test_parameters_of_a_transformer(shape: Shape, vocabulary: int, head_dim: int, mlp_ratio: int) -> None:
    units = None if mlp_ratio == 4 else mlp_ratio * shape.hidden * head_dim
    with torch.device("meta"):
        model = CausalTransformer(vocabulary, 8, shape.depth // 2, shape.embedding, shape.hidden, head_dim, units)
    architecture = Architecture.transformer(vocabulary, head_dim, mlp_ratio)
    assert architecture.parameters(shape) == sum(p.numel() for p in model.parameters())
    assert len(model.branches) == shape.depth


def test_best_shape_has_the_exponents_of_the_theory() -> None:
    """theory.md, section 2: L ~ P^(1/6), M ~ P^(1/2), D ~ P^(1/3), error ~ P^(-1/6)."""
    budgets = np.logspace(6, 12, 13)
    columns = [(*vars(c.shape).values(), c.error) for c in (optimal_shape(budget, ANY_SHAPE) for budget in budgets)]
    exponents = np.polyfit(np.log(budgets), np.log(columns), 1)[0]
    np.testing.assert_allclose(exponents, [1 / 6, 1 / 2, 1 / 3, -1 / 6], atol=0.005)  # depths are whole numbers from 13


@pytest.mark.parametrize("constants", [DEEP, ATTENTION, ErrorConstants(5, 0.3, 1)])
@pytest.mark.parametrize("gain", [0.02, 0.05, 0.2])
@pytest.mark.parametrize("budget", [1e7, 1e10])
def test_best_shape_is_near_the_continuous_optimum(constants: ErrorConstants, gain: float, budget: float) -> None:
    inputs, outputs = 500, 100
    exponent = -math.log2(1 - gain)

    def terms(logarithms: np.ndarray) -> tuple[float, float, float]:
        depth, embedding = np.exp(logarithms)
        return depth, (budget - (inputs + outputs) * embedding) / (2 * depth * embedding), embedding

    def price(logarithms: np.ndarray) -> float:
        depth, hidden, embedding = terms(logarithms)
        if hidden <= 0:
            return math.inf
        c1, c2, c3 = constants_of(constants)
        square = (c1 / depth) ** 2 + c2**2 * embedding / (depth * hidden) + c3**2 / embedding
        return float(np.log(square) / 2 + exponent * np.log(depth))

    options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 10_000}
    wanted = optimize.minimize(price, np.log([20, 100]), method="Nelder-Mead", options=options)
    depth, hidden, embedding = terms(wanted.x)
    best = optimal_shape(budget, Architecture.resnet(inputs, outputs, 1, constants), gain)
    # whole numbers: the least price is flat, its place less so
    assert wanted.fun - 1e-9 <= price(np.log([best.shape.depth, best.shape.embedding]))
    assert best.error * best.shape.depth**exponent == pytest.approx(math.exp(wanted.fun), rel=2e-3)
    assert best.shape.depth == pytest.approx(depth, rel=0.1)
    assert best.shape.hidden == pytest.approx(hidden, rel=0.15)
    assert best.shape.embedding == pytest.approx(embedding, rel=0.05)
    assert best.parameters <= budget


multiples = st.builds(Shape, *[st.integers(1, 6)] * 3)
constants = st.builds(ErrorConstants, *[st.just(0.0) | st.floats(0.05, 20)] * 3)
architectures = st.builds(Architecture, st.integers(1, 8), st.integers(0, 3), st.integers(0, 20), multiples, constants)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.floats(10, 1500), architectures, st.floats(0.01, 0.49))
def test_best_shape_is_that_of_brute_force(budget: float, architecture: Architecture, gain: float) -> None:
    step = architecture.multiples
    u, a, c = architecture.per_unit, architecture.per_addition, architecture.per_coordinate
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
    error = error_bound(best.shape, architecture.constants)
    assert best == Candidate(best.shape, architecture.parameters(best.shape), error) and best.parameters <= budget


def test_twice_the_depth_is_taken_for_the_gain() -> None:
    depths = [optimal_shape(1e9, ANY_SHAPE, gain).shape.depth for gain in (0.01, 0.05, 0.1, 0.3)]
    assert depths == sorted(depths, reverse=True) and len(set(depths)) == 4
    for gain in (0.02, 0.1):
        best = optimal_shape(1e9, ANY_SHAPE, gain)
        embedding = best.shape.embedding
        for depth in (round(factor * best.shape.depth) for factor in (0.5, 2)):
            other = Shape(depth, 10**9 // (2 * depth * embedding), embedding)
            assert error_bound(other, DEEP) * (depth / best.shape.depth) ** -math.log2(1 - gain) >= best.error


def in_multiples(shape: Shape, multiples: Shape) -> bool:
    return all(size % m == 0 for size, m in zip(vars(shape).values(), vars(multiples).values(), strict=True))


@pytest.mark.parametrize("architecture", [RESNET, ANY_SHAPE, Architecture.transformer(50257)])
def test_large_budgets_take_no_time(architecture: Architecture) -> None:
    start = time.perf_counter()
    for exponent in range(8, 13):
        best = optimal_shape(10.0**exponent, architecture)
        assert in_multiples(best.shape, architecture.multiples)
        assert 0.9 * 10**exponent < best.parameters <= 10**exponent
    assert time.perf_counter() - start < 2  # seconds; a tenth of one on an idle core


def test_the_smallest_budget_is_the_smallest_shape() -> None:
    architecture = Architecture.transformer(vocabulary=100, head_dim=16)
    least = architecture.parameters(Shape(2, 1, 64))
    assert optimal_shape(least, architecture).shape == Shape(2, 1, 64)
    with pytest.raises(ValueError, match=rf"smallest allowed one, Shape.*has {least:,} parameters. Allow as many, or"):
        optimal_shape(least - 1, architecture)


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
        wider = replace(c.shape, hidden=c.shape.hidden + multiples.hidden)
        assert in_multiples(c.shape, multiples)
        assert c.parameters <= budget < architecture.parameters(wider), "as wide as it can be"
        if c.shape.depth != best.shape.depth:
            for embedding in (c.shape.embedding - multiples.embedding, c.shape.embedding + multiples.embedding):
                room = (int(budget) // max(1, embedding) - 25) // (2 * c.shape.depth) // multiples.hidden
                if embedding and room > 0:
                    neighbour = Shape(c.shape.depth, room * multiples.hidden, embedding)
                    assert error_bound(neighbour) >= c.error * (1 - 1e-12), "the best at its depth"
