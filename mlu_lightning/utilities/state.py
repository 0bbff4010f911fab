"""Do something with a module and leave no trace in it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["undisturbed"]


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Put parameters, buffers, training modes and attributes of a module and its submodules back afterwards.

    Of attributes, tensors, random generators, lists, dicts and sets are restored with what they hold; objects of other
    classes keep what changed in them. Meanwhile there is a second copy of all tensors.

    Args:
        module: that something is done with.

    >>> module = nn.Linear(1, 1)
    >>> before = module.weight.item()
    >>> with undisturbed(module):
    ...     module.seen = [nn.init.zeros_(module.eval().weight)]
    >>> module.weight.item() == before, module.training, hasattr(module, "seen")
    (True, True, False)
    """
    seen: set[int] = set()
    restorers = [_remember_module(submodule, seen) for submodule in module.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            for restore in restorers:
                restore()


_INTERNAL = frozenset(vars(nn.Module())) - {"training"}


def _remember_module(module: nn.Module, seen: set[int]) -> Callable[[], None]:
    """What puts a module's parameters, buffers and attributes back."""
    attributes = {name: value for name, value in vars(module).items() if name not in _INTERNAL}
    buffers = dict(module._buffers)
    contents = [
        restore
        for value in (*module._parameters.values(), *buffers.values(), *attributes.values())
        for restore in _remember(value, seen)
    ]

    def restore() -> None:
        now = vars(module)
        for name in [name for name in now if name not in _INTERNAL and name not in attributes]:
            del now[name]
        now.update(attributes)
        module._buffers.clear()
        module._buffers.update(buffers)
        for put_back in contents:
            put_back()

    return restore


def _remember(value: Any, seen: set[int]) -> Iterator[Callable[[], Any]]:
    """What puts the content of a tensor, generator or container back, and of those in the container."""
    if isinstance(value, (str, int, float, type(None))):
        return  # first, because most attributes are of these
    if isinstance(value, _WITH_CONTENT):
        if id(value) in seen:
            return
        seen.add(id(value))
    if isinstance(value, Tensor):
        # through .data, because versions of tensors that are not watched are not counted either
        yield partial(value.data.copy_, value.detach().clone())
    elif isinstance(value, torch.Generator):
        yield partial(value.set_state, value.get_state())
    elif isinstance(value, random.Random):
        yield partial(value.setstate, value.getstate())
    elif isinstance(value, np.random.Generator):
        yield partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    elif isinstance(value, (list, deque)):
        yield partial(_restore_sequence, value, tuple(value))
        for item in value:
            yield from _remember(item, seen)
    elif isinstance(value, dict):
        yield partial(_restore_dict, value, dict(value))
        for item in value.values():
            yield from _remember(item, seen)
    elif isinstance(value, set):
        yield partial(_restore_set, value, set(value))


_WITH_CONTENT = (Tensor, torch.Generator, random.Random, np.random.Generator, list, deque, dict, set)


def _restore_sequence(sequence: list[Any] | deque[Any], before: tuple[Any, ...]) -> None:
    if len(sequence) != len(before) or any(now is not then for now, then in zip(sequence, before, strict=True)):
        sequence.clear()
        sequence.extend(before)


def _restore_dict(mapping: dict[Any, Any], before: dict[Any, Any]) -> None:
    if len(mapping) != len(before) or any(mapping.get(key, before) is not value for key, value in before.items()):
        # those of the class itself, because subclasses may refuse to be changed from outside
        dict.clear(mapping)
        dict.update(mapping, before)


def _restore_set(members: set[Any], before: set[Any]) -> None:
    if members != before:
        members.clear()
        members.update(before)
