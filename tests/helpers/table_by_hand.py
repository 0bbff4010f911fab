"""The table of theory.md, section 3, transcribed by hand, column by column: nothing in it comes from the package."""

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


@dataclass(frozen=True)
class Expected:
    """One line of theory.md's table at a shape. ``None`` in Muon's column: trained by AdamW next to Muon."""

    ratios: Ratios
    multiplier: float = 1.0
    std: float = 1.0
    adam: float = 1.0
    sgd: float = 1.0
    muon: float | None = None
    eps: float = 1.0
    decay: float = 1.0


Line = Callable[[Shape], Expected]

EXPECTED: dict[Role, Line] = {
    Role.EMBEDDING: lambda s: Expected(Ratios(s.depth, 1.0, s.d), sgd=s.d, eps=1 / s.d),
    Role.BRANCH_IN: lambda s: Expected(
        Ratios(s.depth, s.d, s.m),
        std=s.d**-0.5,
        adam=1 / s.d,
        sgd=s.depth * s.m / s.d,
        muon=math.sqrt(s.m / s.d),
        eps=1 / (s.depth * s.m),
        decay=s.d,
    ),
    Role.BRANCH_IN_BIAS: lambda s: Expected(Ratios(s.depth, 1.0, s.m), sgd=s.depth * s.m, eps=1 / (s.depth * s.m)),
    Role.BRANCH_HIDDEN: lambda s: Expected(
        Ratios(s.depth, s.m, s.m2),
        std=s.m**-0.5,
        adam=1 / s.m,
        sgd=s.depth * s.m2 / s.m,
        muon=math.sqrt(s.m2 / s.m),
        eps=1 / (s.depth * s.m2),
        decay=s.m,
    ),
    Role.BRANCH_OUT: lambda s: Expected(
        Ratios(s.depth, s.m, s.d),
        multiplier=1 / s.depth,
        std=s.d**0.5 / s.m,
        adam=1 / s.m,
        sgd=s.depth * s.d / s.m,
        muon=math.sqrt(s.d / s.m),
        eps=1 / (s.depth * s.d),
        decay=s.m,
    ),
    Role.BRANCH_OUT_BIAS: lambda s: Expected(
        Ratios(s.depth, 1.0, s.d), multiplier=1 / s.depth, sgd=s.depth * s.d, eps=1 / (s.depth * s.d)
    ),
    Role.STREAM_MATRIX: lambda s: Expected(
        Ratios(s.depth, s.d, s.d2),
        std=s.d**-0.5,
        adam=1 / s.d,
        sgd=s.d2 / s.d,
        muon=math.sqrt(s.d2 / s.d),
        eps=1 / s.d2,
        decay=s.d,
    ),
    # no line of the table: n = d and g = 1 of its rule, and the std of a readout's weight with the 1/d of its output
    Role.STREAM_BOUNDED_MATRIX: lambda s: Expected(
        Ratios(s.depth, s.d, 1.0), std=1 / s.d, adam=1 / s.d, sgd=1 / s.d, muon=math.sqrt(1 / s.d), decay=s.d
    ),
    Role.BRANCH_NORM: lambda s: Expected(Ratios(s.depth, 1.0, s.d), sgd=s.depth * s.d, eps=1 / (s.depth * s.d)),
    Role.BRANCH_BOUNDED: lambda s: Expected(Ratios(s.depth, 1.0, 1.0), sgd=s.depth, eps=1 / s.depth),
    # Muon has no entry in the table: "sqrt(out ratio / in ratio)" of its rule
    Role.BRANCH_BOUNDED_MATRIX: lambda s: Expected(
        Ratios(s.depth, s.d, 1.0),
        std=s.d**-0.5,
        adam=1 / s.d,
        sgd=s.depth / s.d,
        muon=math.sqrt(1 / s.d),
        eps=1 / s.depth,
        decay=s.d,
    ),
    Role.STREAM_NORM: lambda s: Expected(Ratios(s.depth, 1.0, s.d), sgd=s.d, eps=1 / s.d),
    Role.READOUT: lambda s: Expected(Ratios(s.depth, s.d, 1.0), multiplier=1 / s.d, sgd=s.d, eps=1 / s.d),
    Role.READOUT_BIAS: lambda s: Expected(Ratios(s.depth, 1.0, 1.0)),
}

VARIANTS: dict[tuple[Role, Variant], Line] = {
    # no line of the table: that of branch_out, with the std of a sum, for the norm after it undoes any other
    (Role.BRANCH_OUT, Variant.BEFORE_NORM): lambda s: Expected(
        Ratios(s.depth, s.m, s.d),
        multiplier=1 / s.depth,
        std=s.m**-0.5,
        adam=1 / s.m,
        sgd=s.depth * s.d / s.m,
        muon=math.sqrt(s.d / s.m),
        eps=1 / (s.depth * s.d),
        decay=s.m,
    ),
    # "divide the lr of those norms by l", and decay by what lr is multiplied with
    (Role.STREAM_NORM, Variant.POST_NORM): lambda s: Expected(
        Ratios(s.depth, 1.0, s.d), adam=1 / s.depth, sgd=s.d / s.depth, eps=1 / s.d, decay=s.depth
    ),
    # the row of a bounded matrix, where outputs do not grow
    (Role.STREAM_MATRIX, Variant.IN_HEAD): EXPECTED[Role.STREAM_BOUNDED_MATRIX],
}

Row = tuple[Role, Variant | None]
ROWS: dict[Row, Line] = {(role, None): line for role, line in EXPECTED.items()} | {**VARIANTS}


def wanted(role: Role, family: OptimizerFamily, shape: Shape, variant: Variant | None = None) -> Scale:
    """What theory.md says, with footnote 2 for the decay that is added to the gradient."""
    line = ROWS[role, variant](shape)
    lr, eps, decay = line.adam, line.eps, line.decay
    if family is SGD:
        lr = line.sgd
    if family in (SGD, ADAM):
        decay = 1 / line.sgd
    if family is MUON and line.muon is not None:
        lr, decay = line.muon, 1 / line.muon
        # Muon divides a gradient of inputs x outputs entries of this size by its Frobenius norm, which eps bounds
        eps *= math.sqrt(line.ratios.inputs * line.ratios.outputs)
    return Scale(line.multiplier, line.std, lr, eps, decay)
