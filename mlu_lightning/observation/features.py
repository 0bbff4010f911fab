"""Read pre-activations and attention logits out of the torch functions of a forward pass.

Of each branch a few rows of a few units or keys are kept, the same ones in every pass of the same shapes: root mean squares
of their changes need no more, and they fit into memory and checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mlu_lightning.discovery.structure import Tap
from mlu_lightning.observation.attention_logits import chosen_logits, full_tensor, spread
from mlu_lightning.utilities.function_calls import CallPlace, Watch, tensors_in

__all__ = ["watch_features"]


def watch_features(taps: Iterable[Tap], keep: Callable[[Tap, Tensor], None]) -> Watch:
    """Make the callable that hands over pre-activations and logits [rows, units or keys] to ``keep``.

    There are at most 32 rows of 256, in float32 on the CPU. Logits of keys that cannot be seen are -inf; where none can be,
    nothing is taken.
    """
    wanted = {CallPlace(tap.module, tap.function, tap.index or 0): tap for tap in taps if tap.function is not None}

    def watch(place: CallPlace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Any], None] | None:
        tap = wanted.get(place)
        if tap is None:
            return None
        if tap.reads == "logits":
            logits = chosen_logits(kwargs, _ROWS, _COLUMNS)
            if not logits.isneginf().all():
                keep(tap, _copy(logits))
            return None
        if tap.where == "output":
            return lambda output: keep(tap, _chosen_units(next(tensors_in(output)), tap.axis))
        given = next(tensors_in((args, kwargs)))
        if tap.function == "glu":  # whose second half enters the sigmoid
            given = given.chunk(2, kwargs.get("dim", args[1] if len(args) > 1 else -1))[1]
        keep(tap, _chosen_units(given, tap.axis))  # at once, because the function may change its input in place
        return None

    return watch


_ROWS, _COLUMNS = 32, 256


def _chosen_units(values: Tensor, axis: int) -> Tensor:
    values = full_tensor(values)
    rows = values.movedim(axis, -1).flatten(0, -2) if values.ndim > 1 else values[None]
    for dim, count in enumerate((_ROWS, _COLUMNS)):
        rows = rows.index_select(dim, spread(rows.shape[dim], count).to(rows.device))
    return _copy(rows)


def _copy(values: Tensor) -> Tensor:
    return values.to("cpu", torch.float32, copy=True)
