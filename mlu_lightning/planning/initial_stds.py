"""Group parameters whose initial scale is set together, with the root mean square that they get."""

from __future__ import annotations

import math

from mlu_lightning.planning.plan import Plan
from mlu_lightning.table import OptimizerFamily
from mlu_lightning.utilities.names import name_pattern


def std_groups(plan: Plan) -> list[tuple[list[str], float | None]]:
    """Parameters that differ in their place along the depth only, and the root mean square that they should have."""
    # over all of them, so that the sampling noise of single tensors averages out
    groups: dict[object, dict[str, float | None]] = {}
    for name, planned in plan.parameters.items():
        row = planned.role, planned.variant, planned.shape, planned.base_shape, planned.ratios, planned.constant_ratio
        key = name_pattern(name), row, plan.matched.of(name).std, planned.base_std is None
        groups.setdefault(key, {})[name] = planned.base_std
    scales = plan.scales(OptimizerFamily.ADAMW)  # their std is the same for all families
    found: list[tuple[list[str], float | None]] = []
    for group in groups.values():
        names, squares = [*group], [std**2 for std in group.values() if std is not None]
        target = math.sqrt(sum(squares) / len(squares)) * scales[names[0]].std if squares else None
        found.append((names, target))
    return found
