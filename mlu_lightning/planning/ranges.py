"""Valid numbers and names of a plan, the same where it is made, edited and read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from mlu_lightning.discovery.structure import Structure
from mlu_lightning.planning.entries import BranchPlan, Multiplier, ParameterPlan, StreamPlan

_Part = ParameterPlan | BranchPlan | StreamPlan | Multiplier

LARGEST = 1e20  # of ratios and factors, so that no product of them overflows
_COUNTED = ("depth", "embedding", "hidden", "head_dim", "fans", "active", "uses")
_FROM_ONE = frozenset({*_COUNTED, *(f"base_{key}" for key in _COUNTED), "period"})
"""Whole numbers that count something; others are from 0 on, but for the axis of a tap."""


def smallest_integer(key: str) -> int:
    """The smallest whole number that a field can have."""
    return -1 if key == "axis" else int(key in _FROM_ONE)


def in_range(key: str, number: float) -> bool:
    """Whether a field can have a number that is not whole."""
    return 0 <= number < math.inf if key == "base_std" else 1 / LARGEST <= number <= LARGEST


def range_of(key: str) -> str:
    """Say what such a field can have."""
    return "a number from 0 on" if key == "base_std" else f"a number from {1 / LARGEST:g} to {LARGEST:g}"


def as_number(key: str, given: Any) -> float:
    """A number that was given as one, or as a text of one."""
    try:
        return float(given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key} is {given!r:.80}, and it has to be {range_of(key)}.") from error


def check_module(structure: Structure, module: nn.Module) -> None:
    """Refuse a module of which something has no units, or that has a constant which is no number."""
    sizes = {f"stream {number}": stream.embedding for number, stream in enumerate(structure.streams)}
    sizes |= {branch.name: branch.hidden for branch in structure.branches}
    sizes |= {name: min(facts.fan_in, facts.fan_out) for name, facts in structure.parameters.items()}
    if empty := [name for name, size in sizes.items() if size < 1]:
        raise ValueError(
            f"{', '.join(empty[:8])} of {type(module).__name__} {'has' if len(empty) == 1 else 'have'} no units, and a "
            "width has to be 1 or more. Build the module and its base with other sizes."
        )
    constants = (*module.named_buffers(), *((name, p) for name, p in module.named_parameters() if not p.requires_grad))
    for name, value in constants:
        if value.numel() == 1 and not value.is_meta and bool(value.isnan().any()):
            raise ValueError(
                f"{name} of {type(module).__name__} is not a number (NaN), and what it multiplies would not be one either. "
                "Give it a value before the module is planned."
            )


def check_parts(
    parameters: Mapping[str, ParameterPlan],
    branches: Iterable[BranchPlan],
    streams: Iterable[StreamPlan],
    multipliers: Iterable[Multiplier],
) -> None:
    """Refuse numbers and names that could not be read from a file, and multipliers that would act twice."""
    named: list[tuple[str, _Part]] = [*parameters.items(), *((branch.name, branch) for branch in branches)]
    for name, _ in named:
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise ValueError(f"The name {name[:80]!r} has half of a character, which no file can hold. Rename it.")
    named += [(f"multiplier of {multiplier.name}", multiplier) for multiplier in multipliers]
    named += [(f"stream {number}", stream) for number, stream in enumerate(streams)]
    for name, entry in named:
        for key, number in _numbers(entry):
            whole = isinstance(number, int)
            if not (number >= smallest_integer(key) if whole else in_range(key, number)):
                what = f"a whole number from {smallest_integer(key)} on" if whole else range_of(key)
                raise ValueError(f"{name[:80]} has {key} = {number}, and it should be {what}.")
    taken: set[tuple[str, str, object]] = set()
    for multiplier in multipliers:
        which = f"The multiplier of the {multiplier.kind} {multiplier.name[:80]!r}"
        if len({*multiplier.folds}) < len(multiplier.folds):
            raise ValueError(f"{which} folds twice into one parameter. Name it once.")
        places: list[object] = [place for place in (multiplier.site, *multiplier.folds) if place is not None]
        own = {(multiplier.kind, multiplier.name, place) for place in places or [None]}
        if own & taken:
            raise ValueError(f"{which} is there twice. Leave one out.")
        taken |= own


def check_factors(factors: Mapping[Multiplier, float]) -> None:
    """Refuse factors in the forward pass that are too large, or too small, as products of others may be."""
    for multiplier, factor in factors.items():
        if not in_range("value", factor):
            raise ValueError(
                f"The {multiplier.kind} {multiplier.name[:80]} would be multiplied by {factor:g}, with alpha and tuned "
                f"factors, and that has to be {range_of('value')}."
            )


def _numbers(entry: _Part) -> Iterator[tuple[str, Any]]:
    for field in fields(entry):
        value = getattr(entry, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)):
                yield field.name, number
