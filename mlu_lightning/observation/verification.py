"""Verify what a module computes against its plan: one pass of the module beside one of its base."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import nn

from mlu_lightning.observation.dataflow import ADDED, Addition, How, Use
from mlu_lightning.observation.expectations import FEW, Expectations, Interval
from mlu_lightning.observation.passes import Followed, UseKey, follow, roles_of_base
from mlu_lightning.planning import Plan
from mlu_lightning.planning.base import refuse_base
from mlu_lightning.utilities.names import distance_along_depth, name_pattern_of_parts, planned_parameters

EXACT = 2**0.25
"""Halfway to the smallest fault, a missing power of 1/2 at a ratio of 2: weights have their size exactly, up to rounding."""

CHANCE = 5.0
"""Standard errors that a root mean square may be off: of n numbers drawn at random it is known up to 1/sqrt(2n)."""


@dataclass(frozen=True)
class Deviation:
    """Something that a module computes otherwise than its plan says; ``expected`` and ``found`` are next to the base."""

    what: str
    expected: float
    found: float
    is_certain: bool  # whether chance does not explain it

    @property
    def factor(self) -> float:
        """How far it is off."""
        return _off(self.found, self.expected)

    def __str__(self) -> str:
        return f"{self.what} should be {self.expected:.3g} times the base's and is {self.found:.3g} times"


def verify(module: nn.Module, base: nn.Module, plan: Plan, example: Any = None) -> None:
    """Refuse a freshly initialized module that does not compute what its plan says.

    The module and its base are passed through once each, in evaluation mode. Every use of a parameter is followed until
    another operation than a multiplication, and its size c · std · sqrt(n), with the constants c of model and plan on the
    way and n numbers that each output sums over, has to have the table's factor next to the base (theory.md, section 3).
    So constants of the model's own, functions of weights, and multipliers that are missing or there twice are found. What
    residual branches add, also those that the plan does not know, and the stream along the depth are compared as well.

    Args:
        module: module with the plan's initial weights and multipliers, not trained yet.
        base: module at the base shape, as built.
        plan: plan of the module relative to that base.
        example: batch of ``training_step``, or arguments of ``forward``; by default ``example_input_array``.

    Raises:
        ValueError: if anything is off by a factor that chance does not explain. What chance might explain is warned of.

    >>> import torch
    >>> from mlu_lightning.models import ResNet
    >>> base, deeper = (ResNet(depth, hidden=16, embedding=8, inputs=3, outputs=2) for depth in (2, 8))
    >>> batch = torch.randn(4, 3), torch.randn(4, 2)
    >>> plan = Plan.from_model(deeper, batch, base=base)
    >>> try:
    ...     verify(deeper, base, plan, batch)  # without multipliers
    ... except ValueError as error:
    ...     print(str(error)[:89])
    ResNet does not compute what its plan says: blocks.0.write.weight and 7 more (branch_out)
    """
    if base is module:
        raise ValueError(
            "The base is the module itself, whose weights and multipliers are not the base's. Build the base apart, "
            "at its own shape."
        )
    refuse_base(base, module, example)
    refuse(deviations(module, base, plan, example), module, warnings.warn)


def refuse(found: Sequence[Deviation], module: nn.Module, warn: Callable[[str], object]) -> None:
    """Raise an error for deviations that are certain, or else warn of those that there are."""
    certain = [deviation for deviation in found if deviation.is_certain]
    text = (
        f"{type(module).__name__} does not compute what its plan says: {'; '.join(map(str, (certain or found)[:5]))}. Look "
        "for constants of the model's own that depend on its shape, for weights that enter through functions or were drawn "
        "anew, and for branches that the plan does not know, or that are multiplied twice or not at all. verify=False of "
        "MLUCallback trains it as it is."
    )
    if certain:
        raise ValueError(text)
    if found:
        warn(text)


def deviations(module: nn.Module, base: nn.Module, plan: Plan, example: Any = None) -> tuple[Deviation, ...]:
    """Find all that :func:`verify` refuses or warns of, the worst first.

    What acts in evaluation only, or in training only, which is what was planned, is no fault: certain is what both show.
    """
    if example is None:
        example = getattr(module, "example_input_array", None)
    found = _in_mode(module, base, plan, example, training=False)
    if not any(deviation.is_certain for deviation in found):
        return found
    too = {deviation.what for deviation in _in_mode(module, base, plan, example, training=True) if deviation.is_certain}
    both = tuple(deviation for deviation in found if deviation.what in too or not deviation.is_certain)
    return both if not too or any(deviation.is_certain for deviation in both) else found


def _in_mode(module: nn.Module, base: nn.Module, plan: Plan, example: Any, training: bool) -> tuple[Deviation, ...]:
    both = (
        follow(module, example, plan.roles, training),
        follow(base, example, roles_of_base(plan, base), training),
    )
    kept = (name for name, parameter in planned_parameters(module).items() if not parameter.requires_grad)
    expectations = Expectations(plan, frozenset(kept))
    found = [*_of_uses(expectations, *both), *_of_additions(expectations, *both)]
    return tuple(sorted(found, key=lambda deviation: -deviation.factor))


# uses of parameters


def _of_uses(expectations: Expectations, module: Followed, base: Followed) -> Iterator[Deviation]:
    entries = expectations.plan.parameters
    at_base: defaultdict[object, list[UseKey]] = defaultdict(list)
    for names, how in base.uses:
        at_base[_patterns(names), how].append((names, how))
    # names that differ in their place along the depth only, of which initialize() sets the scale together
    groups: defaultdict[object, list[tuple[UseKey, UseKey]]] = defaultdict(list)
    for names, how in module.uses:
        name = expectations.parameter(names, how)
        if name is None:
            continue
        alike = at_base.get((_patterns(names), how), [])
        shape = entries[name].base_shape
        others = [other for other in alike if shape in [base.shapes.get(each) for each in other[0]]]
        if others:
            counterpart = min(others, key=lambda other: distance_along_depth(names[0], other[0][0]))
            group = _patterns(names), how, entries[name].row, entries[name].ratios
            groups[group].append(((names, how), counterpart))
    for pairs in groups.values():
        members = [(key, module.uses[key], base.uses[other]) for key, other in pairs]
        yield from _of_group(expectations, members, module.sizes)


def _of_group(
    expectations: Expectations,
    members: Sequence[tuple[UseKey, Sequence[Use], Sequence[Use]]],
    sizes: Mapping[str, float],
) -> Iterator[Deviation]:
    (names, how), *_ = members[0]
    name = expectations.parameter(names, how)
    assert name is not None
    plain = all(use.plain for _, ours, theirs in members for use in (*ours, *theirs))
    scales = {key: expectations.scale(key[0][0], sizes) for key, *_ in members} if plain else {}
    if plain:
        members = [member for member in members if scales[member[0]] is not None]
    # numbers that are set exactly are known, and others up to chance: those drawn anew, and functions of parameters
    known = [scale for scale in scales.values() if scale is not None]
    chance = 0.0
    if not plain or not all(is_set for _, is_set in known):
        counts = [sum(ours[0].count for _, ours, _ in members)]
        if not plain:
            counts.append(sum(theirs[0].count for _, _, theirs in members))
        if min(counts) < FEW:
            return
        chance = CHANCE * math.sqrt(sum(1 / (2 * count) for count in counts))
    weight = expectations.std(name) * _rms([found for found, _ in known]) if plain else 1.0
    ratios: dict[str, float] = {}
    constants: dict[str, dict[str, float]] = {}
    for end in sorted({end for _, ours, _ in members for use in ours for end in use.constants}):
        both = [member for member in members if all(any(end in use.constants for use in uses) for uses in member[1:])]
        found = _rms([value for _, ours, _ in both for value in _sizes(ours, end, plain)])
        wanted = _rms([value for _, _, theirs in both for value in _sizes(theirs, end, plain)])
        if 0 < wanted < math.inf and found > 0:
            ratios[end] = found / wanted * weight
            constants[end] = {_label([key]): _constant(ours, theirs, end) for key, ours, theirs in both}
    if not ratios:
        return
    options = expectations.factors(name, how, {end for _, ours, _ in members for use in ours for end in use.constants})
    entry = expectations.plan.parameters[name]
    # the module's own constants may come after a sum
    possible = {"sum": (*options, *(option / entry.constant_ratio for option in options))}
    nearest = {
        end: min(possible.get(end, options), key=lambda option: _off(ratio, option)) for end, ratio in ratios.items()
    }
    offs = {end: _off(ratio, nearest[end]) for end, ratio in ratios.items()}
    added = [end for end in offs if end in ADDED]
    # a sum may be inside of a branch, before its multiplier
    at = (
        min(added, key=offs.__getitem__)
        if added and expectations.is_last(name, {*ratios})
        else max(offs, key=offs.__getitem__)
    )
    if offs[at] > EXACT * expectations.heads(name) * math.exp(chance):
        # what functions make of numbers of another form is not known
        certain = plain or how == "matrix"
        yield Deviation(f"{_label([key for key, *_ in members])} ({entry.row})", nearest[at], ratios[at], certain)
        return
    middle = median(constants[at].values())
    for label, constant in constants[at].items() if plain and middle > 0 else ():
        if _off(constant, middle) > EXACT:
            yield Deviation(f"{label} ({entry.row})", nearest[at], ratios[at] * constant / middle, True)


def _sizes(uses: Iterable[Use], end: str, plain: bool) -> list[float]:
    """Constants times sqrt(n), and of functions of parameters the size as well."""
    return [
        (1.0 if plain else use.size) * math.sqrt(use.inputs) * use.constants[end]
        for use in uses
        if end in use.constants
    ]


def _constant(ours: Iterable[Use], theirs: Iterable[Use], end: str) -> float:
    """What a use is multiplied by, next to the base."""
    constants = [_rms([use.constants[end] for use in uses if end in use.constants]) for uses in (ours, theirs)]
    return constants[0] / constants[1] if constants[1] else 0.0


# residual additions


def _of_additions(expectations: Expectations, module: Followed, base: Followed) -> Iterator[Deviation]:
    streams = expectations.plan.streams
    # what random weights make of one sample is n random numbers; there are two such matrices, in model and base
    width, base_width = min(s.embedding for s in streams), min(s.base_embedding for s in streams)
    chance = math.exp(CHANCE * math.sqrt(1 / width + 1 / base_width))
    at_base, by_branch = _by_branch(base.additions), _by_branch(module.additions)
    added_to = frozenset[str]().union(*by_branch)
    for patterns, of_base in at_base.items():
        known = expectations.added(frozenset(name for addition in of_base for name in addition.names))
        if known and not patterns & added_to:
            yield Deviation(f"what the residual branch of {_of(patterns)} adds", known.high, 0.0, True)
    for patterns, ours in by_branch.items():
        theirs = at_base.get(patterns)
        if not theirs or any(expectations.keeps(name) for addition in ours for name in addition.names):
            continue
        depth = len(ours) / len(theirs)
        known = expectations.added(frozenset(name for addition in ours for name in addition.names))
        added = known or Interval(1 / depth, 1 / depth)
        label = _of(patterns)
        what, adds = f"what the residual branch of {label} adds", _ratio(ours, theirs, _added)
        times, planned = _times(ours) / _times(theirs), expectations.times(name for a in ours for name in a.names)
        if known and times != planned:
            yield Deviation(f"how often the residual branch of {label} is applied", planned, times, True)
        elif known:
            yield from _off_chance(what, added, adds, chance)
        elif _off(adds, 1 / depth) > EXACT and _off(_ratio(ours, theirs, lambda a: a.constant), 1 / depth) > EXACT**2:
            yield Deviation(what, 1 / depth, adds, True)
        # what is added along the depth adds up at random at least, and all of it at most, but for the last
        least, most = added.low * depth, added.high * depth
        before = (len(ours) - 1) / len(ours), (len(theirs) - 1) / len(theirs)
        high = max(1, most, most / math.sqrt(depth)) * (before[0] / before[1] if before[1] else math.inf)
        stem = expectations.stems
        along = Interval(min(1, least, least / math.sqrt(depth)) * stem.low, high * stem.high)
        # after other branches of its block
        first = Interval(min(1, added.low) * stem.low, max(1, added.high) * stem.high)
        for place, interval in ((0, first), (-1, along)):
            ratio = _ratio([ours[place]], [theirs[place]], lambda addition: addition.stream)
            where = f"the stream before {label} ({'last' if place else 'first'})"
            yield from _off_chance(where, interval, ratio, chance)


def _off_chance(what: str, interval: Interval, ratio: float, chance: float) -> Iterator[Deviation]:
    """A deviation of what is random, and so never certain."""
    if 0 < ratio < math.inf:
        deviation = Deviation(what, interval.nearest(ratio), ratio, False)
        if deviation.factor > max(2, chance):
            yield deviation


def _added(addition: Addition) -> float:
    return addition.branch if addition.normalized or not addition.stream else addition.branch / addition.stream


def _ratio(ours: Sequence[Addition], theirs: Sequence[Addition], size: Callable[[Addition], float]) -> float:
    return _rms([size(addition) for addition in ours]) / (_rms([size(addition) for addition in theirs]) or math.inf)


def _times(additions: Sequence[Addition]) -> float:
    """How often each branch is applied."""
    return len(additions) / len({addition.names for addition in additions})


def _of(patterns: Iterable[str]) -> str:
    return ", ".join(sorted(patterns)[:2]) or "something without parameters"


def _by_branch(additions: Iterable[Addition]) -> Mapping[frozenset[str], list[Addition]]:
    found: defaultdict[frozenset[str], list[Addition]] = defaultdict(list)
    for addition in additions:
        if addition.on_stream:
            found[addition.patterns].append(addition)
    return found


# names and numbers


def _patterns(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(map(name_pattern_of_parts, names))))


def _label(keys: Sequence[tuple[tuple[str, ...], How]]) -> str:
    first = " with ".join(keys[0][0])
    return first if len(keys) == 1 else f"{first} and {len(keys) - 1} more"


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / len(values)) if values else 0.0


def _off(found: float, expected: float) -> float:
    return max(found / expected, expected / found) if 0 < found < math.inf else math.inf
