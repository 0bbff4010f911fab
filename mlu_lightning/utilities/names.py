"""Names of parameters and submodules in plans, without the parts that wrappers add."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mlu_lightning.utilities.lightning_private import set_up_by_fabric

_WRAPPED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What FSDP1 and activation checkpointing call the part that they wrap; keys of ``state_dict`` do not have it."""


def name_pattern(name: str) -> str:
    """Return a name without its places along the depth: ``blocks.*.mlp.out1.weight``."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def name_pattern_of_parts(name: str) -> str:
    """Return a name without any of its numbers, which blocks may carry inside of a part: ``encoder_layer_*.fc*.weight``."""
    return re.sub(r"\d+", "*", name)


def distance_along_depth(name: str, other: str) -> list[int]:
    """How far two names of one pattern are apart, by the numbers in them."""
    positions = ([int(number) for number in re.findall(r"\d+", each)] for each in (name, other))
    return [abs(a - b) for a, b in zip(*positions, strict=True)]


def original_module(module: nn.Module) -> nn.Module:
    """Return the module inside of what ``torch.compile``, Fabric and DDP put around a whole one."""
    inner = getattr(module, "_orig_mod", None) or set_up_by_fabric(module)
    if inner is None and isinstance(module, DistributedDataParallel):
        inner = module.module
    return original_module(inner) if isinstance(inner, nn.Module) else module


def planned_name(name: str) -> str:
    """Return the name that a parameter or submodule has in plans, from that in ``named_parameters()`` or the like."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def planned_parameters(module: nn.Module, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
    """Return the parameters of a module by their names in plans; shared ones have their first name only, or all of them."""
    named = original_module(module).named_parameters(remove_duplicate=remove_duplicate)
    return {planned_name(name): parameter for name, parameter in named}


def planned_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over a module and its submodules, without wrappers, with their names in plans."""
    for name, part in original_module(module).named_modules():
        if unwrapped(part) is part:
            yield planned_name(name), part


def planned_part(module: nn.Module, name: str) -> nn.Module:
    """Return the submodule that has a name in plans, inside of its wrappers."""
    return unwrapped(module.get_submodule(name))  # wrappers pass on attributes that they do not have


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside of wrappers around it."""
    inner = next((module._modules[name] for name in _WRAPPED if name in module._modules), None)
    return module if inner is None else unwrapped(inner)


def owner_of(name: str) -> str:
    """Return the name of the submodule that uses a parameter, which torch.nn.utils.parametrize may hold for it."""
    before, held, _ = f".{name}".partition(".parametrizations.")
    return before[1:] if held else name.rpartition(".")[0]


def common_module(names: Iterable[str]) -> str:
    """Return the longest name of a module that parameters share."""
    modules = [owner_of(name).split(".") for name in names]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*modules, strict=False))
    return ".".join(parts[0] for parts in shared)


def listed(names: Iterable[str], most: int = 5, separator: str = ", ") -> str:
    """Say names one after the other, but not too many of them: ``a, b and 2 more``."""
    every = [*names]
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return f"{separator.join(every[:most])}{more}"
