"""Entries of plans from the ratios that a test is about."""

from fractions import Fraction
from typing import Any

from mlu_lightning.planning import ParameterPlan
from mlu_lightning.table import Ratios, Role


def entry(role: Role, shape: tuple[int, ...], ratios: Any = None, *, fans: Any = None, **more: Any) -> ParameterPlan:
    """A parameter of these ratios to its base, which may have fractions of units."""
    ratios = ratios or Ratios()
    inputs, outputs = fans or (None, None)
    depth, base_depth = _pair(None, ratios.depth)
    (inputs, base_inputs), (outputs, base_outputs) = _pair(inputs, ratios.inputs), _pair(outputs, ratios.outputs)
    more |= {"depth": depth, "base_depth": base_depth, "base_fans": (base_inputs, base_outputs)}
    return ParameterPlan(role, shape, fans=(inputs, outputs), **more)


def _pair(count: int | None, ratio: float) -> tuple[int, Any]:
    return Fraction(ratio).as_integer_ratio() if count is None else (count, count / ratio)
