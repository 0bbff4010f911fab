"""What enters the nonlinearity of a branch: pre-activations of hidden units, and logits of attention.

Those of units are found in the graph of a forward pass and read like a stream, from what submodules are given and return.
Logits mostly are nobody's input or output, and with fused attention they do not even exist; they are taken from the
operations that a submodule dispatches, or computed from the queries and keys of a fused one (theory.md, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mlu_lightning.graph import NONLINEAR, NORMS, Op
from mlu_lightning.placement import BranchPlacement

__all__ = ["WatchedAttention", "attention_logits", "entering_nonlinearity"]


def entering_nonlinearity(placement: BranchPlacement) -> Op | None:
    """Find what enters the nonlinearity after a branch's first matrices: its pre-activations.

    Args:
        placement: of a branch without attention.

    Returns:
        The operation that makes them; the first matrix itself in a branch without nonlinearity. None for experts, whose
        tokens change their places from step to step.
    """
    if any(placement.is_expert(op) for op in placement.matrices):
        return None
    made: set[Op] = set()  # from the matrices that read the stream, and not through further ones
    for op in placement.region.ops:
        found = next((operand for operand in op.data if operand in made), None)
        if placement.graph.is_matrix(op):
            if found is None:
                made.add(op)
        elif found is not None:
            if op.name in NONLINEAR - _OF_NORMS:
                return found
            made.add(op)
    return placement.matrices[0] if placement.matrices else None


def attention_logits(arguments: Mapping[str, Any]) -> Tensor:
    """Compute the logits of a fused attention, c · q kᵀ plus its mask.

    Args:
        arguments: of ``scaled_dot_product_attention`` or of what it dispatches to, by name: query [..., length, d_k],
            key, and a mask, ``is_causal`` and a scale c, 1/sqrt(d_k) by default.

    Returns:
        [..., length, keys], -inf where a key cannot be seen.

    >>> query = key = torch.eye(2)
    >>> attention_logits({"query": query, "key": key, "is_causal": True, "scale": 3.0})
    tensor([[3., -inf],
            [0., 3.]])
    """
    query, key = arguments["query"], arguments["key"]
    scale = arguments.get("scale")
    if query.ndim > 2 and key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)  # one for a group of heads
    logits: Tensor = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    mask = next((arguments[name] for name in ("attn_mask", "attn_bias") if arguments.get(name) is not None), None)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    if arguments.get("is_causal"):
        unseen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(unseen, -math.inf)
    return logits


class WatchedAttention(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """While it is entered, hands over the logits of one attention; those of keys that cannot be seen are NaN."""

    def __init__(self, number: int, keep: Callable[[Tensor], None]) -> None:
        """Begin to count.

        Args:
            number: which attention is meant, from 0.
            keep: is given its logits.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._before = number
        self._keep = keep

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        fused = name.startswith("_scaled_dot_product_")
        if fused or name in _SOFTMAXES:
            if self._before == 0:
                names = (argument.name for argument in func._schema.arguments)
                # positional arguments come first, and there may be fewer than names
                arguments = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
                logits = attention_logits(arguments) if fused else args[0]
                # a weight is zero where a mask of whatever size was added
                self._keep(logits.masked_fill(logits.float().softmax(-1) == 0, math.nan))
            self._before -= 1
        return func(*args, **(kwargs or {}))


_OF_NORMS = NORMS | frozenset({"Rsqrt", "Sqrt", "Softmax", "SafeSoftmax", "LogSoftmax"})
_SOFTMAXES = frozenset({"_softmax", "_safe_softmax"})
