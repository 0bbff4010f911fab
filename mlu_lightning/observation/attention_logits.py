"""Some of the logits of an attention, read from what its softmax is given, or computed as a fused one does.

Logits are many, samples times heads times queries times keys, and with fused attention they do not even exist. So a few
rows of them are chosen first, and only these are looked at (theory.md, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["chosen_logits", "full_tensor", "spread"]


def chosen_logits(arguments: Mapping[str, Any], rows: int, columns: int) -> Tensor:
    """Choose rows of logits, evenly over samples, heads and queries, and of each the logits of some keys, in float32.

    The arguments are, by name, those of a softmax (``self`` [..., queries, keys], ``dim``), or of a fused attention
    (``query`` [..., queries, d_k], ``key``, a mask, ``is_causal`` and ``scale``, 1/sqrt(d_k) by default), whose logits are
    scale · q kᵀ plus the mask. Logits are -inf where a key cannot be seen: where a mask says so, or a logit is below -5000,
    as those are that something large was subtracted from.
    """
    if "query" in arguments:
        logits = _fused_logits(arguments, rows, columns)
    else:
        given = full_tensor(arguments["self"]).movedim(arguments["dim"], -1)
        at = _row_indices(given.shape[:-1], rows, given)
        logits = given[at][:, spread(given.shape[-1], columns).to(given.device)].float()
    return logits.masked_fill(logits < _NOT_SEEN, -math.inf)


def spread(size: int, count: int) -> Tensor:
    """Choose indices that lie evenly, but not at one distance, which might be that of one query in every head.

    The range is divided into ``count`` equal parts, in each of which one index is taken, at the fractional parts of
    multiples of the golden ratio; if there are no more than ``count``, all are taken.
    """
    if size <= count:
        return torch.arange(size, device="cpu")
    parts = torch.arange(count, device="cpu")
    within = parts.double() * (math.sqrt(5) - 1) / 2 % 1 * (size // count)
    return parts * size // count + within.long()


def full_tensor(values: Tensor) -> Tensor:
    """All of a tensor without its graph, also of a DTensor, of which each process has a part."""
    gather = getattr(values, "full_tensor", None)
    return (values if gather is None else gather()).detach()


_NOT_SEEN = -5000.0
"""Masks subtract 10,000 or more; positional biases, such as ALiBi's, reach -4,096 at 8,192 tokens."""


def _fused_logits(arguments: Mapping[str, Any], rows: int, columns: int) -> Tensor:
    query, key = full_tensor(arguments["query"]), full_tensor(arguments["key"])
    size = query.shape[-1]
    keys = spread(key.shape[-2], columns).to(query.device)
    at = _row_indices(query.shape[:-1], rows, query)
    *before, queries = at
    if query.ndim > 2:
        before[-1] = before[-1] // (query.shape[-3] // key.shape[-3])  # one key for a group of heads
    # the product in full precision, which autocast would not leave it in
    chosen_query, chosen_key = query[at].double(), key[(*(index[:, None] for index in before), keys)].double()
    scale = arguments.get("scale")
    logits = (chosen_query[:, None] * chosen_key).sum(-1) * (size**-0.5 if scale is None else scale)
    mask = next((arguments[name] for name in ("attn_mask", "attn_bias") if arguments.get(name) is not None), None)
    if mask is not None:
        of_mask = full_tensor(mask).expand(*query.shape[:-1], key.shape[-2])[at][:, keys]
        logits = logits.masked_fill(~of_mask, -math.inf) if mask.dtype == torch.bool else logits + of_mask
    if arguments.get("is_causal"):
        logits = logits.masked_fill(keys > queries[:, None], -math.inf)
    single: Tensor = logits.float()
    return single


def _row_indices(shape: torch.Size, rows: int, values: Tensor) -> tuple[Tensor, ...]:
    """Indices of chosen rows in every dimension."""
    return torch.unravel_index(spread(math.prod(shape), rows).to(values.device), shape)
