"""What a check measures, and how each of it should grow with the shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mlu_lightning.table import TABLES, Parameterization, Powers, Ratios, Role, Variant

__all__ = ["ALONE", "DRIFT", "FAULT", "KINDS", "Kind", "Quantity", "expected_powers", "lowest_and_highest"]

Kind = Literal["start", "update", "decay", "features", "stream", "output", "effect on stream", "effect on output"]

KINDS: tuple[Kind, ...] = (
    "start",
    "update",
    "decay",
    "features",
    "stream",
    "output",
    "effect on stream",
    "effect on output",
)
"""Kinds of quantities, the first of which can be the cause of what is wrong with a later one.

``start``: what a parameter does where it acts before the first step: the output of its submodule less that with zeros in
its place, over the input.
``update``: what it does there because its own value has moved since then.
``decay``: the part of it that weight decay takes away in a step.
``features``: how far pre-activations have moved, inputs of nonlinearities and logits of attention.
``stream``, ``output``: how far these have moved.
``effect on stream``, ``effect on output``: how much of that goes back if the parameters of one role are put back.
"""

DRIFT = 0.25
"""How far slopes may be from those of the limit because networks are of finite size."""

FAULT = 0.45
"""How far slopes are, at least, if something is missing: powers in the table are multiples of 1/2, and drift as well."""


ALONE = 0.65
"""The same for a single place along the depth: the lowest and the highest of ever more random values drift further."""


@dataclass(frozen=True)
class Quantity:
    """Something that is measured in every run of a check.

    Args:
        kind: of measurement.
        name: pattern of parameters or of branches, depth of a stream, or role.
        role: of the parameters; None for features, streams and outputs.

    >>> print(Quantity("update", "blocks.*.read.weight", "branch_in"))
    update of blocks.*.read.weight (branch_in)
    """

    kind: Kind
    name: str
    role: str | None = None

    def __str__(self) -> str:
        if self.kind.startswith("effect"):
            return f"{self.kind.replace('effect', f'effect of {self.name}', 1)}"
        role = f" ({self.role})" if self.role is not None else ""
        return f"{self.kind} of {self.name}{role}"


def expected_powers(
    kind: Kind, role: Role, multiplied: bool, variant: Variant | None = None, ratios: Ratios | None = None
) -> Powers:
    """Power of a parameter's ratios with which its quantities should grow in the limit of large networks.

    Everything moves by Θ(1) in every step (theory.md, section 1), and what a branch adds to the stream is one of L such
    parts. At the start, W_in h and W h are of order one, a branch adds sqrt(D/M)/L of what goes into its last matrix, and
    outputs are of order 1/sqrt(D) (theory.md, section 2).

    Args:
        kind: of quantity.
        role: of the parameter.
        multiplied: whether the multiplier 1/L of its branch is part of what is measured.
        variant: what about its place changes the row of its role.
        ratios: to the base, on which a row may depend, too.

    >>> expected_powers("update", Role.BRANCH_IN, False) == Powers()
    True
    >>> expected_powers("start", Role.BRANCH_OUT, True)
    Powers(depth=-1, inputs=0, outputs=0, aspect=0.5, active=0)
    """
    row = _TABLE.row(role, variant, ratios or Ratios())
    powers = _START.get(row, Powers()) if kind == "start" else Powers()
    part = kind in ("start", "update") and multiplied
    # norms on the way from one addition to the next all act on one stream
    return replace(powers, depth=-1) if part or (kind == "update" and variant is Variant.POST_NORM) else powers


def lowest_and_highest(quantity: Quantity, axis: str) -> tuple[float, float]:
    """Range of slopes that networks of finite size may have on the way to the expected one.

    What happens at random in the stream is sqrt(D/(L M)) of a coordinate, and in outputs 1/sqrt(D) or 1/sqrt(L M)
    (theory.md, section 2), so that it falls with all three together as the inverse root and the inverse of the size. Streams
    and outputs move by such parts at first, and by the expected ones later, as a whole and by the effects of roles.
    Gradients of gains and gates in a branch come through matrices that know nothing of them yet, and are of this size as
    well. Effects may drift from either by as much again.

    Args:
        quantity: whose slope it is.
        axis: along which the shape grows.

    >>> lowest_and_highest(Quantity("update", "mlp.weight", "branch_in"), "embedding")
    (-0.25, 0.25)
    >>> lowest_and_highest(Quantity("effect on stream", "branch_in", "branch_in"), "embedding")
    (-0.5, 1.0)
    """
    low = high = 0.0
    if quantity.kind in ("output", "effect on output"):
        low = -1.0 if axis == "together" else -0.5
    of_stream = quantity.kind in ("stream", "effect on stream")
    gain = quantity.role in _AT_RANDOM and quantity.kind not in ("start", "decay")
    if of_stream or gain:
        low, high = (low, high + 0.5) if axis == "embedding" else (low - 0.5, high)
    drift = 2 * DRIFT if quantity.kind.startswith("effect") else DRIFT
    return low - drift, high + drift


_AT_RANDOM = (Role.BRANCH_NORM, Role.BRANCH_BOUNDED, Role.BRANCH_BOUNDED_MATRIX)
_TABLE = TABLES[Parameterization.MLU]
_START = {
    _TABLE.rows[Role.BRANCH_OUT]: Powers(aspect=0.5),
    _TABLE.rows[Role.READOUT]: Powers(inputs=-0.5),
    _TABLE.rows[Role.STREAM_BOUNDED_MATRIX]: Powers(inputs=-0.5),
}
