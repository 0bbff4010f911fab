"""What a plan says about one parameter, one stream, one branch, and one forward multiplier."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from mlu_lightning.discovery.structure import BranchKind, Site
from mlu_lightning.table import TABLES, Parameterization, Ratios, Role, Variant, row_name

__all__ = ["BranchPlan", "Multiplier", "ParameterPlan", "StreamPlan", "constant_ratio"]


@dataclass(frozen=True)
class ParameterPlan:
    """One parameter next to its counterpart at the base, whose numbers are those with ``base_``.

    Args:
        role: row of the table.
        shape: its shape; None at the base in the paper's absolute form.
        fans: inputs and outputs of its map, in units (1 input for vectors); (1, 1) at the base in the absolute form.
        base_std: root mean square at the base's initialization; None leaves the parameter as it was built.
        depth: residual additions along its stream, L; how many of its kind the stream goes through, where these compound.
        active: number of experts over whose outputs a mixture of experts averages; 1 outside of experts.
        uses: places along its stream at which it acts, as weights of a block do that is applied again and again.
        constant: what the module itself multiplies by what the parameter makes, besides branches and readouts; None where
            it cannot be told, as for an attention's queries and keys.
        copy_of: parameter that it begins as a copy of, as a teacher's begin as its student's; None for others.
        variant: what about its place changes the row of its role.
        branch: index into ``Plan.branches``, None outside branches.
        transposed: whether it is stored [inputs, outputs], the other way round than ``nn.Linear`` stores it.
        mixed: whether some of its rows make what hidden units share, which fans do not count (theory.md, section 3).

    >>> ParameterPlan(Role.BRANCH_IN, (64, 8), fans=(8, 64), base_fans=(8, 16), depth=4, base_depth=2).ratios
    Ratios(depth=2.0, inputs=1.0, outputs=4.0, active=1.0, uses=1.0)
    """

    role: Role
    shape: tuple[int, ...]
    fans: tuple[int, int]
    base_fans: tuple[int, int]
    base_shape: tuple[int, ...] | None = None
    base_std: float | None = None
    depth: int = 1
    base_depth: int = 1
    active: int = 1
    base_active: int = 1
    uses: int = 1
    base_uses: int = 1
    constant: float | None = None
    base_constant: float | None = None
    copy_of: str | None = None
    variant: Variant | None = None
    branch: int | None = None
    transposed: bool = False
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
        ratios = Ratios(
            depth=self.depth / self.base_depth,
            inputs=self.fans[0] / self.base_fans[0],
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
    """A residual branch next to the base's, whose numbers are 1 and None in the absolute form.

    Args:
        name: name of its module.
        kind: ``"attention"``, ``"convolution"``, ``"mlp"``, or ``"mixing"`` without a matrix.
        hidden: hidden width M: heads, channels or units.
        stream: index into ``Plan.streams``.
        position: place along the stream.
        head_dim: dimension of queries and keys per head, None for other kinds.
        logits_scale: what the module itself multiplies logits by, None for other kinds and where it cannot be read.
    """

    name: str
    kind: BranchKind
    hidden: int
    base_hidden: int
    stream: int
    position: int
    head_dim: int | None = None
    base_head_dim: int | None = None
    logits_scale: float | None = None
    base_logits_scale: float | None = None


@dataclass(frozen=True)
class Multiplier:
    """A factor in the forward pass.

    Args:
        name: of the branch, or of the readout's matrix.
        kind: what it multiplies: a residual ``"branch"``, the ``"readout"``, attention ``"logits"``, or
            an ``"addition"`` beside branches.
        value: the factor relative to base, before the richness alpha.
        site: where a hook attaches it; None if there is no such place.
        folds: parameters into which it can be folded; empty if there are none.
        constant: what the module itself multiplies the branch or the readout by, which ``value`` is relative to: the product
            of both, next to the base's constant, is the table's factor. None where it cannot be told.
    """

    name: str
    kind: Literal["branch", "readout", "logits", "addition"]
    value: float
    site: Site | None
    folds: tuple[str, ...]
    constant: float | None = None
    base_constant: float | None = None

    @property
    def constant_ratio(self) -> float:
        """Ratio of the module's own constant to the base's."""
        return constant_ratio(self.constant, self.base_constant)

    @property
    def role(self) -> Role | None:
        """The role whose row has the multiplier; None for logits, which have no row."""
        return {"branch": Role.BRANCH_OUT, "readout": Role.READOUT}.get(self.kind)
