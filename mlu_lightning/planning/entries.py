"""The entries of a plan: parameters, streams, branches and forward multipliers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from mlu_lightning.discovery.structure import BranchKind, Site
from mlu_lightning.table import TABLES, Parameterization, Ratios, Role, Variant, row_name


@dataclass(frozen=True)
class ParameterPlan:
    """One parameter next to its counterpart at the base, whose numbers are those with ``base_``.

    >>> ParameterPlan(Role.BRANCH_IN, (64, 8), fans=(8, 64), base_fans=(8, 16), depth=4, base_depth=2).ratios
    Ratios(depth=2.0, inputs=1.0, outputs=4.0, active=1.0, uses=1.0)
    """

    role: Role
    shape: tuple[int, ...]
    fans: tuple[int, int]  # inputs and outputs of its map, in units (1 input for vectors)
    base_fans: tuple[int, int]  # (1, 1) in the paper's absolute form
    base_shape: tuple[int, ...] | None = None  # None in the absolute form
    base_std: float | None = None  # root mean square at the base's initialization; None leaves it as it was built
    depth: int = 1  # additions along its stream, L; how many of its kind the stream goes through, where these compound
    base_depth: int = 1
    active: int = 1  # experts over whose outputs a mixture of experts averages
    base_active: int = 1
    uses: int = 1  # places along its stream at which it acts, in a block that is applied again and again
    base_uses: int = 1
    # what the module multiplies by what the parameter makes, besides branches and readouts; None where it cannot be told
    constant: float | None = None
    base_constant: float | None = None
    copy_of: str | None = None  # parameter that it begins as a copy of, as a teacher's begin as its student's
    variant: Variant | None = None  # what about its place changes the row of its role
    branch: int | None = None  # index into ``Plan.branches``
    transposed: bool = False  # whether it is stored [inputs, outputs], unlike the weight of ``nn.Linear``
    # whether some rows make what hidden units share, which fans do not count (theory.md, section 3)
    mixed: bool = False

    @property
    def row(self) -> str:
        """Name of its row of the table."""
        return row_name(self.role, self.variant)

    @property
    def differs_by_row(self) -> bool:
        """Whether its rows are of two roles whose gradients are of different size."""
        if not (self.base_shape and math.prod(self.base_shape)):
            return self.mixed
        entries = math.prod(self.shape) / math.prod(self.base_shape)
        return self.mixed and not math.isclose(entries, math.prod(self.fans) / math.prod(self.base_fans))

    @cached_property
    def constant_ratio(self) -> float:
        """Ratio of the module's own constant to the base's."""
        return constant_ratio(self.constant, self.base_constant)

    @property
    def is_at_base(self) -> bool:
        """Whether nothing about it differs from the base."""
        return self.shape == self.base_shape and self.ratios.is_identity and self.constant_ratio == 1

    @cached_property
    def ratios(self) -> Ratios:
        """Those ratios to the base that the row of its role in the MLU table uses; the others are 1."""
        of_data = self.role is Role.EMBEDDING and self.base_shape is None
        ratios = Ratios(
            depth=self.depth / self.base_depth,
            inputs=1.0 if of_data else self.fans[0] / self.base_fans[0],
            outputs=self.fans[1] / self.base_fans[1],
            active=self.active / self.base_active,
            uses=self.uses / self.base_uses,
        )
        powers = TABLES[Parameterization.MLU].row(self.role, self.variant, ratios).powers
        # data, targets and bounded sizes do not count
        unused = [key for key in ("depth", "inputs", "outputs") if not any(getattr(power, key) for power in powers)]
        return replace(ratios, **dict.fromkeys(unused, 1.0))


def constant_ratio(constant: float | None, base_constant: float | None) -> float:
    """Ratio of a module's constant to the base's; exactly 1 where they differ by rounding, or one is not known."""
    if not constant or not base_constant or math.isclose(constant, base_constant, rel_tol=1e-6):
        return 1.0
    return constant / base_constant


@dataclass(frozen=True)
class StreamPlan:
    """A residual stream, of L additions and dimension D, next to the base's (1 in the absolute form)."""

    depth: int
    base_depth: int
    embedding: int
    base_embedding: int


@dataclass(frozen=True)
class BranchPlan:
    """A residual branch next to the base's, whose numbers are 1 and None in the absolute form."""

    name: str  # of its module
    kind: BranchKind
    hidden: int  # hidden width M: heads, channels or units
    base_hidden: int
    stream: int  # index into ``Plan.streams``
    position: int  # place along the stream
    head_dim: int | None = None  # of queries and keys, None for other kinds
    base_head_dim: int | None = None
    logits_scale: float | None = None  # what the module multiplies logits by, None where it cannot be read
    base_logits_scale: float | None = None


@dataclass(frozen=True)
class Multiplier:
    """A factor in the forward pass."""

    name: str  # of the branch, or of the readout's matrix
    kind: Literal["branch", "readout", "logits", "addition"]  # the last is what is added beside branches
    value: float  # relative to the base, before the richness alpha
    site: Site | None  # where a hook attaches it; None if there is no such place
    folds: tuple[str, ...]  # parameters into which it can be folded
    # the module's own, which ``value`` is relative to: their product, next to the base's constant, is the table's factor
    constant: float | None = None
    base_constant: float | None = None
    # where it goes after the training, if ``folds`` is empty: into the norm before a readout
    gains: tuple[str, ...] = ()

    @property
    def constant_ratio(self) -> float:
        """Ratio of the module's own constant to the base's."""
        return constant_ratio(self.constant, self.base_constant)

    @property
    def role(self) -> Role | None:
        """The role whose row has the multiplier; None for logits, which have no row."""
        return {"branch": Role.BRANCH_OUT, "readout": Role.READOUT}.get(self.kind)
