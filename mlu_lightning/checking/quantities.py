"""The quantities that a check measures, and how each of them should grow with the shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from mlu_lightning.table import COMPOUNDING, TABLES, Parameterization, Powers, Ratios, Role, Variant

CONFIDENCE = 0.95  # probability of the intervals of slopes
DRIFT = 0.25  # how far slopes may be from those of the limit because networks are of finite size
FAULT = 0.45  # how far they are, at least, if something is missing: powers are multiples of 1/2, and drift as well
ALONE = 0.65  # the same for the lowest and the highest along the depth, which drift further, being of ever more values


class Kind(str, Enum):
    """Kind of a quantity; one that comes earlier can be the cause of what is wrong with a later one."""

    START = "start"
    """What a parameter does before the first step: its submodule's output less that with zeros instead, over the input."""
    UPDATE = "update"  # what it does there because its own value has moved since then
    DECAY = "decay"  # part of it that weight decay takes away in a step
    FEATURES = "features"  # how far pre-activations have moved: inputs of nonlinearities and logits of attention
    STREAM = "stream"
    OUTPUT = "output"
    EFFECT_ON_STREAM = "effect on stream"
    """How much of the stream's move goes back if the parameters of a role are put back."""
    EFFECT_ON_OUTPUT = "effect on output"

    def __str__(self) -> str:
        return self.value

    @property
    def is_of_parameter(self) -> bool:
        """Whether it is what parameters do themselves."""
        return self in (Kind.START, Kind.UPDATE, Kind.DECAY)

    @property
    def is_effect(self) -> bool:
        """Whether it is the effect of a role."""
        return self in (Kind.EFFECT_ON_STREAM, Kind.EFFECT_ON_OUTPUT)


@dataclass(frozen=True)
class Quantity:
    """Something that is measured in every run of a check."""

    kind: Kind
    name: str  # a pattern of parameters or of branches, a location in a stream, or a role
    role: str | None = None  # of the parameters

    def __str__(self) -> str:
        if self.kind.is_effect:
            target = "stream" if self.kind is Kind.EFFECT_ON_STREAM else "output"
            return f"effect of {self.name} on {target}"
        role = f" ({self.role})" if self.role is not None else ""
        return f"{self.kind} of {self.name}{role}"

    @property
    def label(self) -> str:
        """What is named as a cause: the role, or what moves where no role can be told."""
        return self.role or self.name


def expected_size(kind: Kind, role: Role, variant: Variant | None, ratios: Ratios, multiplied: bool) -> float:
    """Size of a parameter's quantity over that at the base, in the limit of large networks.

    Everything moves by Θ(1) in every step (theory.md, section 1). At the start W_in h and W h are of order one, a
    branch adds sqrt(D/M)/L of what enters its last matrix, and outputs are 1/sqrt(D) (theory.md, section 2).
    ``multiplied``: what is measured includes the branch's multiplier 1/L.
    """
    row = _TABLE.row(role, variant, ratios)
    at_start = _START.get(_TABLE.rows[role] if role is Role.READOUT else row, Powers())
    powers = at_start if kind is Kind.START else Powers()
    is_part = kind in (Kind.START, Kind.UPDATE) and (multiplied or variant is Variant.SUMMED)
    # norms on the way from one addition to the next, and matrices beside branches, all act on one stream
    if is_part or (kind is Kind.UPDATE and variant in COMPOUNDING):
        powers = replace(powers, depth=-1)
    return powers(ratios)


def lowest_and_highest(quantity: Quantity, axis: str) -> tuple[float, float]:
    """Range of slopes that networks of finite size may have on the way to the expected one.

    The random part of a stream is sqrt(D/(L M)) of a coordinate, that of outputs 1/sqrt(D) or 1/sqrt(L M) (theory.md,
    section 2), and dominates the first steps. Gradients of gains and gates in a branch pass through untrained matrices,
    and are of this size as well.
    """
    low = high = 0.0
    if quantity.kind in (Kind.OUTPUT, Kind.EFFECT_ON_OUTPUT):
        low = -1.0 if axis == "together" else -0.5
    of_stream = quantity.kind in (Kind.STREAM, Kind.EFFECT_ON_STREAM)
    gain = quantity.role in _AT_RANDOM and quantity.kind not in (Kind.START, Kind.DECAY)
    if of_stream or gain:
        low, high = (low, high + 0.5) if axis == "embedding" else (low - 0.5, high)
    drift = 2 * DRIFT if quantity.kind.is_effect else DRIFT
    return low - drift, high + drift


_AT_RANDOM = (Role.BRANCH_NORM, Role.BRANCH_BOUNDED, Role.BRANCH_BOUNDED_MATRIX)
_TABLE = TABLES[Parameterization.MLU]
_START = {
    _TABLE.rows[Role.BRANCH_OUT]: Powers(aspect=0.5),
    _TABLE.rows[Role.READOUT]: Powers(inputs=-0.5),
    _TABLE.rows[Role.STREAM_BOUNDED_MATRIX]: Powers(inputs=-0.5),
}
