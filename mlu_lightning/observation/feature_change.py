"""How far the features of a model have moved: pre-activations of every branch, streams, and outputs.

MLU means that each of these moves by Θ(1) in every step, in every block and at every shape (theory.md, section 1).
"""

from __future__ import annotations

import math
from collections import defaultdict

from torch import Tensor

from mlu_lightning.discovery.structure import BranchKind
from mlu_lightning.observation.locations import FeatureName, StreamName
from mlu_lightning.observation.probe import Observation

__all__ = ["feature_updates", "rms_change"]


def feature_updates(before: Observation, after: Observation) -> dict[str, float]:
    """Measure how far what was observed has moved.

    Args:
        before: Observation [rows, dimension] by location, as :func:`mlu_lightning.observation.observe` makes it.
        after: Another one of the same batch. What is in one of them only is left out, as is what has another number of
            rows or columns.

    Returns:
        Root mean squares of the differences: ``"attention/<branch>"``, ``"mlp/<branch>"`` and ``"convolution/<branch>"`` of
        pre-activations, each also under its kind alone for all branches of it, ``"stream/s=0.5"`` and ``"output"``.

    >>> import torch
    >>> before = {FeatureName("mlp", f"blocks.{i}"): torch.zeros(2, 3) for i in range(2)} | {StreamName(1): torch.zeros(1)}
    >>> after = {name: values + 1 for name, values in before.items()}
    >>> feature_updates(before, after)
    {'mlp/blocks.0': 1.0, 'mlp/blocks.1': 1.0, 'stream/s=1': 1.0, 'mlp': 1.0}
    """
    found: dict[str, float] = {}
    kinds: dict[BranchKind, list[float]] = defaultdict(list)
    for name, values in after.items():
        if name not in before or before[name].shape != values.shape:
            continue
        change = rms_change(before[name], values)
        found[f"stream/{name}" if isinstance(name, StreamName) and name.number == 0 else str(name)] = change
        if isinstance(name, FeatureName):
            kinds[name.kind].append(change)
    return found | {
        kind: math.sqrt(math.fsum(value**2 for value in values) / len(values)) for kind, values in kinds.items()
    }


def rms_change(before: Tensor, after: Tensor) -> float:
    """Root mean square of a difference, without entries that are -inf in both, as logits are of keys that cannot be seen.

    Args:
        before: Values of any shape.
        after: Values of the same shape; where any are not finite, the result is not.

    >>> import torch
    >>> rms_change(torch.tensor([1.0, -math.inf]), torch.tensor([3.0, -math.inf]))
    2.0
    """
    seen = ~(before.isneginf() & after.isneginf())
    return (after[seen].double() - before[seen].double()).square().mean().sqrt().item()
