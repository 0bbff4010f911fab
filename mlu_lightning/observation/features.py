"""Read pre-activations and attention logits from the torch functions of a forward pass.

Of each branch a few rows of a few units or keys are kept, the same ones in every pass of the same shapes: root mean squares
of changes need no more, and with fused attention logits do not even exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mlu_lightning.discovery.structure import Tap
from mlu_lightning.utilities.function_calls import CallPlace, Watch, tensors_in


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


def chosen_logits(arguments: Mapping[str, Any], rows: int, columns: int) -> Tensor:
    """Choose rows of logits, evenly over samples, heads and queries, and some keys of each, in float32.

    Arguments are, by name, those of a softmax or of a fused attention. Logits are -inf where a key is masked or the
    logit is below -5000, as where a mask was added.
    """
    if "query" in arguments:
        logits = _fused_logits(arguments, rows, columns)
    else:
        given = full_tensor(arguments["self"]).movedim(arguments["dim"], -1)
        at = _row_indices(given.shape[:-1], rows, given)
        logits = given[at][:, spread(given.shape[-1], columns).to(given.device)].float()
    return logits.masked_fill(logits < _NOT_SEEN, -math.inf)


def spread(size: int, count: int) -> Tensor:
    """Choose one index in each of ``count`` equal parts, at fractional parts of multiples of the golden ratio.

    At one distance they might all be of one query in every head.
    """
    if size <= count:
        return torch.arange(size, device="cpu")
    parts = torch.arange(count, device="cpu")
    within = parts.double() * (math.sqrt(5) - 1) / 2 % 1 * (size // count)
    return parts * size // count + within.long()


def full_tensor(values: Tensor) -> Tensor:
    """All of a tensor without its graph, also of a DTensor, of which each process has a part."""
    return (values.full_tensor() if hasattr(values, "full_tensor") else values).detach()


def rows_along(values: Tensor, axis: int) -> Tensor:
    """All of a tensor as rows [positions, size of the axis]; a vector is one row."""
    values = full_tensor(values)
    return values.movedim(axis, -1).flatten(0, -2) if values.ndim > 1 else values[None]


_ROWS, _COLUMNS = 32, 256
_NOT_SEEN = -5000.0  # masks subtract 10,000 or more; positional biases, such as ALiBi's, reach -4,096 at 8,192 tokens


def _chosen_units(values: Tensor, axis: int) -> Tensor:
    rows = rows_along(values, axis)
    for dim, count in enumerate((_ROWS, _COLUMNS)):
        rows = rows.index_select(dim, spread(rows.shape[dim], count).to(rows.device))
    return _copy(rows)


def _copy(values: Tensor) -> Tensor:
    return values.to("cpu", torch.float32, copy=True)


def _fused_logits(arguments: Mapping[str, Any], rows: int, columns: int) -> Tensor:
    query, key = full_tensor(arguments["query"]), full_tensor(arguments["key"])
    keys = spread(key.shape[-2], columns).to(query.device)
    at = _row_indices(query.shape[:-1], rows, query)
    *before, queries = at
    if query.ndim > 2:
        before[-1] = before[-1] // (query.shape[-3] // key.shape[-3])  # one key for a group of heads
    # the product in full precision, which autocast would not leave it in
    chosen_query, chosen_key = query[at].double(), key[(*(index[:, None] for index in before), keys)].double()
    scale = arguments.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits: Tensor = (chosen_query[:, None] * chosen_key).sum(-1) * scale
    mask = next((arguments[name] for name in ("attn_mask", "attn_bias") if arguments.get(name) is not None), None)
    if mask is not None:
        of_mask = full_tensor(mask).expand(*query.shape[:-1], key.shape[-2])[at][:, keys]
        logits = logits.masked_fill(~of_mask, -math.inf) if mask.dtype == torch.bool else logits + of_mask
    if arguments.get("is_causal"):
        logits = logits.masked_fill(keys > queries[:, None], -math.inf)
    return logits.float()


def _row_indices(shape: torch.Size, rows: int, values: Tensor) -> tuple[Tensor, ...]:
    return torch.unravel_index(spread(math.prod(shape), rows).to(values.device), shape)
