"""How far a shape is from its limit, relative to the base: what initial random weights write to the stream."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlu_lightning.discovery.structure import BranchKind
from mlu_lightning.planning.entries import BranchPlan, ParameterPlan, StreamPlan
from mlu_lightning.table import TABLES, Parameterization, Ratios, Role

FAR = 1.5  # distance ratio above which a plan warns


@dataclass(frozen=True)
class Distance:
    """Size of what the initial weights of one kind of branch write to a stream (theory.md, section 3)."""

    stream: int  # index into ``Plan.streams``
    kind: BranchKind
    ratio: float | None  # r = √(d/(l·m)) next to the base's, the largest of all branches; None in the absolute form
    absolute: float  # √(D/(L·M)), with M = heads, channels or units

    @property
    def is_far(self) -> bool:
        """Whether it is so much larger than the base's that a plan warns."""
        return self.ratio is not None and self.ratio > FAR

    def __str__(self) -> str:
        where = f"{self.kind} {self.absolute:.3g}"
        if self.ratio is None:
            return where
        if math.isclose(self.ratio, 1, rel_tol=1e-6):
            return f"{where}, as the base's"
        return f"{where}, {self.ratio:.3g} times the base's ({'farther' if self.ratio > 1 else 'nearer'})"


def distances(
    parameters: Mapping[str, ParameterPlan],
    branches: Sequence[BranchPlan],
    streams: Sequence[StreamPlan],
    absolute: bool,
) -> tuple[Distance, ...]:
    """Distances by stream and kind of branch, without branches whose last matrix starts at zero or is left alone."""
    found: dict[tuple[int, BranchKind], Distance] = {}
    for parameter in parameters.values():
        if parameter.role is not Role.BRANCH_OUT or parameter.branch is None or parameter.base_std == 0:
            continue
        branch = branches[parameter.branch]
        stream = streams[branch.stream]
        key = branch.stream, branch.kind
        own = Ratios(stream.depth, branch.hidden, stream.embedding, uses=parameter.uses)
        of_base = None if absolute else _random_part(parameter, parameter.ratios)
        distance = Distance(*key, of_base, _random_part(parameter, own))
        if key not in found or (distance.ratio or distance.absolute) > (found[key].ratio or found[key].absolute):
            found[key] = distance
    return tuple(found[key] for key in sorted(found, key=lambda key: key[0]))


def warning_of(found: Iterable[Distance]) -> tuple[str, ...]:
    """Say of what is far from the limit what to do about it, in one sentence or none."""
    far = [distance for distance in found if distance.is_far]
    if not far:
        return ()
    worst = max(far, key=lambda distance: distance.ratio or 0.0)
    kinds = " and ".join(dict.fromkeys(distance.kind for distance in far))
    return (
        f"the initial weights of {kinds} branches write {worst.ratio:.3g} times as much to the stream as the base's, "
        "r = √(d/(l·m)) (theory.md, section 3), so that this shape is farther from its limit and its best learning rate "
        "may be lower: grow hidden width or depth along with the embedding, or tune at a base with a larger L·M/D",
    )


def _random_part(parameter: ParameterPlan, ratios: Ratios) -> float:
    """Size of a sum over hidden units, additions and uses: uses of one weight are coherent, all else independent."""
    row = TABLES[Parameterization.MLU].row(parameter.role, parameter.variant, ratios)
    independent = ratios.inputs * ratios.depth / ratios.active
    return row.multiplier(ratios) * row.std(ratios) * math.sqrt(independent * ratios.uses)
