"""How far the features of a model have moved: pre-activations of every branch, streams, and outputs.

MLU means that each of these moves by Θ(1) in every step, in every block and at every shape (theory.md, section 1).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

__all__ = ["feature_updates", "moved"]


def feature_updates(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Measure how far what was observed has moved, by the names of its locations.

    Args:
        before: an observation [rows, dimension] by name, as :func:`mlu_lightning.observation.probe.observe` makes it.
        after: another one of the same batch. What is in one of them only is left out, as are names whose number of rows
            or columns is not the same.

    Returns:
        Root mean squares of the differences: ``"attention/<branch>"``, ``"mlp/<branch>"`` and ``"convolution/<branch>"`` of
        pre-activations, each also under its kind alone for all branches of it, ``"stream/s=0.5"`` and ``"output"``.

    >>> import torch
    >>> before = {"mlp/blocks.0": torch.zeros(2, 3), "mlp/blocks.1": torch.zeros(2, 3), "s=1": torch.zeros(2, 4)}
    >>> after = {"mlp/blocks.0": torch.full((2, 3), 3.0), "mlp/blocks.1": torch.full((2, 3), 4.0), "s=1": torch.ones(2, 4)}
    >>> {name: round(value, 4) for name, value in feature_updates(before, after).items()}
    {'mlp/blocks.0': 3.0, 'mlp/blocks.1': 4.0, 'stream/s=1': 1.0, 'mlp': 3.5355}
    """
    found: dict[str, float] = {}
    kinds: dict[str, list[float]] = defaultdict(list)
    for name, values in after.items():
        if name not in before or before[name].shape != values.shape:
            continue
        kind, _, branch = name.partition("/")
        update = moved(before[name], values)
        if branch and not kind.startswith("stream"):
            kinds[kind].append(update)
            found[name] = update
        elif name.startswith("output"):
            found[name] = update
        else:
            found[name if kind.startswith("stream") else f"stream/{name}"] = update
    found.update(
        {kind: math.sqrt(math.fsum(value**2 for value in values) / len(values)) for kind, values in kinds.items()}
    )
    return found


def moved(before: Tensor, after: Tensor) -> float:
    """Root mean square of a difference, without entries that are -inf in both, as logits are of keys that cannot be seen.

    Args:
        before: values of any shape.
        after: of the same.

    Returns:
        What is not finite for values that are not.

    >>> import torch
    >>> moved(torch.tensor([1.0, -math.inf]), torch.tensor([3.0, -math.inf])), moved(torch.zeros(1), torch.ones(1) / 0)
    (2.0, inf)
    """
    seen = ~(before.isneginf() & after.isneginf())
    return (after[seen].double() - before[seen].double()).square().mean().sqrt().item()
