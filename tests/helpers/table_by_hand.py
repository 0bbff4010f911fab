"""The table of theory.md, section 3, transcribed by hand, column by column: nothing in it comes from the package."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from mlu_lightning.table import OptimizerFamily, Ratios, Role, Scale, Variant

SGD, ADAM, ADAMW, MUON = OptimizerFamily


class Shape(NamedTuple):
    """Ratios to the base: depth, hidden units before and after, stream before and after a matrix on it."""

    depth: float
    m: float
    m2: float
    d: float
    d2: float


Column = Callable[[Shape], float]


@dataclass(frozen=True)
class Expected:
    """One line of theory.md's table. ``None`` in Muon's column: trained by AdamW next to Muon."""

    ratios: Callable[[Shape], Ratios]
    multiplier: Column
    std: Column
    adam: Column
    sgd: Column
    muon: Column | None
    eps: Column
    decay: Column


def one(_: Shape) -> float:
    return 1.0


EXPECTED: dict[Role, Expected] = {
    Role.EMBEDDING: Expected(
        ratios=lambda s: Ratios(s.depth, 1.0, s.d),
        multiplier=one,
        std=one,
        adam=one,
        sgd=lambda s: s.d,
        muon=None,
        eps=lambda s: 1 / s.d,
        decay=one,
    ),
    Role.BRANCH_IN: Expected(
        ratios=lambda s: Ratios(s.depth, s.d, s.m),
        multiplier=one,
        std=lambda s: s.d**-0.5,
        adam=lambda s: 1 / s.d,
        sgd=lambda s: s.depth * s.m / s.d,
        muon=lambda s: math.sqrt(s.m / s.d),
        eps=lambda s: 1 / (s.depth * s.m),
        decay=lambda s: s.d,
    ),
    Role.BRANCH_IN_BIAS: Expected(
        ratios=lambda s: Ratios(s.depth, 1.0, s.m),
        multiplier=one,
        std=one,
        adam=one,
        sgd=lambda s: s.depth * s.m,
        muon=None,
        eps=lambda s: 1 / (s.depth * s.m),
        decay=one,
    ),
    Role.BRANCH_HIDDEN: Expected(
        ratios=lambda s: Ratios(s.depth, s.m, s.m2),
        multiplier=one,
        std=lambda s: s.m**-0.5,
        adam=lambda s: 1 / s.m,
        sgd=lambda s: s.depth * s.m2 / s.m,
        muon=lambda s: math.sqrt(s.m2 / s.m),
        eps=lambda s: 1 / (s.depth * s.m2),
        decay=lambda s: s.m,
    ),
    Role.BRANCH_OUT: Expected(
        ratios=lambda s: Ratios(s.depth, s.m, s.d),
        multiplier=lambda s: 1 / s.depth,
        std=lambda s: s.d**0.5 / s.m,
        adam=lambda s: 1 / s.m,
        sgd=lambda s: s.depth * s.d / s.m,
        muon=lambda s: math.sqrt(s.d / s.m),
        eps=lambda s: 1 / (s.depth * s.d),
        decay=lambda s: s.m,
    ),
    Role.BRANCH_OUT_BIAS: Expected(
        ratios=lambda s: Ratios(s.depth, 1.0, s.d),
        multiplier=lambda s: 1 / s.depth,
        std=one,
        adam=one,
        sgd=lambda s: s.depth * s.d,
        muon=None,
        eps=lambda s: 1 / (s.depth * s.d),
        decay=one,
    ),
    Role.STREAM_MATRIX: Expected(
        ratios=lambda s: Ratios(s.depth, s.d, s.d2),
        multiplier=one,
        std=lambda s: s.d**-0.5,
        adam=lambda s: 1 / s.d,
        sgd=lambda s: s.d2 / s.d,
        muon=lambda s: math.sqrt(s.d2 / s.d),
        eps=lambda s: 1 / s.d2,
        decay=lambda s: s.d,
    ),
    # no line of the table: n = d and g = 1 of its rule, and the std of a readout's weight with the 1/d of its output
    Role.STREAM_BOUNDED_MATRIX: Expected(
        ratios=lambda s: Ratios(s.depth, s.d, 1.0),
        multiplier=one,
        std=lambda s: 1 / s.d,
        adam=lambda s: 1 / s.d,
        sgd=lambda s: 1 / s.d,
        muon=lambda s: math.sqrt(1 / s.d),
        eps=one,
        decay=lambda s: s.d,
    ),
    Role.BRANCH_NORM: Expected(
        ratios=lambda s: Ratios(s.depth, 1.0, s.d),
        multiplier=one,
        std=one,
        adam=one,
        sgd=lambda s: s.depth * s.d,
        muon=None,
        eps=lambda s: 1 / (s.depth * s.d),
        decay=one,
    ),
    Role.BRANCH_BOUNDED: Expected(
        ratios=lambda s: Ratios(s.depth, 1.0, 1.0),
        multiplier=one,
        std=one,
        adam=one,
        sgd=lambda s: s.depth,
        muon=None,
        eps=lambda s: 1 / s.depth,
        decay=one,
    ),
    Role.BRANCH_BOUNDED_MATRIX: Expected(
        ratios=lambda s: Ratios(s.depth, s.d, 1.0),
        multiplier=one,
        std=lambda s: s.d**-0.5,
        adam=lambda s: 1 / s.d,
        sgd=lambda s: s.depth / s.d,
        muon=lambda s: math.sqrt(1 / s.d),  # no entry in the table; "sqrt(out ratio / in ratio)" of its rule
        eps=lambda s: 1 / s.depth,
        decay=lambda s: s.d,
    ),
    Role.STREAM_NORM: Expected(
        ratios=lambda s: Ratios(s.depth, 1.0, s.d),
        multiplier=one,
        std=one,
        adam=one,
        sgd=lambda s: s.d,
        muon=None,
        eps=lambda s: 1 / s.d,
        decay=one,
    ),
    Role.READOUT: Expected(
        ratios=lambda s: Ratios(s.depth, s.d, 1.0),
        multiplier=lambda s: 1 / s.d,
        std=one,
        adam=one,
        sgd=lambda s: s.d,
        muon=None,
        eps=lambda s: 1 / s.d,
        decay=one,
    ),
    Role.READOUT_BIAS: Expected(
        ratios=lambda s: Ratios(s.depth, 1.0, 1.0),
        multiplier=one,
        std=one,
        adam=one,
        sgd=one,
        muon=None,
        eps=one,
        decay=one,
    ),
}

VARIANTS: dict[tuple[Role, Variant], Expected] = {
    # no line of the table: that of branch_out, with the std of a sum, for the norm after it undoes any other
    (Role.BRANCH_OUT, Variant.BEFORE_NORM): Expected(
        ratios=lambda s: Ratios(s.depth, s.m, s.d),
        multiplier=lambda s: 1 / s.depth,
        std=lambda s: s.m**-0.5,
        adam=lambda s: 1 / s.m,
        sgd=lambda s: s.depth * s.d / s.m,
        muon=lambda s: math.sqrt(s.d / s.m),
        eps=lambda s: 1 / (s.depth * s.d),
        decay=lambda s: s.m,
    ),
    # "divide the lr of those norms by l", and decay by what lr is multiplied with
    (Role.STREAM_NORM, Variant.POST_NORM): Expected(
        ratios=lambda s: Ratios(s.depth, 1.0, s.d),
        multiplier=one,
        std=one,
        adam=lambda s: 1 / s.depth,
        sgd=lambda s: s.d / s.depth,
        muon=None,
        eps=lambda s: 1 / s.d,
        decay=lambda s: s.depth,
    ),
    # the row of a bounded matrix, where outputs do not grow
    (Role.STREAM_MATRIX, Variant.IN_HEAD): EXPECTED[Role.STREAM_BOUNDED_MATRIX],
}

Row = tuple[Role, Variant | None]
ROWS: dict[Row, Expected] = {(role, None): expected for role, expected in EXPECTED.items()} | {**VARIANTS}


def wanted(role: Role, family: OptimizerFamily, shape: Shape, variant: Variant | None = None) -> Scale:
    """What theory.md says, with footnote 2 for the decay that is added to the gradient."""
    row = ROWS[role, variant]
    lr, eps, decay = row.adam(shape), row.eps(shape), row.decay(shape)
    if family is SGD:
        lr = row.sgd(shape)
    if family in (SGD, ADAM):
        decay = 1 / row.sgd(shape)
    if family is MUON and row.muon is not None:
        lr = row.muon(shape)
        decay = 1 / lr
        # Muon divides a gradient of inputs x outputs entries of this size by its Frobenius norm, which eps bounds
        ratios = row.ratios(shape)
        eps *= math.sqrt(ratios.inputs * ratios.outputs)
    return Scale(row.multiplier(shape), row.std(shape), lr, eps, decay)
