"""Write out functions that add a product, a mean or a part in one step, and changes of views in place, as plain sums.

Autograd keeps one node for each of these, behind which the sum cannot be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["WrittenOut"]


class WrittenOut(TorchFunctionMode):
    """Runs composed functions of a tensor that has a gradient as the sums that they stand for.

    >>> with WrittenOut():
    ...     torch.addcmul(torch.ones(1, requires_grad=True) * 2, torch.ones(1), torch.ones(1)).grad_fn.name()
    'AddBackward0'
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given, name = kwargs or {}, getattr(func, "__name__", "")
        first = args[0] if args else given.get("input")
        if not isinstance(first, Tensor) or not first.requires_grad or isinstance(first, nn.Parameter):
            return func(*args, **given)
        if name == "__setitem__" and isinstance(args[2], Tensor) and _is_that_part(args[2], first[args[1]]):
            return None  # x[i] += y has changed that part already
        plain = name if name in _SUMS else _IN_PLACE.get(name)
        if plain is None or (plain in _IN_ONE_NODE and (plain == name or not first._is_view())):
            return func(*args, **given)
        out = given.pop("out", None)
        made = _SUMS[plain](first, *(args[1:] if args else ()), **{k: v for k, v in given.items() if k != "input"})
        if plain == name and out is None:
            return made
        return (first if out is None else out).copy_(made)


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


_IN_ONE_NODE = frozenset({"add", "sub"})
"""Functions that autograd shows as they are, but for those that change a view in place."""
_SUMS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _mm),
    "addbmm": _addbmm,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "lerp": _lerp,
    "rsub": _rsub,
    "index_add": _index_add,
    "scatter_add": _scatter_add,
    "index_put": _index_put,
    "add": torch.add,
    "sub": torch.sub,
}
_IN_PLACE = {f"{name}_": name for name in _SUMS if name != "rsub"} | {"__iadd__": "add", "__isub__": "sub"}
"""Functions by the names of those that change a tensor in place."""
