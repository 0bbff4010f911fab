"""Change a module as a whole: what interrupts a change lets it be undone or finished, at the latest at the next use.

Whatever interrupts them, they are undone or finished at once; if that is interrupted, too, whoever applies a plan next
does so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mlu_lightning.application.applied import Applied, residual_state, set_applied
from mlu_lightning.application.hooks import attach_hooks, detach_hooks
from mlu_lightning.utilities.names import original_module

Step = Callable[[], Callable[[], object]]  # computes something, and returns what writes it, which may be called twice


class Steps:
    """Steps that go on where they were, wherever they were interrupted, with one of them in memory."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self._steps = tuple(steps)
        # one value, because nothing comes between the two halves of its assignment
        self._at: tuple[int, Callable[[], object] | None] = 0, None

    @property
    def have_begun(self) -> bool:
        """Whether something may have been written."""
        return self._at != (0, None)

    def run(self, until: int | None = None) -> None:
        """Make the steps that are left, all or those before one."""
        with torch.no_grad():
            while self._at[0] < (len(self._steps) if until is None else until):
                index, write = self._at
                if write is None:
                    write = self._steps[index]()
                    self._at = index, write
                write()
                self._at = index + 1, None


def multiplication(tensor: Tensor, factor: float) -> Step:
    """Multiply a tensor where it is."""
    return lambda: partial(tensor.copy_, tensor * factor)


def change(module: nn.Module, after: Applied | None, steps: Iterable[Step] = (), attach: bool = True) -> None:
    """Replace the multipliers of a module, and change its weights; an error in between leaves it as it was.

    Once weights have changed, the change is finished and not undone, because undoing it would not be exact.
    """
    application = _Application(module, after, Steps(steps), attach)
    with as_a_whole(module, "plan", application.settle):
        application.begin()
        application.finish()


@contextmanager
def as_a_whole(module: nn.Module, what: str, settle: Callable[[], object]) -> Iterator[None]:
    """Make a change of one kind; if interrupted, ``settle`` undoes or finishes it, now or when the module is used next."""
    try:
        _mark(module, what, settle)
        yield
    except BaseException:
        settle()
        _unmark(module, what)
        raise
    _unmark(module, what)


def settle(module: nn.Module, what: str | None = None) -> None:
    """Undo or finish the changes of a module that were interrupted, all or those of one kind, or refuse the module."""
    module = original_module(module)
    for name, unfinished in reversed(_unfinished(module).items()):
        if what in (name, None):
            unfinished.settle()
            _unmark(module, name)


@contextmanager
def loading(module: nn.Module, ends: bool = True) -> Iterator[None]:
    """Refuse a module that gets the multipliers of a checkpoint, until it has its weights: at the end, or later."""
    before, name = residual_state(module), type(module).__name__
    try:
        _mark(module, "loading", partial(_refuse, f"The weights of a checkpoint were to be loaded into this {name}"))
        yield
    except BaseException:
        if residual_state(module) is before:
            end_loading(module)
        raise
    if ends or residual_state(module) is before:
        end_loading(module)


def end_loading(module: nn.Module) -> None:
    """Say that a module has the weights of the checkpoint."""
    _unmark(original_module(module), "loading")


class _Application:
    """Multipliers and weights that a module gets in the place of those that it has."""

    def __init__(self, module: nn.Module, after: Applied | None, steps: Steps, attach: bool) -> None:
        self._module, self._after, self._steps, self._attach = module, after, steps, attach
        self._before = residual_state(module)
        self._hooks: tuple[RemovableHandle, ...] = ()

    def begin(self) -> None:
        if self._after is not self._before:
            self._hooks = self._exchanged(self._after if self._attach else None)

    def finish(self) -> None:
        self._steps.run()
        if self._after is not self._before:
            set_applied(self._module, self._after and replace(self._after, hooks=self._hooks))

    def settle(self) -> None:
        """Finish what has changed weights; undo what has not."""
        if self._steps.have_begun:
            self.finish()
        elif self._after is not self._before:
            hooks = self._exchanged(self._before)
            set_applied(self._module, self._before and replace(self._before, hooks=hooks))

    def _exchanged(self, applied: Applied | None) -> tuple[RemovableHandle, ...]:
        detach_hooks(self._module, () if self._before is None else self._before.hooks)
        return () if applied is None else attach_hooks(self._module, applied.acting)


class _Unfinished:
    """What undoes or finishes changes of a module; those of a copy, which has other weights, cannot be."""

    def __init__(self, settle: Callable[[], object] | None = None) -> None:
        self.settle = settle or partial(_refuse, "A plan was being applied to the module that this is a copy of")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self), ()


_NAME = "_mlu_unfinished"


def _unfinished(module: nn.Module) -> dict[str, _Unfinished]:
    found: dict[str, _Unfinished] = vars(module).get(_NAME, {})
    return found


def _mark(module: nn.Module, what: str, settle: Callable[[], object]) -> None:
    vars(module)[_NAME] = {**_unfinished(module), what: _Unfinished(settle)}


def _unmark(module: nn.Module, what: str) -> None:
    rest = {name: unfinished for name, unfinished in _unfinished(module).items() if name != what}
    if rest:
        vars(module)[_NAME] = rest
    else:
        vars(module).pop(_NAME, None)


def _refuse(what: str) -> None:
    raise ValueError(f"{what}, which was interrupted: it is neither what it was nor what it should be. Build it anew.")
