"""What a plan is made from besides its module: the arguments that ``Plan.from_model`` and ``MLUCallback`` share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["ABSOLUTE", "ParameterizationName", "PlanArguments"]

ABSOLUTE = "absolute"
"""The base that says that none is meant; a path of that name is ``./absolute``."""

ParameterizationName = Literal["mlu", "completep", "mup", "sp"]


@dataclass(frozen=True)
class PlanArguments:
    """Keyword arguments of :meth:`mlu_lightning.Plan.from_model`, with its defaults; the base may be yet to be built."""

    base: Any = None
    overrides: Mapping[str, str] | None = None
    alpha: float = 1.0
    parameterization: ParameterizationName = "mlu"
    batch_ratio: float = 1.0
    token_ratio: float = 1.0
    tuned: Mapping[str, Mapping[str, float]] | str | None = None
