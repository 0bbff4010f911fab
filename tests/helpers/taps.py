"""What is at taps in a forward pass, read by hooks of the test's own, and what an architecture's forward pass is given."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from helpers.architectures import TOKENS, Architecture
from mlu_lightning import discover
from mlu_lightning.discovery.structure import Tap
from mlu_lightning.models import ResNet

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


def inputs(architecture: Architecture) -> Any:
    """Arguments of forward in double precision; the registry has batches for LightningModules."""
    example = architecture.example if isinstance(architecture.example, (dict, tuple)) else (TOKENS,)
    return tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, example)


def logits(module: nn.Module, example: Any) -> Any:
    """Output of forward; a batch of ``ResNet`` has targets, too."""
    example = example[:1] if isinstance(module, ResNet) else example
    output = module(**example) if isinstance(example, dict) else module(*example)
    return getattr(output, "logits", output)


def streams(found: Found, number: int = 0) -> list[Tensor]:
    return [value for (reads, n, _), value in sorted(found.items()) if (reads, n) == ("stream", number)]


def modules(taps: tuple[Tap, ...]) -> list[str]:
    return [str(tap).partition(": ")[2] for tap in taps]


def listed(module: nn.Module, example: Any) -> str:
    """Taps of a module with one stream and one readout: what each reads, after how many additions, and where."""
    taps = discover(module, example).taps
    assert {tap.number for tap in taps} == {0}
    return ", ".join(f"{tap.reads} {tap.position}: {place}" for tap, place in zip(taps, modules(taps), strict=True))
