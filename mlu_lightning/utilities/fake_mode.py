"""A fake tensor mode that caches results, for passes with many repeated operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses.fake_impls import op_implementations_checks
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

# which argument it is a view of, if of any; shape, stride, offset, dtype and device
_Output = tuple[int | None, tuple[int, ...], tuple[int, ...], int, torch.dtype, torch.device]


class RememberingFakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Fake tensors whose results are cached by operation, numbers and layouts of tensors.

    This is a few times faster than torch's own cache, whose keys hold whatever could matter in another pass, and so is
    asking a kernel for tensors without memory at once. What is not plainly a function of layouts is left to torch: known
    values, changes in place, other kinds of tensors.
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
        if func is torch.ops.prim.device.default and not self.in_kernel_invocation:
            return args[0].fake_device
        key = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
        if not (_add_layouts(key, args) and (not given or _add_layouts(key, [*given, *given.values()]))):
            return super().__torch_dispatch__(func, types, args, given)
        known = self._known.get(tuple(key)) or self._computed(func, args, given)
        result = None if known else super().__torch_dispatch__(func, types, args, given)
        known = known or _remembered(func, args, given, result)
        if known is None:
            return result
        self._known[tuple(key)] = known
        made = (self._made(*output, args) for output in known[1])
        return next(made) if known[0] is None else known[0](made)

    def _computed(self, func: Any, args: Any, kwargs: Any) -> tuple[type | None, list[_Output]] | None:
        """What the kernel makes of tensors without memory; None where torch knows more, or what is wrong."""
        devices = {arg.fake_device for arg in args if isinstance(arg, FakeTensor)}
        if len(devices) != 1 or "device" in kwargs or not _is_plain_operation(func):
            return None
        try:
            with in_kernel_invocation_manager(self):
                return _remembered(func, args, kwargs, func(*args, **kwargs), devices.pop())
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None

    def _made(
        self, viewed: Any, shape: Any, stride: Any, offset: int, dtype: Any, device: Any, args: Any
    ) -> FakeTensor:
        if viewed is None:
            memory = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        else:
            memory = torch.empty(0, dtype=dtype, device="meta")
            memory.set_(args[viewed].untyped_storage(), offset, shape, stride)
        return FakeTensor(self, memory, device)


@cache
def _is_plain_operation(func: Any) -> bool:
    """Whether a kernel of torch's makes all of what an operation returns, and not a rule of fake tensors for it."""
    composed = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    if composed or func.namespace != "aten" or func._schema.is_mutable:
        return False
    is_view = func._schema.name in ("aten::view", "aten::_unsafe_view")  # whose rule is for sizes that are symbols
    return is_view or not any(applies(func) for applies, _ in op_implementations_checks)


def _add_layouts(key: list[Any], values: Iterable[Any]) -> bool:
    """Add to a key what arguments are, with the layouts of tensors; false if a result could depend on more."""
    for value in values:
        if isinstance(value, Tensor):
            if type(value) is not FakeTensor or not _is_plain(value):
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


def _is_plain(tensor: Any) -> bool:
    is_known = getattr(tensor, "constant", None) is not None
    return not (is_known or tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg())


def _remembered(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, device: Any = None
) -> tuple[type | None, list[_Output]] | None:
    """How a result is made again: new tensors, or views of arguments; None if there is more to it."""
    results, kind = result if isinstance(result, (tuple, list)) else [result], Tensor if device else FakeTensor
    if func._schema.is_mutable or not all(isinstance(each, kind) and _is_plain(each) for each in results):
        return None
    viewed = {_memory(arg): number for number, arg in enumerate(args) if isinstance(arg, Tensor)}
    others = (value for value in (*args, *kwargs.values()) if isinstance(value, (tuple, list)))
    inner = {_memory(item) for value in others for item in value if isinstance(item, Tensor)}
    outputs = [
        (viewed.get(_memory(r)), r.shape, r.stride(), r.storage_offset(), r.dtype, device or r.fake_device)
        for r in results
    ]
    new = [_memory(r) for r, output in zip(results, outputs, strict=True) if output[0] is None]
    given = any(r is arg for r in results for arg in args)
    if given or inner & {*new} or len({*new}) < len(new) or any(o[3] for o in outputs if o[0] is None):
        return None
    # named tuples are tuples for those who dispatch
    return (None if results is not result else list if isinstance(result, list) else tuple), outputs


def _memory(tensor: Any) -> Any:
    return tensor.untyped_storage()._cdata
