"""How far a residual network of a given shape is from the infinite model, and how to fit that bound to measurements."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Measured = Literal["stream", "output"]  # what an error is of: the residual stream, in embedding space, or the output


@dataclass(frozen=True)
class Shape:
    """Shape of a residual network (theory.md, section 1).

    Args:
        depth: residual additions along the stream, L; a Transformer block makes two.
        hidden: hidden width of a block, M: units of a perceptron, heads of attention.
        embedding: dimension of the residual stream, D.

    Raises:
        ValueError: if one of them is not a whole number of 1 or more.

    >>> Shape(depth=24, hidden=12, embedding=768)
    Shape(depth=24, hidden=12, embedding=768)
    """

    depth: int
    hidden: int
    embedding: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} of a shape should be a whole number of 1 or more.")


@dataclass(frozen=True)
class ErrorConstants:
    """Constants of the error bound, in units of a coordinate of the residual stream.

    Args:
        depth: c1, of the term c1/L.
        hidden: c2, of the term c2 sqrt(D/(L M)).
        embedding: c3, of the term c3/sqrt(D).

    Raises:
        ValueError: if one of them is negative or not finite.

    >>> ErrorConstants(depth=0.13, hidden=0.8, embedding=2.5) == PAPER
    True
    """

    depth: float
    hidden: float
    embedding: float

    def __post_init__(self) -> None:
        for name, value in (("depth", self.depth), ("hidden", self.hidden), ("embedding", self.embedding)):
            if not 0 <= value < math.inf:
                raise ValueError(f"The constant {name}={value!r} of the error bound should be finite and not negative.")


@dataclass(frozen=True)
class FittedConstants(ErrorConstants):
    """Constants found by :func:`fit_error_bound`, and how well they are known."""

    uncertainty: ErrorConstants | None
    """Increase of each constant if its square grew by one standard error; None without more points than constants."""
    scatter: float  # root mean square of log(measured / bound) over the points


PAPER = ErrorConstants(depth=0.13, hidden=0.8, embedding=2.5)
"""Perceptron blocks: hypot(0.8 sqrt(D/(L M)), 2.5/sqrt(D)) is the published fit to the paper's experiment with tanh at
L = 50; depth = 0.13 was measured with infinite models of few Euler steps in the same one (``recipes/paper_rates``)."""

ATTENTION = ErrorConstants(depth=0.5, hidden=2.2, embedding=2.5)
"""Attention blocks, M = heads, of dimension 4: depth = 0.5 was measured with infinite models of 2, 4 and 8 steps
(``recipes/aspect``), hidden = 2.2 at L = 8 (theory.md, section 6). That of the embedding could not be had: networks with D
from 16 to 256 are a third off the best fit of both, whose hidden is 1.3, so it is that of :data:`PAPER`."""


def error_bound(shape: Shape, constants: ErrorConstants = PAPER, of: Measured = "stream") -> float:
    """Predict how far a shape is from the infinite model: sqrt((c1/L)^2 + c2^2 D/(L M) + c3^2/D).

    The terms (theory.md, section 2; Chaintron, Chizat, Maass, arXiv 2603.18168) are added as independent errors. It holds
    for a bounded number of steps of gradient descent in the MLU parameterization, with constants that depend on the data,
    the activation and the number of steps. A prediction of one or more only says that the shape is far away.

    Args:
        shape: shape of the network.
        constants: constants of the bound; by default those of the paper's experiment.
        of: ``"stream"``, or ``"output"``, where the second term is c2 D/(L M) in the paper's experiments.

    >>> round(error_bound(Shape(depth=50, hidden=500, embedding=256), ErrorConstants(0, 0.8, 2.5)), 3)
    0.176
    """
    return error_at(shape.depth, shape.hidden, shape.embedding, constants, of)


def error_at(
    depth: float, hidden: float, embedding: float, constants: ErrorConstants, of: Measured = "stream"
) -> float:
    """Predict the error like :func:`error_bound`, at sizes that need not be whole."""
    squares = constants.depth**2, constants.hidden**2, constants.embedding**2
    terms = _terms(depth, hidden, embedding, of)
    return math.sqrt(math.fsum(square * term for square, term in zip(squares, terms, strict=True)))


def fit_error_bound(
    points: Mapping[Shape, float] | Iterable[tuple[Shape, float]], of: Measured = "stream"
) -> FittedConstants:
    """Fit the constants of the error bound to measured errors, by least squares of their logarithms.

    Constants are not negative; one whose term does not show in the errors becomes 0. If all points have the same depth,
    the depth constant is whatever part of the error does not fall with M and D.

    Args:
        points: shapes and the error measured at each, such as an RMS distance to a limit; a shape may occur several times.
        of: what was measured, as in :func:`error_bound`.

    Raises:
        ImportError: without scipy.
        ValueError: if an error is not finite and positive, or the shapes cannot tell the constants apart.

    >>> shapes = [Shape(50, 500, 64), Shape(50, 500, 1024), Shape(5, 500, 256), Shape(50, 50, 256)]
    >>> fit = fit_error_bound({shape: error_bound(shape) for shape in shapes})
    >>> round(fit.depth, 6), round(fit.hidden, 6), round(fit.embedding, 6)
    (0.13, 0.8, 2.5)
    """
    if find_spec("scipy") is None:
        raise ImportError("Fits need scipy, which is not installed: pip install 'mlu-lightning[plots]'.")
    pairs = list(points.items()) if isinstance(points, Mapping) else list(points)
    for shape, error in pairs:
        if not 0 < error < math.inf:
            raise ValueError(
                f"The error measured at {shape} is {error}, and a bound can only be fitted to finite errors above zero. "
                "Leave out runs that diverged, and the reference itself."
            )
    different = len({shape for shape, _ in pairs})
    if different < 3:
        raise ValueError(
            f"There are {different} different shapes, and the bound has three constants. Measure three shapes or more, "
            "among which depth, hidden and embedding all change."
        )
    # squared errors are linear in the squares of the constants: each point over its error, and terms of norm one
    terms = np.array([_terms(s.depth, s.hidden, s.embedding, of) for s, _ in pairs])
    terms /= np.array([[error**2] for _, error in pairs])
    norms = np.linalg.norm(terms, axis=0)
    terms /= norms
    _require_independent(terms, [shape for shape, _ in pairs])
    squares = _fit_logarithms(terms)
    residuals = np.log(terms @ squares) / 2
    uncertainty = None
    if len(pairs) > len(squares):
        slopes = terms / (2 * terms @ squares)[:, None]
        variance = residuals @ residuals / (len(pairs) - len(squares))
        deviations = np.sqrt(variance * np.diag(np.linalg.inv(slopes.T @ slopes)))
        raised = np.sqrt((squares + deviations) / norms) - np.sqrt(squares / norms)
        uncertainty = ErrorConstants(*raised.tolist())
    scatter = float(np.sqrt(np.mean(residuals**2)))
    depth, hidden, embedding = np.sqrt(squares / norms).tolist()
    return FittedConstants(depth, hidden, embedding, uncertainty, scatter)


def _terms(depth: float, hidden: float, embedding: float, of: Measured) -> tuple[float, float, float]:
    """Coefficients of the squared constants in the squared bound."""
    width = embedding / (depth * hidden)
    return 1 / depth**2, width if of == "stream" else width**2, 1 / embedding


def _require_independent(terms: NDArray[np.float64], shapes: list[Shape]) -> None:
    """Refuse shapes over which some combination of the normalized terms vanishes."""
    _, singular, directions = np.linalg.svd(terms)
    if len(singular) == 3 and singular[-1] > 1e-6 * singular[0]:
        return
    weights = zip(fields(Shape), directions[-1], strict=True)
    confused = [field.name for field, weight in weights if abs(weight) > 1e-3]
    constant = [name for name in confused if len({getattr(shape, name) for shape in shapes}) == 1]
    remark = f" (all have the same {' and '.join(constant)})" if constant else ""
    raise ValueError(
        f"These shapes{remark} cannot tell the constants {' and '.join(confused)} apart, because their terms among 1/L^2, "
        "D/(L M) and 1/D change together. Measure more shapes, which differ from one of these in "
        f"{' alone, in '.join(confused)} alone."
    )


def _fit_logarithms(terms: NDArray[np.float64]) -> NDArray[np.float64]:
    """Find x >= 0 that minimizes the sum of squares of log(terms @ x)."""
    from scipy.optimize import least_squares, nnls

    fit = least_squares(
        lambda x: np.log(terms @ x),
        nnls(terms, np.ones(len(terms)))[0],
        lambda x: terms / (terms @ x)[:, None],
        bounds=(0, np.inf),
        method="dogbox",  # of the methods with bounds, the one that can end on them
        **dict.fromkeys(("ftol", "xtol", "gtol"), 4 * np.finfo(np.float64).eps),
    )
    return np.asarray(fit.x, np.float64)
