"""Name what is read of a model while it trains: streams at relative depths, outputs, pre-activations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from mlu_lightning.discovery.structure import Branch, BranchKind, Tap
from mlu_lightning.planning import BranchPlan


class LocationName(str):
    """The name of a location: the text that it is in files and logs, with what it stands for."""

    def __reduce__(self) -> Any:
        return parse_location_name, (str(self),)


class StreamName(LocationName):
    """A residual stream at a relative depth: ``s=0.25``, or ``stream1/s=0.25`` for the next stream."""

    depth: float
    number: int

    def __new__(cls, depth: float, number: int = 0) -> StreamName:
        """Write the name of a stream at a relative depth."""
        name = super().__new__(cls, f"s={depth:g}" if number == 0 else f"stream{number}/s={depth:g}")
        name.depth, name.number = depth, number
        return name


class OutputName(LocationName):
    """What a readout returns: ``output``, or ``output1`` for the next readout."""

    number: int

    def __new__(cls, number: int = 0) -> OutputName:
        """Write the name of a readout's output."""
        name = super().__new__(cls, f"output{number or ''}")
        name.number = number
        return name


class FeatureName(LocationName):
    """Pre-activations or logits of a branch, by its kind and name: ``mlp/blocks.0``; ``mlp/self`` of the module itself."""

    kind: BranchKind
    branch: str

    def __new__(cls, kind: BranchKind, branch: str) -> FeatureName:
        """Write the name of a branch's features."""
        name = super().__new__(cls, f"{kind}/{branch or 'self'}")
        name.kind, name.branch = kind, branch or "self"
        return name


def parse_location_name(text: str) -> LocationName:
    """Read the text of a location's name, from a file or a checkpoint, or refuse what is none."""
    name: LocationName | None = None
    if stream := re.fullmatch(r"(?:stream(\d+)/)?s=([\d.e-]+)", text):
        depth = float(stream[2])
        name = StreamName(depth, int(stream[1] or 0)) if 0 <= depth <= 1 else None
    elif output := re.fullmatch(r"output(\d*)", text):
        name = OutputName(int(output[1] or 0))
    else:
        kinds: dict[str, BranchKind] = {kind: kind for kind in get_args(BranchKind)}
        kind, _, branch = text.partition("/")
        name = FeatureName(kinds[kind], branch) if kind in kinds else None
    if name != text:
        raise ValueError(f"{text[:80]!r} is not the name of a stream, an output or a branch's features")
    return name


@dataclass(frozen=True)
class Location:
    """What is read under one name: a weighted sum of values, each of which is a sum of what taps read."""

    name: LocationName
    parts: tuple[tuple[float, tuple[Tap, ...]], ...]  # weights, which sum to one, and taps

    @property
    def taps(self) -> tuple[Tap, ...]:
        """All taps that are read."""
        return tuple(tap for _, taps in self.parts for tap in taps)


def locate(taps: Sequence[Tap], stream_depths: Sequence[int], depths: Sequence[float]) -> tuple[Location, ...]:
    """Find what to read at relative depths s of every stream, in order, and then at every readout.

    The stream at s is that after s · L residual additions; where that is not a whole number, the two next to it are
    interpolated, h(s) = (1 - w) h_k + w h_(k+1) with w = s · L - k, which is exact up to O(1/L²) (theory.md, section 5).
    Where no submodule is given or returns the stream itself, it is the stream before plus the branches.

    Args:
        taps: Taps of a structure or plan.
        stream_depths: Residual additions L of every stream.
        depths: Relative depths s between 0 (the embedding) and 1 (the last addition).

    Raises:
        ValueError: If a depth is not between 0 and 1, or there is no tap for one.
    """
    for s in depths:
        if not 0 <= s <= 1:
            raise ValueError(f"A relative depth is from 0 (the embedding) to 1 (the last addition), and {s} is not.")
    found = []
    for number, depth in enumerate(stream_depths):
        along = _taps_along([tap for tap in taps if tap.number == number])
        for s in depths:
            below = round(float(s) * depth, 9)  # without what 0.7 * 10 has too much
            weight = below % 1
            weights = [(int(below), 1 - weight), (int(below) + 1, weight)]
            for position, part in weights:
                if part and position not in along:
                    raise ValueError(
                        f"The residual stream after {position} of its {depth} additions cannot be read: no submodule is "
                        "given it or returns it. Let it pass through a submodule there (an nn.Identity is enough), or "
                        f"choose depths other than {s:g}."
                    )
            parts = tuple((part, along[position]) for position, part in weights if part)
            found.append(Location(StreamName(s, number), parts))
    readouts = [Location(OutputName(tap.number), ((1.0, (tap,)),)) for tap in taps if tap.reads == "readout"]
    return (*found, *readouts)


def locate_features(features: Sequence[Tap], branches: Sequence[Branch | BranchPlan]) -> tuple[Location, ...]:
    """Find where to read the pre-activations of branches: what enters their nonlinearity, or the logits of attention.

    Args:
        features: Taps of features in a structure or plan, one for each branch that can be read.
        branches: Branches of the same.
    """
    read = [(tap, branches[tap.number]) for tap in features]
    return tuple(Location(FeatureName(branch.kind, branch.name), ((1.0, (tap,)),)) for tap, branch in read)


def _taps_along(taps: Sequence[Tap]) -> dict[int, tuple[Tap, ...]]:
    """What to add up for a stream at each position where it can be read."""
    along: dict[int, tuple[Tap, ...]] = {tap.position: (tap,) for tap in taps if tap.reads == "stream"}
    branches: dict[int, tuple[Tap, ...]] = {}
    for tap in taps:
        if tap.reads == "branch":
            branches[tap.position] = (*branches.get(tap.position, ()), tap)
    for position, added in sorted(branches.items()):
        if position in along:
            along.setdefault(position + 1, along[position] + added)
    return along
