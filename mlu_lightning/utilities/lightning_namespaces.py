"""Classes of the two packages that Lightning is published as, ``lightning.pytorch`` and ``pytorch_lightning``."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

_Class = TypeVar("_Class")


def of_both(cls: type[_Class]) -> tuple[type[_Class], ...]:
    """Return a class of Lightning with its twin in the other package, if that was imported."""
    names = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}
    package = ".".join(cls.__module__.split(".")[:2])
    twin = getattr(sys.modules.get(names[package] + cls.__module__.removeprefix(package)), cls.__name__, None)
    return (cls,) if twin is None else (cls, twin)


def is_hook_overridden(name: str, module: Any) -> bool:
    """Tell whether a LightningModule of either package has its own version of a hook."""
    parent = next(cls for cls in of_both(LightningModule) if isinstance(module, cls))
    return is_overridden(name, module, parent)
