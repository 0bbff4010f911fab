"""The plan: for every parameter its role and ratios to a base shape, from which all factors follow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from torch import nn

from mlu_lightning.rules import OptimizerFamily, Ratios, Role, Scale, scale
from mlu_lightning.structure import BranchKind, Site

__all__ = ["BranchPlan", "Multiplier", "ParameterPlan", "Plan", "StreamPlan"]


@dataclass(frozen=True)
class ParameterPlan:
    """What the plan says about one parameter.

    Args:
        role: row of the table.
        shape: its shape.
        base_shape: shape at the base; None in the paper's absolute form.
        ratios: ratios to the base shape.
        base_std: root mean square at the base's initialization; None leaves the parameter as it was built.
        fans: inputs and outputs of its map, in units.
        branch: index into ``Plan.branches``, None outside branches.
        transposed: whether it is stored [inputs, outputs], the other way round than ``nn.Linear`` stores it.
    """

    role: Role
    shape: tuple[int, ...]
    base_shape: tuple[int, ...] | None
    ratios: Ratios
    base_std: float | None
    fans: tuple[int, int]
    branch: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class StreamPlan:
    """Shape of a residual stream next to the base's (1 in the absolute form)."""

    depth: int
    base_depth: int
    embedding: int
    base_embedding: int


@dataclass(frozen=True)
class BranchPlan:
    """A residual branch next to the base's (``base_hidden`` is 1 in the absolute form)."""

    name: str
    kind: BranchKind
    hidden: int
    base_hidden: float
    stream: int
    position: int
    head_dim: int | None = None


@dataclass(frozen=True)
class Multiplier:
    """A factor in the forward pass.

    Args:
        name: of the branch, or of the readout's matrix.
        kind: what it multiplies: a residual ``"branch"``, the ``"readout"``, or attention ``"logits"``.
        value: the factor relative to base, before the richness alpha.
        site: where a hook attaches it; None if there is no such place.
        folds: parameters into which it can be folded; empty if there are none.
    """

    name: str
    kind: Literal["branch", "readout", "logits"]
    value: float
    site: Site | None
    folds: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Numbers of the MLU table for every parameter of one module relative to a base shape."""

    parameters: dict[str, ParameterPlan]
    branches: tuple[BranchPlan, ...]
    streams: tuple[StreamPlan, ...]
    multipliers: tuple[Multiplier, ...]
    alpha: float = 1.0
    warnings: tuple[str, ...] = ()

    @property
    def roles(self) -> dict[str, Role]:
        """Role of every parameter, by name."""
        return {name: parameter.role for name, parameter in self.parameters.items()}

    def forward_multiplier(self, multiplier: Multiplier) -> float:
        """Factor that a multiplier puts into the forward pass, with the richness alpha on branches."""
        return multiplier.value * self.alpha if multiplier.kind == "branch" else multiplier.value

    def scales(self, family: OptimizerFamily | str) -> dict[str, Scale]:
        """Factors relative to the base for every parameter, by name."""
        family = OptimizerFamily(family)
        folds = self._forward_factors
        return {
            name: replace(scale(parameter.role, parameter.ratios, family, self.alpha), multiplier=folds.get(name, 1.0))
            for name, parameter in self.parameters.items()
        }

    def check(self, module: nn.Module) -> None:
        """Refuse a module that the plan was not made for, with the difference."""

    @cached_property
    def _forward_factors(self) -> dict[str, float]:
        """Product of the multipliers that can be folded into each parameter."""
        factors: dict[str, float] = {}
        for multiplier in self.multipliers:
            for name in multiplier.folds:
                factors[name] = factors.get(name, 1.0) * self.forward_multiplier(multiplier)
        return factors
