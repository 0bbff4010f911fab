"""Preserve the state of a module while something is passed through it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mlu_lightning.utilities.checksums import checksums


class ParametersChangedError(Exception):
    """A forward pass has changed parameters, which nobody has kept."""


@contextmanager
def preserve_state(
    module: nn.Module, restore_parameters: bool = False, kept: KeptValues | None = None
) -> Iterator[None]:
    """Restore random state, training modes, buffers and attributes of a module and its submodules afterwards.

    Tensors, generators, lists, dicts and sets among attributes get their content back; other objects keep their
    changes. Parameters are not copied, which would be a second model in memory: a pass that changes them is an error,
    unless ``restore_parameters`` asks for the copy, or ``kept`` copies those that are changed.
    """
    named = {} if restore_parameters else dict(module.named_parameters())
    seen = {id(parameter) for parameter in named.values()}
    parameters = {name: value.data for name, value in named.items()} if kept is None else {}
    before = checksums(parameters)
    with isolate_rng():
        restorers = [_remember_module(submodule, seen) for submodule in module.modules()]
        try:
            yield
        finally:
            with torch.no_grad():
                for restore in [*restorers, *([] if kept is None else [kept.put_back])]:
                    restore()
    after = checksums(parameters)
    if changed := [name for name in before if before[name] != after[name]]:
        raise ParametersChangedError(
            f"{type(module).__name__} changes its parameters {', '.join(changed)} in a forward pass, so looking at it would "
            "change its training. Change them in a hook, such as on_train_batch_end, or leave them alone in "
            "validation_step, which takes a probe from validation data, or one that is given with probe=..."
        )


class KeptValues:
    """Copies of what tensors hold, made when an operation is about to write there, or to what they share memory with."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        pairs = ((tensor, tensor.data) for tensor in tensors if not tensor.is_meta)
        self._tensors = [(tensor, data) for tensor, data in pairs if type(data) is Tensor]
        self._untouched = {data.untyped_storage()._cdata for _, data in self._tensors}
        self._copies: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []

    def keep(self, operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Copy what an operation that torch dispatches will change."""
        for tensor in _written(operation._schema.arguments, args, kwargs):
            storage = tensor.untyped_storage()
            if storage._cdata in self._untouched:
                self._untouched.remove(storage._cdata)
                self._copies.append((storage, storage.clone()))  # type: ignore[no-untyped-call]  # as of torch

    def put_back(self) -> None:
        """Let tensors hold what they have held."""
        for storage, before in self._copies:
            storage.copy_(before)
        for tensor, data in self._tensors:
            if tensor.data_ptr() != data.data_ptr():  # given other data
                tensor.data = data


def _written(arguments: Iterable[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    for place, argument in enumerate(arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            leaves = tree_leaves(args[place] if place < len(args) else kwargs.get(argument.name))
            yield from (leaf for leaf in leaves if isinstance(leaf, Tensor))


_INTERNAL = frozenset(vars(nn.Module())) - {"training"}


def _remember_module(module: nn.Module, seen: set[int]) -> Callable[[], None]:
    """What puts a module's buffers and attributes back, and parameters that are not among ``seen``."""
    attributes = {name: value for name, value in vars(module).items() if name not in _INTERNAL}
    buffers = dict(module._buffers)
    contents = [
        restore
        for value in (*module._parameters.values(), *buffers.values(), *attributes.values())
        if not isinstance(value, (str, int, float, type(None)))  # as most attributes are
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
    if isinstance(value, (Tensor, torch.Generator, random.Random, np.random.Generator, list, deque, dict, set)):
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
