"""The table of theory.md, section 3, transcribed by hand, column by column: nothing in it comes from the package."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from mlu_lightning.table import OptimizerFamily, Ratios, Role, Scale, Variant

SGD, ADAM, ADAMW, MUON = OptimizerFamily

# At ratios to the base of the depth l, of hidden units m before and m2 after a matrix, and of the stream d before and d2
# after one. No number for Muon: trained by AdamW next to it. No lines of theory.md's table, but of its rules:
# - branch_bounded_matrix has no entry there for Muon: "sqrt(out ratio / in ratio)";
# - stream_bounded_matrix: n = d and g = 1, and the std of a readout's weight with the 1/d of its output;
# - branch_out before a norm: that of branch_out, with the std of a sum, for the norm after it undoes any other;
# - stream_norm post-norm: "divide the lr of those norms by l", and decay by what lr is multiplied with;
# - frozen is left alone;
# - of_block: what one block alone makes of data has gradients of 1/l next to what all of them read;
# - summed: under the 1/n of a sum, a multiplier of readouts as their 1/d is, and folded into others ("std a·b, Adam lr a·c,
#   SGD lr a²·c, eps ε/a, decoupled decay λ/a" with a = 1/l);
# - stream_matrix in a head: the row of a bounded matrix, where outputs do not grow.
_TABLE = """
row                     depth inputs outputs | multiplier std       adam sgd    muon       eps      decay
embedding               l     1      d       | 1          1         1    d      -          1/d      1
branch_in               l     d      m       | 1          d**-0.5   1/d  l*m/d  sqrt(m/d)  1/(l*m)  d
branch_in_bias          l     1      m       | 1          1         1    l*m    -          1/(l*m)  1
branch_hidden           l     m      m2      | 1          m**-0.5   1/m  l*m2/m sqrt(m2/m) 1/(l*m2) m
branch_out              l     m      d       | 1/l        d**0.5/m  1/m  l*d/m  sqrt(d/m)  1/(l*d)  m
branch_out_bias         l     1      d       | 1/l        1         1    l*d    -          1/(l*d)  1
stream_matrix           l     d      d2      | 1          d**-0.5   1/d  d2/d   sqrt(d2/d) 1/d2     d
stream_bounded_matrix   l     d      1       | 1          1/d       1/d  1/d    sqrt(1/d)  1        d
branch_norm             l     1      d       | 1          1         1    l*d    -          1/(l*d)  1
branch_bounded          l     1      1       | 1          1         1    l      -          1/l      1
branch_bounded_matrix   l     d      1       | 1          d**-0.5   1/d  l/d    sqrt(1/d)  1/l      d
stream_norm             l     1      d       | 1          1         1    d      -          1/d      1
readout                 l     d      1       | 1/d        1         1    d      -          1/d      1
readout_bias            l     1      1       | 1          1         1    1      -          1        1
frozen                  l     1      1       | 1          1         1    1      -          1        1
branch_out:before_norm  l     m      d       | 1/l        m**-0.5   1/m  l*d/m  sqrt(d/m)  1/(l*d)  m
stream_norm:post_norm   l     1      d       | 1          1         1/l  d/l    -          1/d      l
stream_norm:every_block l     1      d       | 1          1         1/l  d/l    -          1/d      l
stream_matrix:every_block l   d      d2      | 1          d**-0.5   1/(d*l) d2/(d*l) sqrt(d2/d)/l 1/d2 d*l
stream_matrix:in_head   l     d      1       | 1          1/d       1/d  1/d    sqrt(1/d)  1        d
embedding:of_block      l     1      d       | 1          1         1    l*d    -          1/(l*d)  1
stream_norm:of_block    l     1      d       | 1          1         1    l*d    -          1/(l*d)  1
stream_matrix:of_block  l     d      d2      | 1          d**-0.5   1/d  l*d2/d sqrt(d2/d) 1/(l*d2) d
readout:of_block        l     d      1       | 1/d        1         1    l*d    -          1/(l*d)  1
readout_bias:of_block   l     1      1       | 1          1         1    l      -          1/l      1
embedding:summed        l     1      d       | 1          1/l       1/l  d/l    -          1/d      l
stream_norm:summed      l     1      d       | 1          1/l       1/l  d/l    -          1/d      l
stream_matrix:summed    l     d      d2      | 1          d**-0.5/l 1/(d*l) d2/(d*l) sqrt(d2/d)/l 1/d2 d*l
readout:summed          l     d      1       | 1/(l*d)    1         1    l*d    -          1/(l*d)  1
readout_bias:summed     l     1      1       | 1          1/l       1/l  1/l    -          1        l
"""


class Shape(NamedTuple):
    """Ratios to the base: depth, hidden units before and after, stream before and after a matrix on it."""

    depth: float
    m: float
    m2: float
    d: float
    d2: float


@dataclass(frozen=True)
class Expected:  # one line of the table at a shape
    ratios: Ratios
    multiplier: float
    std: float
    adam: float
    sgd: float
    muon: float | None
    eps: float
    decay: float


Line = Callable[[Shape], Expected]
Row = tuple[Role, Variant | None]


def _line(cells: list[str]) -> Line:
    def at(shape: Shape) -> Expected:
        names = {**shape._asdict(), "l": shape.depth, "sqrt": math.sqrt}
        numbers = [None if cell == "-" else eval(cell, names) for cell in cells]
        return Expected(Ratios(*numbers[:3]), *numbers[3:])

    return at


def _row(name: str) -> Row:
    role, _, variant = name.partition(":")
    return Role(role), Variant(variant) if variant else None


_LINES = [line.replace("|", " ").split() for line in _TABLE.strip().splitlines()[1:]]
ROWS: dict[Row, Line] = {_row(name): _line(cells) for name, *cells in _LINES}
EXPECTED: dict[Role, Line] = {role: line for (role, variant), line in ROWS.items() if variant is None}


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
