"""What a plan expects of each use of a parameter and of residual additions, as factors relative to the base."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlu_lightning.observation.dataflow import ADDED, How
from mlu_lightning.planning import Multiplier, ParameterPlan, Plan, std_groups
from mlu_lightning.table import TABLES, Role, Variant

FEW = 64  # entries, of fewer of which that were not set to it the size tells nothing

_ROUNDING = 2**-6


@dataclass(frozen=True)
class Interval:
    """Least and largest of what may be found."""

    low: float
    high: float

    def nearest(self, value: float) -> float:
        """The value of the interval that is nearest to one found."""
        return min(max(value, self.low), self.high)


class Expectations:
    """Factors next to the base that a plan asks for."""

    def __init__(self, plan: Plan, kept: frozenset[str] = frozenset()) -> None:
        """``kept`` are parameters that keep their values, because they require no gradient."""
        self.plan = plan
        self._kept = kept | {name for name, role in plan.roles.items() if role is Role.FROZEN}
        self._groups = {name: (names, target) for names, target in std_groups(plan) for name in names}
        self._table = TABLES[plan.parameterization]
        of_branches = [multiplier for multiplier in plan.multipliers if multiplier.kind == "branch"]
        self._branches = dict(zip(range(len(plan.branches)), of_branches, strict=False))
        self._readouts = {found.name: found for found in plan.multipliers if found.kind == "readout"}

    def keeps(self, name: str) -> bool:
        """Whether a parameter's values are not the plan's."""
        return name in self._kept

    def parameter(self, names: Sequence[str], how: How) -> str | None:
        """The parameter whose entry tells what to expect of a use of several, None if none is used as it is planned."""
        entries = self.plan.parameters
        known = [name for name in names if name in entries and name not in self._kept]
        matrices = [name for name in known if entries[name].role.is_matrix and len(entries[name].shape) > 1]
        if how == "vector":  # matrices are used as such elsewhere, and here by a penalty
            known, matrices = [name for name in known if name not in matrices], []
        return next(iter(matrices if how == "matrix" and matrices else known), None)

    def std(self, name: str) -> float:
        """Factor of the standard deviation, without multipliers."""
        return self._table_std(name) / self._compensated(name)

    def scale(self, name: str, sizes: Mapping[str, float]) -> tuple[float, bool] | None:
        """Size of a parameter next to what initialize() makes it, and whether it did; None if left as built.

        initialize() sets the root mean square of a group; multipliers may be folded in.
        """
        names, target = self._groups[name]
        group = [each for each in names if each in sizes and each not in self._kept]
        entries = sum(math.prod(self.plan.parameters[each].shape) for each in group)
        if not target or self.plan.parameters[name].copy_of is not None or not any(sizes[each] for each in group):
            return None  # as built
        folded = self.plan.folded_factors
        for of_set in ({}, folded):
            unfolded = math.hypot(*(sizes[each] / of_set.get(each, 1.0) for each in group)) / math.sqrt(len(group))
            if abs(unfolded / target - 1) < _ROUNDING:
                return of_set.get(name, 1.0), True
        found = math.hypot(*(sizes[each] for each in group)) / math.sqrt(len(group))
        return (found / target, False) if entries >= FEW else None

    def weight(self, name: str, how: How) -> float:
        """Factor of std · sqrt(n) and the module's own constants, which follows the table where these are compensated."""
        entry = self.plan.parameters[name]
        std = self._table_std(name) * entry.constant_ratio / self._compensated(name)
        if how != "matrix" or not entry.role.is_matrix:
            return std
        inputs = entry.ratios.inputs / entry.ratios.active  # each expert by itself
        if self.is_tied_readout(name):
            inputs = entry.fans[1] / entry.base_fans[1]
        return std * math.sqrt(inputs)

    def is_tied_readout(self, name: str) -> bool:
        """Whether a parameter is an embedding, and where it is used as a matrix the readout."""
        return self.plan.parameters[name].role is Role.EMBEDDING and name in self._readouts

    def factors(self, name: str, how: How, ends: set[str]) -> tuple[float, ...]:
        """Factors of c · std · sqrt(n), with the constants c until a chain of multiplications ends; one of them is right."""
        weight, entry = self.weight(name, how), self.plan.parameters[name]
        if how == "matrix" and name in self._readouts:
            return (weight * self._factor(self._readouts[name]) / entry.constant_ratio,)
        multiplier = self._multiplier(entry)
        if multiplier is None:
            return (weight,)
        multiplied = weight * self._factor(multiplier)
        if self.is_last(name, ends):
            return (multiplied,)
        # it may be in the weights, or come after something else
        may_be = name in multiplier.folds or bool(ends & {*ADDED}) or entry.role is Role.BRANCH_OUT
        return (weight, multiplied) if may_be else (weight,)

    def is_last(self, name: str, ends: set[str]) -> bool:
        """Whether what a parameter makes is added to the stream, so that its branch's multiplier is on it."""
        entry = self.plan.parameters[name]
        multiplier = self._multiplier(entry)
        if multiplier is None or not ends & {*ADDED}:
            return False
        writes = entry.role in (Role.BRANCH_OUT, Role.BRANCH_OUT_BIAS)
        return writes or name in multiplier.folds or (entry.role is Role.BRANCH_NORM and not multiplier.folds)

    def heads(self, name: str) -> float:
        """Ratio of head_dim to the base's, or of the base's to it: logits may be multiplied at queries or at keys."""
        entry = self.plan.parameters[name]
        branch = self.plan.branches[entry.branch] if entry.branch is not None and self.plan.branches else None
        if branch is None or not branch.head_dim or not branch.base_head_dim:
            return 1.0
        ratio = branch.head_dim / branch.base_head_dim
        return max(ratio, 1 / ratio)

    def added(self, names: frozenset[str]) -> Interval | None:
        """What a residual branch adds: 1/l times what its last matrix makes of random inputs, or of biases and norms."""
        found = []
        for name in names:
            entry = self.plan.parameters.get(name)
            multiplier = None if entry is None else self._multiplier(entry)
            if entry is None or multiplier is None or entry.role is not Role.BRANCH_OUT or name in self._kept:
                continue
            weight = 1.0 if entry.variant is Variant.BEFORE_NORM else self.weight(name, "matrix")
            found += [self._factor(multiplier) * factor for factor in (1.0, weight)]
        inner = self.tuned(name for name in names if self.plan.roles.get(name) not in (None, Role.BRANCH_OUT))
        # gates are products of two of what they multiply
        return Interval(min(found) * inner.low**2, max(found) * inner.high**2) if found else None

    def times(self, names: Iterable[str]) -> float:
        """How often branches that are written with these parameters are applied, next to the base's."""
        entries = (entry for name in names if (entry := self.plan.parameters.get(name)) is not None)
        return next((entry.ratios.uses for entry in entries if entry.role is Role.BRANCH_OUT), 1.0)

    def tuned(self, names: Iterable[str]) -> Interval:
        """Least and largest of the tuned factors of parameters' std, and 1."""
        found = [1.0, *(self.plan.matched.of(name).std for name in names)]
        return Interval(min(found), max(found))

    @property
    def stems(self) -> Interval:
        """Tuned factors of what a stream begins with."""
        return self.tuned(name for name, role in self.plan.roles.items() if not role.in_branch)

    def _table_std(self, name: str) -> float:
        entry = self.plan.parameters[name]
        std = self._table.row(entry.role, entry.variant, entry.ratios).std(entry.ratios)
        return std * self.plan.matched.of(name).std

    def _compensated(self, name: str) -> float:
        """Ratio of the module's own constant to the base's that a parameter's numbers are relative to."""
        return self.plan.parameters[name].constant_ratio if self._table.scales_optimizer else 1.0

    def _factor(self, multiplier: Multiplier) -> float:
        """A multiplier times the constants of the module's own, next to the base's."""
        return self.plan.forward_multiplier(multiplier) * multiplier.constant_ratio

    def _multiplier(self, entry: ParameterPlan) -> Multiplier | None:
        return None if entry.branch is None else self._branches.get(entry.branch)
