"""Find submodules that are copies of others, as a teacher is of its student: the same weights under other names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

import torch
from torch import nn

from mlu_lightning.utilities.names import planned_parameters


def find_copies(module: nn.Module, unreached: Collection[str]) -> dict[str, str]:
    """Find submodules of which no loss reaches a parameter, and that hold the values of another one, which comes second."""
    parameters = planned_parameters(module)
    if not unreached or any(parameter.is_meta for parameter in parameters.values()):
        return {}
    inside: dict[str, dict[str, nn.Parameter]] = {}  # submodules, outer ones first, with their parameters
    for name, parameter in parameters.items():
        steps = name.split(".")
        for end in range(1, len(steps)):
            inside.setdefault(".".join(steps[:end]), {})[".".join(steps[end:])] = parameter
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, own in inside.items():
        alike[_shapes(own)].append(name)
    found: dict[str, str] = {}
    for copy, own in inside.items():
        within = any(copy.startswith(f"{outer}.") for outer in found)
        if within or any(f"{copy}.{rest}" not in unreached for rest in own):
            continue
        reached = (name for name in alike[_shapes(own)] if any(f"{name}.{rest}" not in unreached for rest in own))
        if original := next((name for name in reached if _are_equal(own, inside[name])), None):
            found[copy] = original
    return found


def _shapes(own: Mapping[str, nn.Parameter]) -> tuple[object, ...]:
    return tuple((rest, parameter.shape) for rest, parameter in own.items())


def _are_equal(one: Mapping[str, nn.Parameter], other: Mapping[str, nn.Parameter]) -> bool:
    """Whether two submodules hold the same values, not all of which are numbers that any module begins with."""
    drawn = any(p.numel() > 1 and bool((p != p.flatten()[0]).any()) for p in one.values())
    return drawn and all(torch.equal(parameter, other[rest]) for rest, parameter in one.items())
