"""Write out fused additions as sums, and changes of views in place, so that autograd shows them.

Autograd keeps one node for each of these, behind which the sum cannot be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class WrittenOut(TorchFunctionMode):
    """Writes out composed functions of tensors with gradients as sums, and changes of views as copies of what is made."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, name = dict(kwargs or {}), getattr(func, "__name__", "")
        first = args[0] if args else given.get("input")
        if name in _OF_LISTS and isinstance(first, (list, tuple)):
            others = args[1] if isinstance(args[1], (list, tuple)) else [args[1]] * len(first)
            return [_OF_LISTS[name](one, other, **given) for one, other in zip(first, others, strict=True)]
        if not isinstance(first, Tensor) or isinstance(first, nn.Parameter):
            return func(*args, **given)
        with torch._C.DisableTorchFunction():  # or every attribute goes through all modes around this one
            has_gradient, is_view = first.requires_grad, first._is_view()
        if not has_gradient:
            return func(*args, **given)
        if name == "__setitem__" and isinstance(args[2], Tensor) and _is_that_part(args[2], first[args[1]]):
            return None  # x[i] += y has changed that part already
        if given.get("inplace") and is_view:
            return _overwritten(first, func(*args, **{**given, "inplace": False}))
        plain = _plain_name(name)
        written_out = _SUMS.get(plain)
        if written_out is None and is_view and plain != name:
            written_out = getattr(Tensor, plain, None) or getattr(F, plain, None)
        if written_out is None:
            return func(*args, **given)
        out = given.pop("out", first if plain != name else None)
        made = written_out(first, *args[1:], **{key: value for key, value in given.items() if key != "input"})
        return made if out is None else _overwritten(out, made)


def _plain_name(name: str) -> str:
    """Name of the function that makes a new tensor, of one that changes its first in place."""
    if name in _OPERATORS:
        return _OPERATORS[name]
    is_in_place = name.endswith("_") and not name.startswith("_") and name not in _NOT_COMPUTED
    return name[:-1] if is_in_place else name


def _overwritten(out: Tensor, made: Tensor) -> Tensor:
    """A tensor with other entries; all of a tensor that it is a view of is seen to be new."""
    base = out._base
    if base is not None and base.numel() == out.numel() and base.is_contiguous() and out.is_contiguous():
        base.copy_(made.reshape(base.shape))
    else:
        out.copy_(made)
    return out


def _is_that_part(value: Tensor, part: Tensor) -> bool:
    """Whether a value is the part of a tensor itself that it is to be written to."""
    layouts = ((x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()) for x in (value, part))
    return value._is_view() and next(layouts) == next(layouts)


def _scaled(value: Any, factor: Any) -> Any:
    return value if isinstance(factor, (int, float)) and factor == 1 else value * factor


def _mm(base: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    return _scaled(base, beta) + _scaled(first @ second, alpha)


def _addbmm(base: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    return _scaled(base, beta) + _scaled((first @ second).sum(0), alpha)


def _addcmul(base: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Any:
    return base + _scaled(tensor1 * tensor2, value)


def _addcdiv(base: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Any:
    return base + _scaled(tensor1 / tensor2, value)


def _lerp(start: Tensor, end: Tensor, weight: Any) -> Any:
    return start * (1 - weight) + end * weight


def _rsub(value: Tensor, other: Any, *, alpha: float = 1) -> Any:
    return _scaled(torch.neg(value), alpha) + other


def _index_add(base: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Any:
    return base + torch.zeros_like(base).index_add(dim, index, _scaled(source, alpha))


def _scatter_add(base: Tensor, dim: int, index: Tensor, src: Tensor) -> Any:
    return base + torch.zeros_like(base).scatter_add(dim, index, src)


def _index_put(base: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Any:
    if not accumulate:
        return base.index_put(indices, values)
    return base + torch.zeros_like(base).index_put(indices, values, accumulate=True)


_OF_LISTS: dict[str, Callable[..., Any]] = {
    f"_foreach_{name}": getattr(torch.Tensor, name) for name in ("add", "add_", "sub", "sub_", "mul", "mul_")
}
_OPERATORS = {"__iadd__": "add", "__isub__": "sub", "__imul__": "mul", "__itruediv__": "div"}
_NOT_COMPUTED = frozenset(
    "copy_ fill_ zero_ detach_ requires_grad_ resize_ set_ squeeze_ unsqueeze_ transpose_ t_ swapaxes_ swapdims_ "
    "as_strided_ bernoulli_ normal_ uniform_".split()
)
"""Functions in place that compute nothing of the entries that were there."""
_SUMS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _mm),
    **{f.__name__[1:]: f for f in (_addbmm, _addcmul, _addcdiv, _lerp, _rsub, _index_add, _scatter_add, _index_put)},
}
