"""Watch the torch functions of a forward pass, identified by submodule, name and number of the call.

Functions are seen as Python calls them, in the same way with and without gradients, in training and in evaluation mode. An
attention may be part of a larger function, and is seen where torch dispatches it: as the softmax of its logits, or fused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mlu_lightning.utilities.names import planned_modules

ATTENTION_CALL = "attention"  # name under which the softmax of an attention, or a fused attention, is seen


class CallPlace(NamedTuple):
    """Which call of a torch function it is."""

    module: str  # innermost submodule that is being called, in its first call
    function: str  # such as ``"gelu"``
    number: int  # calls of that function before it in that call of the submodule, without those in inner submodules


Watch = Callable[[CallPlace, tuple[Any, ...], dict[str, Any]], Callable[[Any], None] | None]
"""What is called before each function, with its arguments, and may return what is to be called with its result."""


@contextmanager
def watched(module: nn.Module, watch: Watch) -> Iterator[None]:
    """Call ``watch`` before every torch function in the first call of any submodule; attentions get all arguments by name.

    Functions that no submodule calls are not seen.
    """
    calls = _Calls(watch)
    with ExitStack() as stack:
        for name, submodule in planned_modules(module):
            stack.callback(submodule.register_forward_pre_hook(calls.entering(name), prepend=True).remove)
            # always called, because an error that the code around it catches ends a call, too
            stack.callback(submodule.register_forward_hook(calls.leave, always_call=True).remove)
        stack.enter_context(_Functions(calls))
        yield


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Find the tensors in tuples, lists, mappings (such as Hugging Face outputs) and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (str, int, float, type(None))):
        return  # soon, because most arguments are of these
    elif isinstance(value, (tuple, list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        for field in fields(value):  # with slots there is no __dict__
            yield from tensors_in(getattr(value, field.name, None))


class _Calls:
    """Counts functions in the submodule that is being called."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.seen: set[str] = set()
        # name of each submodule that is being called, None in a further call of it, and its calls of functions so far
        self.within: list[tuple[str | None, Counter[str]]] = [(None, Counter())]

    def entering(self, name: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self.within.append((None if name in self.seen else name, Counter()))
            self.seen.add(name)

        return enter

    def leave(self, *_: Any) -> None:
        self.within.pop()

    def call(self, function: str, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[[], Any]) -> Any:
        module, counts = self.within[-1]
        if module is None:
            return run()
        after = self.watch(CallPlace(module, function, counts[function]), args, kwargs)
        counts[function] += 1
        result = run()
        if after is not None:
            after(result)
        return result


class _Functions(TorchFunctionMode):
    """Sees functions as Python calls them."""

    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("", "__get__", "__set__", "flex_attention"):  # attributes of tensors; an operator that is compiled
            return func(*args, **given)
        with _Attentions(self.calls) if "softmax" in name or "attention" in name else nullcontext():
            return self.calls.call(name, args, given, lambda: func(*args, **given))


class _Attentions(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Sees attentions as torch dispatches them inside of a function; everywhere it would make a pass slow."""

    def __init__(self, calls: _Calls) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, name = kwargs or {}, func._schema.name.removeprefix("aten::")
        if name not in _SOFTMAXES and not name.startswith("_scaled_dot_product_"):
            return func(*args, **given)
        names = (argument.name for argument in func._schema.arguments)
        # positional arguments come first, and there may be fewer than names
        arguments = {**dict(zip(names, args, strict=False)), **given}
        return self.calls.call(ATTENTION_CALL, (), arguments, lambda: func(*args, **given))


_SOFTMAXES = frozenset({"_softmax", "_safe_softmax"})
