"""Unwrap optimizers such as SAM, Lookahead and Fabric's, which leave the update to one or several inner optimizers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from mlu_lightning.utilities.lightning_namespaces import of_both


def updating(optimizer: Optimizer | LightningOptimizer) -> list[Optimizer]:
    """Find the optimizers that update the parameters of one: those that it holds, if they have all of them, else itself."""
    return _updating(optimizer, frozenset())


def parameters_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """Iterate over the parameters of all groups."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _updating(optimizer: Any, around: frozenset[int]) -> list[Optimizer]:
    if isinstance(optimizer, of_both(LightningOptimizer)):
        return _updating(optimizer.optimizer, around)
    sharding = sys.modules.get("torch.distributed.optim")  # not imported here: it is slow, and whoever uses it has
    if sharding is not None and isinstance(optimizer, sharding.ZeroRedundancyOptimizer):
        inner = getattr(optimizer, "optim", None)  # has the parameters of this process only
        if not isinstance(inner, Optimizer):
            raise ValueError(
                "A ZeroRedundancyOptimizer with overlap_with_ddp=True makes its optimizer during the first "
                "iterations, so it cannot be scaled. Leave overlap_with_ddp at False."
            )
        return [inner]
    around |= {id(optimizer)}
    held = [each for each in dict.fromkeys(_held(vars(optimizer).values())) if id(each) not in around]
    if held and {*map(id, parameters_of(optimizer))} <= {id(p) for each in held for p in parameters_of(each)}:
        return [*dict.fromkeys(part for each in held for part in _updating(each, around))]
    return [optimizer]


def _held(values: Iterable[Any]) -> Iterator[Optimizer]:
    """Optimizers among the attributes of another, also in its lists and dicts."""
    for value in values:
        among = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        yield from (each for each in among if isinstance(each, Optimizer))
