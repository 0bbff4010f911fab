"""Copies of a part of a module inside of it, as a teacher is one of its student: the same weights under other names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

import torch
from torch import nn

from mlu_lightning.utilities.names import planned_modules, planned_parameters

__all__ = ["find_copies"]


def find_copies(module: nn.Module, unreached: Collection[str]) -> dict[str, str]:
    """Find submodules of which no loss reaches a parameter, and that hold the values of another one, which comes second."""
    parameters = planned_parameters(module)
    if not unreached or any(parameter.is_meta for parameter in parameters.values()):
        return {}
    found: dict[str, str] = {}
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    names = [name for name, _ in planned_modules(module) if name]
    parts = {name: _inside(name, parameters) for name in names}
    for name, inside in parts.items():
        alike[tuple((rest, parameter.shape) for rest, parameter in inside.items())].append(name)
    for copy in names:
        if any(copy.startswith(f"{outer}.") for outer in found):
            continue
        inside = parts[copy]
        if not inside or any(f"{copy}.{rest}" not in unreached for rest in inside):
            continue
        for original in alike[tuple((rest, parameter.shape) for rest, parameter in inside.items())]:
            reached = any(f"{original}.{rest}" not in unreached for rest in inside)
            if reached and _are_equal(inside, parts[original]):
                found[copy] = original
                break
    return found


def _inside(name: str, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Parameters of a submodule, by their names inside of it."""
    start = f"{name}."
    return {own[len(start) :]: parameter for own, parameter in parameters.items() if own.startswith(start)}


def _are_equal(one: Mapping[str, nn.Parameter], other: Mapping[str, nn.Parameter]) -> bool:
    """Whether two submodules hold the same values, not all of which are numbers that any module begins with."""
    drawn = any(
        parameter.numel() > 1 and bool((parameter != parameter.flatten()[0]).any()) for parameter in one.values()
    )
    return drawn and all(torch.equal(parameter, other[rest]) for rest, parameter in one.items())
