"""What is at taps in a forward pass, read by hooks of the test's own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mlu_lightning import discover
from mlu_lightning.discovery.structure import Tap

Found = dict[tuple[str, int, int], Tensor]


def read(module: nn.Module, taps: tuple[Tap, ...], forward: Callable[[], object]) -> Found:
    """What is at each tap, by what it reads, number and position."""
    found: Found = {}
    handles = []
    for tap in taps:
        key = (tap.reads, tap.number, tap.position)

        def given(_: nn.Module, args: Any, kwargs: Any, tap: Tap = tap, key: tuple[str, int, int] = key) -> None:
            tensors = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)]
            found.setdefault(key, tensors[tap.index or 0].detach().clone())

        def returned(_: nn.Module, args: Any, out: Any, tap: Tap = tap, key: tuple[str, int, int] = key) -> None:
            value = out if tap.index is None else list(out.values() if isinstance(out, dict) else out)[tap.index]
            found.setdefault(key, value.detach().clone())

        target = module.get_submodule(tap.module)
        if tap.where == "input":
            handles.append(target.register_forward_pre_hook(given, prepend=True, with_kwargs=True))
        else:
            handles.append(target.register_forward_hook(returned))
    with torch.no_grad():
        forward()
    for handle in handles:
        handle.remove()
    return found


def streams(found: Found, number: int = 0) -> list[Tensor]:
    """What was read of a stream, by position."""
    return [value for (reads, n, _), value in sorted(found.items()) if (reads, n) == ("stream", number)]


def modules(taps: tuple[Tap, ...]) -> list[str]:
    """Modules that taps read, and what of them."""
    return [str(tap).partition(": ")[2] for tap in taps]


def printed(module: nn.Module, example: Any) -> list[str]:
    """Taps of a module as they are printed."""
    return [str(tap) for tap in discover(module, example).taps]
