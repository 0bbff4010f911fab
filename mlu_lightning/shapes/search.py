"""Find the shape (L, M, D) of least predicted error for a number of parameters."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from mlu_lightning.shapes.error_bound import ATTENTION, PAPER, ErrorConstants, Shape, error_at, error_bound


@dataclass(frozen=True)
class Architecture:
    """A family of networks that differ in shape only, with D (L (u M + a) + c) parameters.

    Args:
        per_unit: u, parameters of a branch per hidden unit and coordinate of the stream, averaged over kinds of branches.
        per_addition: a, parameters of a branch per coordinate of the stream, whatever its hidden width.
        per_coordinate: c, parameters outside branches per coordinate of the stream.
        multiples: smallest allowed depth, hidden width and embedding dimension, of which others are multiples.
        constants: constants of the error bound.

    Raises:
        ValueError: if branches have no parameters (as of heads of dimension 0), or a number is negative.

    >>> Architecture.resnet(inputs=784, outputs=10).parameters(Shape(depth=8, hidden=512, embedding=128))
    1150208
    """

    per_unit: int
    per_addition: int
    per_coordinate: int
    multiples: Shape
    constants: ErrorConstants

    def __post_init__(self) -> None:
        if self.per_unit < 1 or self.per_addition < 0 or self.per_coordinate < 0:
            raise ValueError(
                f"{self.per_unit} parameters per unit, {self.per_addition} per addition and {self.per_coordinate} per "
                "coordinate are none of a network: give a head dimension of 1 or more, and no negative sizes."
            )

    @staticmethod
    def resnet(
        inputs: int = 0, outputs: int = 0, multiple: int = 64, constants: ErrorConstants = PAPER
    ) -> Architecture:
        """Describe perceptron blocks as in :class:`~mlu_lightning.models.ResNet`, with 2 L M D + (inputs + outputs) D.

        Args:
            inputs: dimension of the data; with the default the embedding is not counted.
            outputs: dimension of the targets; with the default the readout is not counted.
            multiple: number of which hidden width and embedding dimension are multiples.
            constants: constants of the error bound.
        """
        return Architecture(2, 0, inputs + outputs, Shape(1, multiple, multiple), constants)

    @staticmethod
    def transformer(
        vocabulary: int,
        head_dim: int = 64,
        mlp_ratio: int = 4,
        multiple: int = 64,
        constants: ErrorConstants = ATTENTION,
    ) -> Architecture:
        """Describe alternating attention and MLP branches as in :class:`~mlu_lightning.models.CausalTransformer`.

        Hidden width M is the number of heads, of fixed dimension (theory.md, section 3). L counts both branches of a block.
        The bound alone prefers few blocks with very many heads: of shapes that people build, see ``mlu-lightning shape``.

        Args:
            vocabulary: number of tokens; token table and readout, not tied, have 2 * vocabulary * D parameters.
            head_dim: dimension of the queries, keys and values of one head.
            mlp_ratio: units of an MLP branch over heads * head_dim.
            multiple: number of which the embedding dimension is a multiple.
            constants: constants of the error bound.

        >>> gpt2_small = Shape(depth=24, hidden=12, embedding=768)  # 12 blocks; here the readout is not tied
        >>> Architecture.transformer(vocabulary=50257).parameters(gpt2_small)
        162148608
        """
        # of a block with two additions: 4 matrices for heads * head_dim, 2 for the MLP's units, 2 norms
        return Architecture((2 + mlp_ratio) * head_dim, 1, 2 * vocabulary + 1, Shape(2, 1, multiple), constants)

    def parameters(self, shape: Shape) -> int:
        """Count the parameters at a shape."""
        per_branch = self.per_unit * shape.hidden + self.per_addition
        return shape.embedding * (shape.depth * per_branch + self.per_coordinate)

    def candidate(self, shape: Shape) -> Candidate:
        """Add to a shape its number of parameters and its predicted error."""
        return Candidate(shape, self.parameters(shape), error_bound(shape, self.constants))


RESNET = Architecture.resnet()  # the paper's, blocks alone, in multiples of 64


@dataclass(frozen=True)
class Candidate:
    """A shape that could be trained, with its number of parameters and its predicted error."""

    shape: Shape
    parameters: int
    error: float


def optimal_shape(parameters: float, architecture: Architecture = RESNET, gain: float = 0.05) -> Candidate:
    """Find the shape of least predicted error within a number of parameters, where depth has to pay for itself.

    In the bound, depth is free, but branches run one after another, so twice the depth is taken only where it lowers the
    error by ``gain``: the shape minimizes error * L^e with e = -log2(1 - gain). This gives L ~ P^(1/6), M ~ P^(1/2),
    D ~ P^(1/3) and an error ~ P^(-1/6) with growing P (theory.md, section 2; Chaintron, Chizat, Maass, arXiv 2603.18168).

    Args:
        parameters: most parameters that the network may have, all of them counted.
        architecture: family of shapes, with its multiples and constants.
        gain: part by which twice the depth must lower the error, from 0.01 to below 0.5.

    Raises:
        ValueError: if the number of parameters does not suffice for the smallest shape, or ``gain`` is out of range.

    >>> optimal_shape(100e6).shape
    Shape(depth=4, hidden=19520, embedding=640)
    >>> measured = ErrorConstants(depth=2.0, hidden=0.5, embedding=2.5)  # or what fit_error_bound returned
    >>> optimal_shape(100e6, Architecture.resnet(constants=measured)).shape
    Shape(depth=67, hidden=896, embedding=832)
    """
    return _Search(parameters, architecture, gain).best()


def candidate_shapes(parameters: float, architecture: Architecture = RESNET, gain: float = 0.05) -> list[Candidate]:
    """List the optimal shape and the best at 1/4 to 4 times its depth, or at its depth and 1/4 to 4 times its embedding."""
    search = _Search(parameters, architecture, gain)
    best = search.best().shape
    factors = (0.25, 0.5, 1, 2, 4)
    step = architecture.multiples
    depths = {step.depth * round(best.depth * factor / step.depth) for factor in factors}
    widths = {step.embedding * round(best.embedding * factor / step.embedding) for factor in factors}
    found = {search.best_at_depth(depth) for depth in depths if 1 <= depth <= search.most_depth()}
    found |= {search.widest(best.depth, width) for width in widths if 1 <= width <= search.most_embedding(best.depth)}
    return sorted(found, key=lambda candidate: (candidate.shape.depth, candidate.shape.embedding))


def depth_exponent(gain: float) -> float:
    """Exponent e at which error * L^e is least where twice the depth would not lower the error by the gain."""
    if not 0.01 <= gain < 0.5:
        raise ValueError(
            f"gain={gain} should be from 0.01 to below 0.5: the part by which twice the depth must lower the "
            "error. With less, the bound takes depth almost without end; half of it is more than any depth gains."
        )
    return -math.log2(1 - gain)


@dataclass(frozen=True)
class _Search:
    """Shapes that a number of parameters allows, searched outwards from where a lower bound is least."""

    parameters: float
    architecture: Architecture
    gain: float

    def __post_init__(self) -> None:
        depth_exponent(self.gain)
        smallest = self.architecture.multiples
        least = self.architecture.parameters(smallest)
        if not least <= self.parameters < math.inf:
            raise ValueError(
                f"With parameters={self.parameters:g} there is no shape: the smallest allowed one, {smallest}, has "
                f"{least:,} parameters. Allow as many, or smaller multiples."
            )

    def best(self) -> Candidate:
        """Candidate of least error * L^e with e = -log2(1 - gain), over all depths."""
        exponent = depth_exponent(self.gain)
        step, squares, floor = self.architecture.multiples.depth, self.architecture.constants.depth**2, self._floor()
        return _least(
            lambda i: self.best_at_depth(step * i),
            lambda candidate: candidate.error * math.pow(candidate.shape.depth, exponent),
            lambda i: math.sqrt(squares / (step * i) ** 2 + floor) * math.pow(step * i, exponent),
            self.most_depth() // step,
        )

    def best_at_depth(self, depth: int) -> Candidate:
        architecture, step = self.architecture, self.architecture.multiples.embedding

        def bound(i: int) -> float:
            hidden = (self._units(step * i) / depth - architecture.per_addition) / architecture.per_unit
            return error_at(depth, hidden, step * i, architecture.constants)

        count = self.most_embedding(depth) // step
        return _least(lambda i: self.widest(depth, step * i), lambda candidate: candidate.error, bound, count)

    def widest(self, depth: int, embedding: int) -> Candidate:
        """Candidate of the largest hidden width, with which the error only falls."""
        architecture, step = self.architecture, self.architecture.multiples.hidden
        branch = (int(self.parameters) // embedding - architecture.per_coordinate) // depth
        hidden = (branch - architecture.per_addition) // architecture.per_unit // step * step
        return architecture.candidate(Shape(depth, hidden, embedding))

    def most_depth(self) -> int:
        step = self.architecture.multiples
        return int(self._units(step.embedding)) // self._smallest_branch() // step.depth * step.depth

    def most_embedding(self, depth: int) -> int:
        step = self.architecture.multiples.embedding
        per_coordinate = depth * self._smallest_branch() + self.architecture.per_coordinate
        return int(self.parameters) // per_coordinate // step * step

    def _floor(self) -> float:
        """Squared error that no depth goes below: all parameters in matrices of branches, no term in L."""
        step, constants = self.architecture.multiples, self.architecture.constants

        def square(i: int) -> float:
            embedding = step.embedding * i
            depth_times_hidden = self._units(embedding) / self.architecture.per_unit
            return constants.hidden**2 * embedding / depth_times_hidden + constants.embedding**2 / embedding

        return square(_valley(square, self.most_embedding(step.depth) // step.embedding))

    def _smallest_branch(self) -> int:
        """Parameters per coordinate of the stream."""
        return self.architecture.per_unit * self.architecture.multiples.hidden + self.architecture.per_addition

    def _units(self, embedding: int) -> float:
        return int(self.parameters) / embedding - self.architecture.per_coordinate


def _least(
    evaluate: Callable[[int], Candidate], value: Callable[[Candidate], float], bound: Callable[[int], float], count: int
) -> Candidate:
    """Candidate of least value among 1 to count, given a lower bound of the value that falls and then rises."""
    start = _valley(bound, count)
    best = evaluate(start)
    for direction in (-1, 1):
        i = start + direction
        while 1 <= i <= count and bound(i) < value(best):
            best = min(best, evaluate(i), key=value)
            i += direction
    return best


def _valley(function: Callable[[int], float], count: int) -> int:
    """Argument among 1 to count at which a function that falls and then rises is least."""
    return 1 + bisect_left(range(1, count), True, key=lambda i: function(i) <= function(i + 1))
