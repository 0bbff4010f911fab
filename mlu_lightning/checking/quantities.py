"""What a check measures, and how each of it should grow with the shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlu_lightning.rules import Powers, Role

__all__ = ["KINDS", "TOLERANCES", "Kind", "Quantity", "expected_powers", "lowest_and_highest"]

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

TOLERANCES: dict[Kind, float] = {
    "start": 0.25,
    "update": 0.3,
    "decay": 0.25,
    "features": 0.3,
    "stream": 0.3,
    "output": 0.3,
    "effect on stream": 0.5,
    "effect on output": 0.5,
}
"""How far a slope may be from what is expected. Powers in the table are multiples of 1/2, so that a factor that is missing
shifts what it acts on by 1/2 at least. How far things move drifts a little in networks that are small. Effects are sums
of what cancels out and what does not, in parts that change with the size."""


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


def expected_powers(kind: Kind, role: str | None) -> Powers:
    """Power of a parameter's ratios with which a quantity should grow in the limit of large networks.

    Everything moves by Θ(1) in every step (theory.md, section 1), and what a branch adds to the stream is one of L such
    parts. At the beginning, W_in h and W h are of order one, a branch adds sqrt(D/M)/L of what goes into its last
    matrix, and the outputs are of order 1/sqrt(D) (theory.md, section 2).

    Args:
        kind: of quantity.
        role: of the parameter, None if it is not that of a parameter.

    >>> expected_powers("update", "branch_in"), expected_powers("update", "branch_out").depth
    (Powers(depth=0, inputs=0, outputs=0, aspect=0, active=0), -1)
    """
    if kind == "start" and role in _START:
        return _START[Role(role)]
    if kind in ("start", "update") and role in _PARTS:
        return Powers(depth=-1)
    return Powers()


def lowest_and_highest(kind: Kind, axis: str) -> tuple[float, float]:
    """Range of slopes that networks of finite size may have on the way to the expected one.

    What happens at random in the stream is sqrt(D/(L M)) of a coordinate, and in outputs 1/sqrt(D) or 1/sqrt(L M)
    (theory.md, section 2). An effect which is that at first, as that of a gain in a branch, which acts through matrices
    that know nothing of it yet, falls or grows as that does.

    Args:
        kind: of quantity.
        axis: along which the shape grows.

    >>> lowest_and_highest("effect on stream", "embedding")
    (0.0, 0.5)
    """
    if kind == "effect on stream":
        return (0.0, 0.5) if axis == "embedding" else (-0.5, 0.0)
    if kind == "effect on output":
        return (-0.5, 0.0)
    return (0.0, 0.0)


_START = {
    Role.BRANCH_OUT: Powers(depth=-1, aspect=0.5),
    Role.READOUT: Powers(inputs=-0.5),
    Role.STREAM_BOUNDED_MATRIX: Powers(inputs=-0.5),
}
_PARTS = (Role.BRANCH_OUT, Role.BRANCH_OUT_NORMED, Role.BRANCH_OUT_BIAS, Role.POST_NORM)
"""What is one of L parts: of what branches add to the stream, or of how much norms on the way change it."""
