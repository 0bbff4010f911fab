"""Read pre-activations and attention logits out of the torch functions of a forward pass.

Of each branch a few rows of a few units or keys are kept, the same ones in every pass of the same shapes: root mean squares
of changes need no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mlu_lightning.discovery.structure import Tap
from mlu_lightning.observation.attention_logits import chosen_logits, rows_along, spread
from mlu_lightning.utilities.function_calls import CallPlace, Watch, tensors_in

__all__ = ["watch_features"]


def watch_features(taps: Iterable[Tap], keep: Callable[[Tap, Tensor], None]) -> Watch:
    """Make the callable that hands over pre-activations and logits [rows, units or keys], 32 x 256 at most, to ``keep``."""
    wanted = {CallPlace(tap.module, tap.function, tap.index or 0): tap for tap in taps if tap.function is not None}

    def watch(place: CallPlace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Any], None] | None:
        tap = wanted.get(place)
        if tap is None:
            return None
        if tap.reads == "logits":
            logits = chosen_logits(kwargs, _ROWS, _COLUMNS)
            if not logits.isneginf().all():  # of keys that cannot be seen
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
    rows = rows_along(values, axis)
    for dim, count in enumerate((_ROWS, _COLUMNS)):
        rows = rows.index_select(dim, spread(rows.shape[dim], count).to(rows.device))
    return _copy(rows)


def _copy(values: Tensor) -> Tensor:
    return values.to("cpu", torch.float32, copy=True)
