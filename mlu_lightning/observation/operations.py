"""Classify the operations that torch dispatches: views, norms, products with weights."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

VIEWS = frozenset(
    "view _unsafe_view reshape _reshape_alias t transpose permute expand squeeze unsqueeze slice select split "
    "split_with_sizes unbind unsafe_split unsafe_split_with_sizes chunk alias detach clone contiguous _to_copy lift_fresh "
    "lift_fresh_copy cat stack repeat repeat_interleave roll flip narrow as_strided constant_pad_nd unfold diagonal index "
    "index_select gather take_along_dim view_as_real view_as_complex real imag neg to movedim swapaxes tile "
    "pixel_shuffle pixel_unshuffle channel_shuffle im2col native_dropout".split()
)
"""Those whose results have entries of their operands, and no others but zeros."""

SELECTING = frozenset({"embedding", "index", "index_select", "gather", "take_along_dim"})
"""Those that choose from their first operand by the others."""

CREATED = frozenset("zeros_like ones_like full_like new_zeros new_ones new_full".split())
"""Those whose results do not depend on their operands."""

OVERWRITING = frozenset("fill zero copy normal uniform random".split())
"""Those in place after which nothing is left of what was there."""

NORMS = frozenset(
    "native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit cudnn_batch_norm "
    "_native_batch_norm_legit_no_training miopen_batch_norm _batch_norm_no_update _fused_rms_norm rms_norm "
    "_batch_norm_with_update".split()
)

NORMALIZING = frozenset(
    {"native_layer_norm", "native_group_norm", "_fused_rms_norm", "rsqrt", "linalg_vector_norm", "norm"}
)
"""Those that make a value's size their own in evaluation mode, or are a part of it."""

MATRIX_OPERANDS = {
    "mm": (0, 1, None),
    "bmm": (0, 1, None),
    "mv": (0, 1, None),
    "dot": (0, 1, None),
    "_grouped_mm": (0, 1, None),
    "addmm": (1, 2, 0),
    "baddbmm": (1, 2, 0),
    "addmv": (1, 2, 0),
    "linear": (0, 1, 2),
    "convolution": (0, 1, 2),
    "_convolution": (0, 1, 2),
}
"""Positions of both factors of a product, and of what is added to it."""

_ROWS = 8


@cache
def described(operation: Any) -> tuple[str, bool]:
    """Name of an operation without its namespace and what says that it is in place, and whether it changes an operand."""
    schema = getattr(operation, "_schema", None)
    if schema is None:  # of a higher order, such as flex_attention
        return str(operation), False
    return schema.name.rpartition("::")[2].removesuffix("_"), schema.is_mutable


def contraction(name: str, args: tuple[object, ...], first: Tensor, weight: Tensor) -> int:
    """How many products each entry of a result sums over."""
    if "convolution" not in name:
        return int(first.shape[-1])
    transposed, groups = args[6], args[8]
    assert isinstance(groups, int)
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    return math.prod(weight.shape) // outputs


def of_few_rows(operation: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A product of data with weights, of few rows, which are repeated: sizes do not depend on how many there are."""
    place, _, added = MATRIX_OPERANDS[name]
    rows = len(args[place])
    if rows <= _ROWS or (added is not None and args[added].ndim > 1):
        result: Tensor = operation(*args, **kwargs)
        return result
    few = args[place][[-(-number * rows // _ROWS) for number in range(_ROWS)]]
    result = operation(*args[:place], few, *args[place + 1 :], **kwargs)
    return result[torch.arange(rows, device=result.device) * _ROWS // rows]


def end_name(name: str) -> str:
    """Name of an operation where a chain of multiplications ends, the same for variants of one operation."""
    if name in NORMS:
        return "norm"
    if name.startswith("_scaled_dot_product") or name == "flex_attention":
        return "attention"
    return "product" if name in MATRIX_OPERANDS else name
