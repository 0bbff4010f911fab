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

__all__ = ["chosen_logits", "spread", "whole"]


def chosen_logits(arguments: Mapping[str, Any], rows: int, columns: int) -> Tensor:
    """Choose rows of logits, evenly over samples, heads and queries, and of each the logits of some keys.

    Args:
        arguments: by name, those of a softmax (``self`` [..., queries, keys], ``dim``), or of a fused attention
            (``query`` [..., queries, d_k], ``key``, a mask, ``is_causal`` and ``scale``, 1/sqrt(d_k) by default), whose
            logits are scale · q kᵀ plus the mask.
        rows: the most to choose.
        columns: the most to choose of each.

    Returns:
        [rows, columns] in float32, -inf where a key cannot be seen: where a mask says so, or a logit is below -5000, as
        those are that something large was subtracted from.

    >>> query = key = torch.eye(2)
    >>> chosen_logits({"query": query, "key": key, "is_causal": True, "scale": 3.0}, 2, 2)
    tensor([[3., -inf],
            [0., 3.]])
    """
    if "query" in arguments:
        logits = _fused(arguments, rows, columns)
    else:
        given = whole(arguments["self"]).movedim(arguments["dim"], -1)
        at = _at(given.shape[:-1], rows, given)
        logits = given[at][:, spread(given.shape[-1], columns).to(given.device)].float()
    return logits.masked_fill(logits < _NOT_SEEN, -math.inf)


def spread(size: int, count: int) -> Tensor:
    """Choose indices that lie evenly, but not at one distance, which might be that of one query in every head.

    The range is divided into ``count`` equal parts, in each of which one index is taken, at the fractional parts of
    multiples of the golden ratio.

    Args:
        size: of the range.
        count: of indices; where that is not less than ``size``, all are taken.

    Returns:
        Indices, ascending.

    >>> spread(3, 5), spread(100, 5)
    (tensor([0, 1, 2]), tensor([ 0, 32, 44, 77, 89]))
    """
    if size <= count:
        return torch.arange(size, device="cpu")
    parts = torch.arange(count, device="cpu")
    within = parts.double() * (math.sqrt(5) - 1) / 2 % 1 * (size // count)
    return parts * size // count + within.long()


def whole(values: Tensor) -> Tensor:
    """All of a tensor without its graph, also where each process has a part of it.

    Args:
        values: may be a DTensor, of tensor parallelism.

    >>> whole(torch.ones(1, requires_grad=True))
    tensor([1.])
    """
    full_tensor = getattr(values, "full_tensor", None)
    return (values if full_tensor is None else full_tensor()).detach()


_NOT_SEEN = -5000.0
"""Masks subtract 10,000 or more; positional biases, such as ALiBi's, reach -4,096 at 8,192 tokens."""


def _fused(arguments: Mapping[str, Any], rows: int, columns: int) -> Tensor:
    query, key = whole(arguments["query"]), whole(arguments["key"])
    size = query.shape[-1]
    keys = spread(key.shape[-2], columns).to(query.device)
    at = _at(query.shape[:-1], rows, query)
    *before, queries = at
    if query.ndim > 2:
        before[-1] = before[-1] // (query.shape[-3] // key.shape[-3])  # one key for a group of heads
    # the product in full precision, which autocast would not leave it in
    chosen_query, chosen_key = query[at].double(), key[(*(index[:, None] for index in before), keys)].double()
    scale = arguments.get("scale")
    logits = (chosen_query[:, None] * chosen_key).sum(-1) * (size**-0.5 if scale is None else scale)
    mask = next((arguments[name] for name in ("attn_mask", "attn_bias") if arguments.get(name) is not None), None)
    if mask is not None:
        of_mask = whole(mask).expand(*query.shape[:-1], key.shape[-2])[at][:, keys]
        logits = logits.masked_fill(~of_mask, -math.inf) if mask.dtype == torch.bool else logits + of_mask
    if arguments.get("is_causal"):
        logits = logits.masked_fill(keys > queries[:, None], -math.inf)
    single: Tensor = logits.float()
    return single


def _at(shape: torch.Size, rows: int, values: Tensor) -> tuple[Tensor, ...]:
    """Indices of chosen rows in every dimension."""
    return torch.unravel_index(spread(math.prod(shape), rows).to(values.device), shape)
