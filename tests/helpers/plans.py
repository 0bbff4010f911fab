"""Entries of plans from the ratios that a test is about."""

from fractions import Fraction
from typing import Any

from mlu_lightning.planning import ParameterPlan
from mlu_lightning.table import Ratios, Role


def entry(
    role: Role,
    shape: tuple[int, ...],
    ratios: Ratios | None = None,
    *,
    base_shape: tuple[int, ...] | None = None,
    fans: tuple[int, int] | None = None,
    **more: Any,
) -> ParameterPlan:
    """A parameter of these ratios to its base, which may have fractions of units."""
    ratios = ratios or Ratios()
    inputs, outputs = fans or (None, None)
    depth, base_depth = _pair(None, ratios.depth)
    inputs, base_inputs = _pair(inputs, ratios.inputs)
    outputs, base_outputs = _pair(outputs, ratios.outputs)
    return ParameterPlan(
        role,
        shape,
        fans=(inputs, outputs),
        base_fans=(base_inputs, base_outputs),
        base_shape=base_shape,
        depth=depth,
        base_depth=base_depth,
        **more,
    )


def _pair(count: int | None, ratio: float) -> tuple[int, Any]:
    if count is None:
        return Fraction(ratio).as_integer_ratio()
    return count, count / ratio
