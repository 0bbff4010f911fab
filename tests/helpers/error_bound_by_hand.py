"""The error bound of theory.md, section 2, term by term."""

from mlu_lightning import ErrorConstants, Shape


def squared_terms(shape: Shape, constants: ErrorConstants) -> tuple[float, float, float]:
    return (
        constants.depth**2 / shape.depth**2,
        constants.hidden**2 * shape.embedding / shape.depth / shape.hidden,
        constants.embedding**2 / shape.embedding,
    )


def by_hand(shape: Shape, constants: ErrorConstants) -> float:
    return sum(squared_terms(shape, constants)) ** 0.5
