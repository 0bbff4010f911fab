"""Methods of one instance of a module that do something more during a fit."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

__all__ = ["wrap_method"]


def wrap_method(module: nn.Module, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Let a function be called instead of a method of an instance, not of its copies; return what undoes this."""
    method: Callable[..., Any] = getattr(module, name)
    # LightningCLI, for one, keeps its configure_optimizers on the instance
    own: Callable[..., Any] | None = vars(module).get(name)
    active = True

    def bound(this: nn.Module) -> Callable[..., Any]:
        if this is module:
            return method
        if own is None:
            return MethodType(getattr(type(this), name), this)
        return MethodType(own.__func__, this) if isinstance(own, MethodType) else own

    @functools.wraps(method)
    def wrapper(this: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if active and this is module:
            return around(method, *args, **kwargs)
        return bound(this)(*args, **kwargs)

    vars(wrapper)["__wrapped__"] = inspect.unwrap(method)  # Lightning reads its arguments, also where it is compiled
    # as a method, which a deep copy binds to the copy, and a pickle looks up by its name
    wrapped = MethodType(wrapper, module)

    def restore() -> None:
        nonlocal active
        active = False  # what somebody else has wrapped since, only passes the call on
        if vars(module).get(name) is wrapped:
            del vars(module)[name]
            if own is not None:
                vars(module)[name] = own

    vars(module)[name] = wrapped
    return restore
