"""Temporary changes of a fit, such as wrapped methods, which any later fit of the module can find and undo."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from types import MethodType
from typing import Any

from torch import nn

Undo = Callable[[], object]


class PassingChanges:
    """Changes that a callback undoes at the end of its fit, or another one before the module's next fit.

    Lightning does not tell a callback that a fit is over if another one raises an error first.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._undos: list[Undo] = []
        vars(module)[_NAME] = _Kept((*vars(module).get(_NAME, ()), self))

    def note(self, undo: Undo) -> None:
        """Note, before a change is made, what undoes all or a part of it, and can be called more than once."""
        self._undos.append(undo)

    def undo(self) -> None:
        """Undo the changes, the last first; those of which this fails stay noted."""
        with ExitStack() as stack:
            for undo in self._undos:
                stack.callback(self._undo, undo)
        others = _Kept(each for each in vars(self._module).get(_NAME, ()) if each is not self)
        if others:
            vars(self._module)[_NAME] = others
        else:
            vars(self._module).pop(_NAME, None)

    def _undo(self, undo: Undo) -> None:
        undo()
        self._undos.remove(undo)

    @staticmethod
    def undo_all(module: nn.Module) -> None:
        """Undo the changes of all fits of a module."""
        for changes in reversed(vars(module).get(_NAME, ())):
            if changes._module is module:
                changes.undo()


def wrap_method(module: nn.Module, name: str, around: Callable[..., Any], note: Callable[[Undo], object]) -> Undo:
    """Let a function be called instead of a method of an instance, not of its copies; note, and return, what undoes this."""
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
            if own is None:
                del vars(module)[name]
            else:
                vars(module)[name] = own

    note(restore)
    vars(module)[name] = wrapped
    return restore


_NAME = "_mlu_passing_changes"


class _Kept(tuple[PassingChanges, ...]):
    """Changes that a copy of their module does not have."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), ()
