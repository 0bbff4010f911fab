"""The arguments that ``Plan.from_model`` and ``MLUCallback`` share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal

from mlu_lightning.table import Parameterization

ABSOLUTE = "absolute"  # the base that says that none is meant; a path of that name is ``./absolute``

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


def require_base(base: Any, plan: type) -> None:
    """Refuse a base that is neither a plan nor the path of a file."""
    if not isinstance(base, (plan, str, PathLike)):
        raise TypeError(
            f"base is a {type(base).__name__}. It has to be a module at the base's shape, a plan or the path of one, or "
            f"{ABSOLUTE!r} for the paper's absolute form."
        )
    if isinstance(base, (str, PathLike)) and not os.path.isfile(base):
        raise FileNotFoundError(
            f"base is {os.fspath(base)!r}, and there is no file of that name. It has to be the path of a saved plan, a "
            f"module at the base's shape, or {ABSOLUTE!r} for the paper's absolute form."
        )


def check_parameterization(parameterization: Parameterization, alpha: float, absolute: bool) -> None:
    """Refuse what only MLU has, for others."""
    if parameterization != Parameterization.MLU and (absolute or alpha != 1.0):
        given = "base=None, or with a plan of a module without a base" if absolute else f"alpha={alpha:g}"
        raise ValueError(
            f"parameterization={parameterization.value!r} was given with {given}. The absolute form and the "
            "richness alpha are those of the MLU parameterization: give the others a base, and leave alpha at 1."
        )
