"""Distances against NumPy, SciPy and scikit-learn, and what must not change them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from mlu_lightning.observation import distances
from mlu_lightning.observation.distances import cka_distance, gram_distance, procrustes_distance, rms_distance

Array = NDArray[np.float64]
Distance = Callable[[Tensor, Tensor], Tensor]

UNCOUPLED: list[Distance] = [gram_distance, cka_distance, procrustes_distance]
STREAMS: list[Distance] = [rms_distance, *UNCOUPLED]
ALL: list[Distance] = [*STREAMS, distances.output_distance]

# (samples, D, D_ref): few and many samples, either model the larger, thin decompositions of rows and of columns
DIGITS = "735 753 644 469 496 559 123 311".split()
SHAPES = [*((int(a), int(b), int(c)) for a, b, c in DIGITS), (40, 3, 4), (40, 4, 3)]
ROUNDING: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-13}  # float64, sums of at most some hundred terms of size one
CANCELLED = {"rtol": 1e-10, "atol": 1e-7}  # root of a difference of squares that are about one


def draw(samples: int, dimension: int, seed: int = 0) -> Array:
    return np.random.default_rng([samples, dimension, seed]).standard_normal((samples, dimension)) + 0.3


def pair(samples: int, dimension: int, reference_dimension: int) -> tuple[Array, Array]:
    return draw(samples, dimension), draw(samples, reference_dimension, 1)


def measure(distance: Distance, h: Array, reference: Array) -> float:
    value = distance(torch.from_numpy(h), torch.from_numpy(reference))
    assert value.dtype == torch.float64 and value.shape == ()
    return value.item()


def rms_by_hand(h: Array, reference: Array) -> float:
    return float(np.sqrt(np.mean((h - reference[:, : h.shape[1]]) ** 2)))


def gram_by_hand(h: Array, reference: Array) -> float:
    pairs = [(i, j) for i in range(len(h)) for j in range(len(h))]
    total = sum((np.mean(h[i] * h[j]) - np.mean(reference[i] * reference[j])) ** 2 for i, j in pairs)
    return float(np.sqrt(total) / len(h))


def cka_by_hand(h: Array, reference: Array) -> float:
    """HSIC of linear kernels, with the centring matrix (Kornblith et al., section 3)."""
    centring = np.eye(len(h)) - np.ones((len(h), len(h))) / len(h)

    def hsic(k: Array, other: Array) -> float:
        return float(np.trace(k @ centring @ other @ centring)) / (len(h) - 1) ** 2

    k, other = h @ h.T, reference @ reference.T
    return 1 - hsic(k, other) / np.sqrt(hsic(k, k) * hsic(other, other))


def cka_by_sklearn(h: Array, reference: Array) -> float:
    """One minus the cosine of centred kernels."""
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    centre = pytest.importorskip("sklearn.preprocessing").KernelCenterer().fit_transform
    k, other = (centre(pairwise.linear_kernel(values)).ravel() for values in (h, reference))
    return float(1 - k @ other / (np.linalg.norm(k) * np.linalg.norm(other)))


def procrustes_by_hand(h: Array, reference: Array) -> float:
    """The minimum in closed form, with the sum of singular values; a difference of squares."""
    a, b = h / np.sqrt(h.shape[1]), reference / np.sqrt(reference.shape[1])
    square = np.sum(a**2) + np.sum(b**2) - 2 * np.linalg.norm(a.T @ b, "nuc")
    return float(np.sqrt(max(square, 0) / len(h)))


def procrustes_by_scipy(h: Array, reference: Array) -> float:
    """The minimum itself, after padding."""
    padded = np.zeros((2, len(h), max(h.shape[1], reference.shape[1])))
    for values, into in zip((h, reference), padded, strict=True):
        into[:, : values.shape[1]] = values / np.sqrt(values.shape[1])
    best, _ = pytest.importorskip("scipy.linalg").orthogonal_procrustes(*padded)
    return float(np.linalg.norm(padded[0] @ best - padded[1]) / np.sqrt(len(h)))


def difference_of_sizes(h: Array, reference: Array) -> float:
    return float(abs(np.sqrt(np.mean(h**2)) - np.sqrt(np.mean(reference**2))))


def rotation(dimension: int, seed: int) -> Array:
    return np.linalg.qr(draw(dimension, dimension, seed))[0]


VALUES = [
    *((rms_distance, rms_by_hand, shape, {"rtol": 1e-14}) for shape in ((7, 3, 5), (6, 4, 4), (1, 2, 3))),
    (distances.output_distance, rms_by_hand, (7, 3, 3), {"rtol": 1e-14}),
    *((gram_distance, gram_by_hand, shape, ROUNDING) for shape in SHAPES),
    *((cka_distance, cka_by_hand, shape, ROUNDING) for shape in SHAPES if shape[0] > 1),
    (cka_distance, cka_by_sklearn, (30, 4, 9), ROUNDING),
    *((procrustes_distance, procrustes_by_hand, shape, CANCELLED) for shape in SHAPES),
    *((procrustes_distance, procrustes_by_scipy, shape, ROUNDING) for shape in SHAPES),
    (procrustes_distance, difference_of_sizes, (1, 3, 8), {"rtol": 1e-12}),  # of one sample
]


@pytest.mark.parametrize(("distance", "by_hand", "shape", "close"), VALUES)
def test_distances_are_those_by_hand(distance: Distance, by_hand: Any, shape: tuple[int, int, int], close: Any) -> None:
    np.testing.assert_allclose(measure(distance, *pair(*shape)), by_hand(*pair(*shape)), **close)


sizes = st.integers(1, 9)
seeds = st.integers(0, 10**6)
examples = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.mark.parametrize("distance", UNCOUPLED)
@examples
@given(samples=st.integers(2, 50), dimension=sizes, reference_dimension=sizes, seed=seeds)
def test_rotations_and_the_order_of_models_and_samples_change_nothing(
    distance: Distance, samples: int, dimension: int, reference_dimension: int, seed: int
) -> None:
    h, reference = draw(samples, dimension, seed), draw(samples, reference_dimension, seed + 1)
    value, order = measure(distance, h, reference), np.random.default_rng(seed).permutation(samples)
    # Procrustes: a residual near zero has the rounding of its terms, which are of size one
    close = {"rel": 1e-9, "abs": 1e-13}
    rotated = measure(distance, h @ rotation(dimension, seed), reference @ rotation(reference_dimension, seed))
    assert rotated == pytest.approx(value, **close)
    assert measure(distance, reference, h) == pytest.approx(value, **close)
    assert measure(distance, h[order], reference[order]) == pytest.approx(value, **close)


@pytest.mark.parametrize("distance", ALL)
@examples
@given(samples=st.integers(1, 50), dimension=sizes, seed=seeds)
def test_equal_streams_are_at_zero_and_others_not(distance: Distance, samples: int, dimension: int, seed: int) -> None:
    h = draw(samples, dimension, seed)
    assert measure(distance, h, h.copy()) <= 2e-14  # 1e-16 for each of about 100 terms of size one
    if samples > 2 and dimension > 1:
        assert measure(distance, h, h * np.linspace(0.5, 2, samples)[:, None]) > 1e-3


@examples
@given(samples=st.integers(1, 50), dimension=sizes, more=sizes, seed=seeds)
def test_rms_of_a_coupled_slice_is_zero(samples: int, dimension: int, more: int, seed: int) -> None:
    reference = draw(samples, dimension + more, seed)
    assert measure(rms_distance, reference[:, :dimension], reference) == 0
    changed = reference[:, :dimension] + 0.25
    assert measure(rms_distance, changed, reference) == pytest.approx(0.25, rel=1e-13)


@examples
@given(samples=st.integers(1, 50), dimension=sizes, seed=seeds)
def test_procrustes_is_at_most_rms(samples: int, dimension: int, seed: int) -> None:
    h, reference = draw(samples, dimension, seed), draw(samples, dimension, seed + 1)
    assert measure(procrustes_distance, h, reference) <= measure(rms_distance, h, reference) * (1 + 1e-12)


@pytest.mark.parametrize("shape", [(12, 4, 4), (4, 9, 9), (12, 4, 8), (80, 4, 8)])
def test_rotated_streams_are_at_the_level_of_rounding(shape: tuple[int, int, int]) -> None:
    samples, dimension, wider = shape
    h = draw(samples, dimension)
    rotated = h @ rotation(wider, 1)[:dimension] * (wider / dimension) ** 0.5
    for distance in UNCOUPLED:
        assert measure(distance, h, rotated) < 1e-14


def test_small_differences_are_seen_without_cancellation() -> None:
    h, direction = draw(20, 4), draw(20, 4, 1)
    for distance, power in ((rms_distance, 1), (gram_distance, 1), (procrustes_distance, 1), (cka_distance, 2)):
        coarse, fine = (measure(distance, h, h + size * direction) for size in (1e-4, 1e-8))
        # next order in the difference: 1e-4 relative, and the rounding of h + 1e-8
        assert fine / coarse == pytest.approx(1e-4**power, rel=2e-3)


def test_cka_ignores_shifts_and_scales_of_either() -> None:
    h, reference = draw(20, 4), draw(20, 6, 1)
    value = measure(cka_distance, h, reference)
    assert 0 < value < 1 and measure(cka_distance, 1e-5 * h, 1e8 * reference) == pytest.approx(value, rel=1e-12)
    # adding 1e6 rounds to 1e-10
    assert measure(cka_distance, h + 1e6, reference - np.arange(6)) == pytest.approx(value, rel=1e-8)


def test_cka_of_orthogonal_features_is_one() -> None:
    h, reference = np.array([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]])[..., None]
    assert measure(cka_distance, h, reference) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("samples", [1, 10, 100])
def test_cka_of_constant_streams(samples: int) -> None:
    constant = np.full((samples, 3), 0.1)  # the sum of ten 0.1 is not 1
    assert measure(cka_distance, constant, np.full((samples, 2), 7.7)) == 0
    if samples > 1:
        assert measure(cka_distance, constant, draw(samples, 3)) == 1
        assert measure(cka_distance, draw(samples, 3), constant) == 1


@pytest.mark.parametrize(("distance", "by_hand"), [(gram_distance, gram_by_hand), (procrustes_distance, rms_by_hand)])
@pytest.mark.parametrize("samples", [2, 30])
def test_zero_is_a_stream_like_others(distance: Distance, by_hand: Any, samples: int) -> None:
    h, zero = draw(samples, 3), np.zeros((samples, 4))
    assert measure(distance, h, zero) == pytest.approx(by_hand(h, zero), rel=1e-12)
    assert measure(distance, zero, h) == pytest.approx(by_hand(h, zero), rel=1e-12)
    assert measure(distance, zero, zero) == 0


def test_functions_have_gradients() -> None:
    streams, reference = torch.from_numpy(draw(6, 3)).requires_grad_(), torch.from_numpy(draw(6, 3, 1))
    for distance in ALL:
        assert torch.autograd.gradcheck(distance, (streams, reference))


@pytest.mark.parametrize("distance", ALL)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("samples", [3, 30])
def test_values_that_are_not_finite_make_nan(distance: Distance, wrong: float, samples: int) -> None:
    h, reference = draw(samples, 4), draw(samples, 4, 1)
    broken = h.copy()
    broken[1, 3] = wrong
    assert np.isnan(measure(distance, broken, reference))
    assert np.isnan(measure(distance, h, np.where(broken == h, reference, wrong)))
    assert np.isnan(measure(distance, broken, broken))


@pytest.mark.parametrize("distance", STREAMS)
def test_coordinates_that_are_not_compared_must_be_finite_too(distance: Distance) -> None:
    reference = draw(3, 4)
    reference[0, 3] = np.nan
    assert np.isnan(measure(distance, draw(3, 2), reference))


@pytest.mark.parametrize("distance", ALL)
def test_largest_and_smallest_float32_values(distance: Distance) -> None:
    h, reference = draw(5, 3), draw(5, 3, 1)
    value = measure(distance, h, reference)
    degree = {gram_distance: 2, cka_distance: 0}.get(distance, 1)
    for exponent in (120, -120):  # powers of two change no digits; 2^±120 is 1e±36
        scaled = measure(distance, np.ldexp(h, exponent), np.ldexp(reference, exponent))
        assert scaled == pytest.approx(value * 2.0 ** (exponent * degree), rel=1e-12)


@pytest.mark.parametrize("distance", UNCOUPLED)
def test_no_exception_at_the_ends_of_float64(distance: Distance) -> None:
    for size in (1e300, 1e-300):
        measure(distance, draw(5, 3) * size, draw(5, 4, 1))
        measure(distance, draw(5, 3) * size, draw(5, 4, 1) * size)


@pytest.mark.parametrize("distance", ALL)
@pytest.mark.parametrize("dtype", "float16 bfloat16 float32 float64 float8_e5m2".split())
def test_all_float_types_are_computed_in_float64(distance: Distance, dtype: str) -> None:
    h, reference = torch.from_numpy(draw(9, 4)).to(getattr(torch, dtype)), torch.from_numpy(draw(9, 4, 1))
    value = distance(h, reference)
    assert value.dtype == torch.float64 and value == distance(h.double(), reference)


def test_columns_and_slices_of_other_tensors() -> None:
    views = torch.from_numpy(draw(9, 16))[:, ::4], torch.from_numpy(draw(9, 16))[:, 1::4]
    for distance in ALL:
        # MKL may sum in another order where memory lies otherwise
        torch.testing.assert_close(distance(*views), distance(*(view.contiguous() for view in views)))


ones = torch.ones
REFUSED = [
    (ones(2, 3, 4), ones(6, 4), r"streams or outputs .* shape \[2, 3, 4\]\. .*flatten\(0, -2\)"),
    (ones(6, 4), ones(4), r"reference should .* shape \[4\]"),
    (ones(0, 4), ones(0, 4), r"at least one of each, .* shape \[0, 4\]"),
    (ones(2, 0), ones(2, 4), r"shape \[2, 0\]"),
    (ones(2, 4).long(), ones(2, 4), r"torch\.int64"),
    (ones(2, 4), ones(2, 4).cfloat(), r"reference should be floating-point .*torch\.complex64"),
    (ones(2, 4), ones(3, 4), "2 samples of one model and 3 of its reference. Pass the same samples"),
]
LARGER = r"have 5 coordinates and the reference has 4.* 5 or more, .*gram, cka or"
TARGETS = r"have 5 entries and the reference has 7.*same targets"


@pytest.mark.parametrize(
    ("distance", "h", "reference", "message"),
    [
        *((distance, *refused) for distance in ALL for refused in REFUSED),
        (rms_distance, ones(2, 5), ones(2, 4), LARGER),
        (distances.output_distance, ones(2, 5), ones(2, 7), TARGETS),
    ],
)
def test_what_cannot_be_compared_is_refused(distance: Distance, h: Tensor, reference: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distance(h, reference)


@pytest.mark.parametrize("distance", ALL)
def test_inputs_stay_as_they_are(distance: Distance) -> None:
    given, same = (list(map(torch.from_numpy, pair(30, 4, 4))) for _ in range(2))
    distance(*given)
    assert all(map(torch.equal, given, same))


def test_many_samples_need_no_gram_matrix() -> None:
    samples = 300_000  # of 720 GB
    h = torch.linspace(0, 1, samples).outer(torch.ones(2)) + torch.eye(2).repeat(samples // 2, 1)
    size, columns = h.double().square().mean().sqrt(), h.double().T @ h.double() / 2
    gram = 3 * columns.norm() / samples  # the norm of h^T h is that of h h^T
    for distance, value in zip(STREAMS, (size, gram, 0, size), strict=True):
        assert distance(h, 2 * h).item() == pytest.approx(float(value), rel=1e-10, abs=1e-25)
