"""Find what grows between two shapes of a module: depth, embedding, hidden units, heads and head_dim."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mlu_lightning.discovery import Structure
from mlu_lightning.shapes import Shape
from mlu_lightning.table import Role
from mlu_lightning.utilities.names import name_pattern

Build = Callable[[Mapping[str, int]], Structure]


@dataclass(frozen=True)
class Growth:
    """What is at least √2 times as large in one module as in another, and how head_dim differs."""

    grown: frozenset[str]  # some of "depth", "embedding", "hidden" and "heads" (of queries, keys or values)
    head_dims: Mapping[str, tuple[int, int]]  # head_dim before and after, by pattern of branches where it differs

    @property
    def is_hidden(self) -> bool:
        """Whether units or heads grow, and nothing else."""
        return bool(self.grown) and self.grown <= {"hidden", "heads"}


def growth(before: Structure, after: Structure) -> Growth:
    """Compare the structures of a module at two shapes."""
    grown, sizes = set(), _counted(before)
    for what, found in _counted(after).items():
        if any(key in sizes[what] and size >= sizes[what][key] * math.sqrt(2) for key, size in found.items()):
            grown.add(what)  # sizes may be rounded
    old, new = _head_dims(before), _head_dims(after)
    changed = {name: (old[name], dim) for name, dim in new.items() if old.get(name, dim) != dim}
    return Growth(frozenset(grown), changed)


def at_fixed_head_dim(
    axes: Sequence[str], base: Shape, structure_of: Callable[[Shape], Structure]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Grow hidden width and embedding together if either alone changes head_dim; if only one was chosen, add a note."""
    changed: dict[str, str] = {}
    for axis in ("hidden", "embedding"):
        if axis in axes:
            first = structure_of(base)
            grown = Shape(**{**vars(base), axis: 2 * getattr(base, axis)})
            try:
                if found := growth(first, structure_of(grown)).head_dims:
                    name, (old, new) = next(iter(found.items()))
                    changed[axis] = f"{old} at the base and {new} at twice the {axis} ({name})"
            except ValueError as error:
                if "embedding" not in axes or "hidden" not in axes:
                    raise
                changed[axis] = f"nothing at twice the {axis} alone ({error})"
    if not changed:
        return tuple(axes), ()
    said = f"head_dim changes with the {' and the '.join(changed)}: it is {', and '.join(changed.values())}"
    bounded = "The theory holds at a fixed head_dim"
    both = Shape(base.depth, 2 * base.hidden, 2 * base.embedding)
    if {"hidden", "embedding"} <= set(axes) and not growth(first, structure_of(both)).head_dims:
        kept = [axis for axis in axes if axis not in ("hidden", "embedding")]
        kept.insert(kept.index("together") if "together" in kept else len(kept), "width")
        note = (
            f"{said}. {bounded}, so heads grow with the width: hidden width and embedding by one factor, as the axis "
            '"width", in place of each alone.'
        )
        return tuple(kept), (note,)
    note = (
        f"{said}. {bounded}. Where it changes, plans have µP's rule for logits, next to which half a power of the size is "
        "left to what attention branches do. To stay within the theory, grow the number of heads with the width, as hidden "
        "and embedding, or let the model take head_dim as an argument."
    )
    return tuple(axes), (note,)


def find_options(
    options: Mapping[str, int], structure_of: Build, named: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Find which whole-number arguments of a model are its depth, hidden width and embedding, by what doubles with them.

    An argument that can only grow with another, such as heads with the embedding that they divide, is tried with each
    of these.
    """
    found: dict[str, list[str]] = {axis: [] for axis in ("depth", "hidden", "embedding") if axis not in named}
    first = structure_of({})
    known = [name for names in named.values() for name in names]
    alone: dict[str, Structure | None] = {}
    for name in [*options]:
        alone[name] = _or_none(structure_of, {name: 2 * options[name]})
    later = []
    for name in options:
        after = alone[name]
        if name in known:
            continue
        if after is None:
            later.append(name)
            continue
        what = growth(first, after)
        axis = "hidden" if what.is_hidden else "embedding" if "embedding" in what.grown else "depth"
        if axis in found and (what.is_hidden or axis in what.grown):
            found[axis].append(name)
    partners = [name for axis in ("embedding", "hidden") for name in (*found.get(axis, ()), *named.get(axis, ()))]
    for name in later if "hidden" in found else ():
        for partner in partners:
            by_itself = alone.get(partner)
            both = _or_none(structure_of, {name: 2 * options[name], partner: 2 * options[partner]})
            if both is None or by_itself is None:
                continue
            more = growth(by_itself, both)
            # heads of queries with the embedding, or heads of keys with those of queries
            if more.is_hidden and not (more.head_dims and growth(first, both).head_dims):
                found["hidden"].append(name)
                break
    return found


def _or_none(structure_of: Build, sizes: Mapping[str, int]) -> Structure | None:
    try:
        return structure_of(sizes)
    except ValueError:
        return None


def _counted(structure: Structure) -> dict[str, dict[str, int]]:
    branches = {f"{name_pattern(branch.name)} {branch.kind}": branch.hidden for branch in structure.branches}
    heads = {
        name_pattern(facts.name): facts.fan_out // facts.head_dim
        for facts in structure.parameters.values()
        if facts.head_dim > 1 and facts.role is not Role.BRANCH_OUT
    }
    return {
        "depth": {str(number): stream.depth for number, stream in enumerate(structure.streams)},
        "embedding": {str(number): stream.embedding for number, stream in enumerate(structure.streams)},
        "hidden": branches,
        "heads": heads,
    }


def _head_dims(structure: Structure) -> dict[str, int]:
    return {name_pattern(branch.name): branch.head_dim for branch in structure.branches if branch.head_dim is not None}
