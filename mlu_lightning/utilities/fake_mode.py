"""A fake tensor mode that caches results, for passes with many repeated operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_impls import has_meta, op_implementations_checks
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._pytree import tree_leaves

_DEVICE = torch.ops.prim.device.default


@dataclass(frozen=True)
class _Output:
    """What a fake tensor is made of, and which argument it is a view of, if of any."""

    viewed: int | None
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


_IN_PLACE: tuple[type | None, list[_Output]] = (None, [])  # of operations that return their first argument


class RememberingFakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Fake tensors whose results are cached by operation, numbers and layouts of tensors.

    This is a few times faster than torch's own cache, whose keys hold whatever could matter in another pass, and so is
    asking a kernel for tensors without memory at once, for what is new. What is not plainly a function of layouts is left
    to torch: known values, changes in place, other kinds of tensors.
    """

    _known: ClassVar[dict[tuple[Any, ...], tuple[type | None, list[_Output]]]] = {}  # of all modes, as torch's own

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.cache_enabled = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would wrap the method below, for twice the time, and nothing is compiled in this mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        # half of all calls: autograd asks for it with every operation
        if func is _DEVICE and not self.in_kernel_invocation:
            return args[0].fake_device
        key = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
        if not (_add_layouts(key, args) and (not given or _add_layouts(key, [*given, *given.values()]))):
            return super().__torch_dispatch__(func, types, args, given)
        known = self._known.get(tuple(key)) or self._computed(func, args, given)
        if known is not None:
            self._known[tuple(key)] = known
        else:
            result = super().__torch_dispatch__(func, types, args, given)
            known = _remembered(func, args, given, result)
            if known is not None:
                self._known[tuple(key)] = known
            return result
        sequence, outputs = known
        if known is _IN_PLACE:
            return args[0]  # whose version torch has counted already
        made = (self._made(output, args) for output in outputs)
        return next(made) if sequence is None else sequence(made)

    def _computed(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[type | None, list[_Output]] | None:
        """Ask the kernel for tensors without memory, as torch does after much that does not concern plain operations."""
        devices = {leaf.fake_device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, FakeTensor)}
        if len(devices) != 1 or "device" in kwargs or not _is_plain_operation(func):
            return None
        try:
            with in_kernel_invocation_manager(self):
                result = func(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None  # of which torch says what is wrong
        if func._schema.is_mutable:
            return _IN_PLACE if result is args[0] else None
        return _remembered(func, args, kwargs, result, devices.pop())

    def _made(self, output: _Output, args: Sequence[Any]) -> FakeTensor:
        if output.viewed is None:
            memory = torch.empty_strided(output.shape, output.stride, dtype=output.dtype, device="meta")
        else:
            memory = torch.empty(0, dtype=output.dtype, device="meta")
            memory.set_(args[output.viewed].untyped_storage(), output.offset, output.shape, output.stride)
        return FakeTensor(self, memory, output.device)


def _add_layouts(key: list[Any], values: Iterable[Any]) -> bool:
    """Add to a key what arguments are, with the layouts of tensors; false if a result could depend on more."""
    for value in values:
        if isinstance(value, Tensor):
            if not isinstance(value, FakeTensor) or not _is_plain(value):
                return False
            key += (value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
        elif isinstance(value, (list, tuple)):
            key.append(len(value))
            if not _add_layouts(key, value):
                return False
        elif type(value).__hash__ is None:
            return False
        else:
            key += (type(value), value)  # 1 and 1.0 are equal, and make tensors of different types
    return True


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) is FakeTensor and tensor.constant is None and _is_plain_layout(tensor)


def _is_plain_layout(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_conj() or tensor.is_neg())


@cache
def _is_plain_operation(func: Any) -> bool:
    """Whether a kernel alone makes what an operation returns, or changes in place, and not a rule of fake tensors for it."""
    if not isinstance(func, OpOverload) or func.namespace != "aten" or not has_meta(func):
        return False
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments]
    if any(written[1:]) or torch.Tag.inplace_view in func.tags:
        return False
    name: str = func.name()  # type: ignore[no-untyped-call]  # as of torch
    composed = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    return not composed and (func in _VIEWS or not any(applies(func) for applies, _ in op_implementations_checks))


_VIEWS = frozenset({torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default})  # the other way is for symbols


def _remembered(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, device: torch.device | None = None
) -> tuple[type | None, list[_Output]] | None:
    """How a result is made again: new tensors, or views of arguments; None if there is more to it."""
    results = result if isinstance(result, (tuple, list)) else [result]
    plain = _is_plain if device is None else _is_plain_layout
    if func._schema.is_mutable or not all(isinstance(each, Tensor) and plain(each) for each in results):
        return None
    viewed = {_memory(arg): number for number, arg in enumerate(args) if isinstance(arg, Tensor)}
    others = (value for value in (*args, *kwargs.values()) if isinstance(value, (tuple, list)))
    inner = {_memory(item) for value in others for item in value if isinstance(item, Tensor)}
    outputs = [
        _Output(viewed.get(_memory(r)), r.shape, r.stride(), r.storage_offset(), r.dtype, device or r.fake_device)
        for r in results
    ]
    new = [_memory(r) for r, output in zip(results, outputs, strict=True) if output.viewed is None]
    given = any(r is arg for r in results for arg in args)
    if given or inner & {*new} or len({*new}) < len(new) or any(o.offset for o in outputs if o.viewed is None):
        return None
    # named tuples are tuples for those who dispatch
    return (None if results is not result else list if isinstance(result, list) else tuple), outputs


def _memory(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
