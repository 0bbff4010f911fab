"""Find the arguments of a configured model that set its depth, hidden width and embedding, by doubling each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.seed import isolate_rng

from mlu_lightning.checking.configuration import Configured
from mlu_lightning.checking.growth import find_options
from mlu_lightning.checking.preparation import (
    USERS_ERRORS,
    first_batches,
    make_trainer,
    prepare,
    quiet,
    structure_of,
    transfer,
)
from mlu_lightning.discovery import Structure


def with_found_options(configured: Configured, named: Mapping[str, Sequence[str]]) -> Configured:
    """Find the arguments of the axes that are not named, and say which they are; refuse a model in which nothing grows."""
    if {"depth", "hidden", "embedding"} <= named.keys():
        return configured
    with isolate_rng(), quiet():
        planning, data = make_trainer([], 1, configured.trainer), configured.data()
        module = prepare(configured.build_with({}), planning)
        probe = transfer(first_batches(data, module, 1, 0)[0], data or module)

        def built(sizes: Mapping[str, int]) -> Structure:
            seed_everything(0, verbose=False)
            try:
                grown = configured.build_with(sizes)
            except USERS_ERRORS as error:
                raise ValueError(f"The module cannot be built: {error}") from error
            return structure_of(grown, planning, probe)

        found = find_options(configured.options, built, named)
    keys = {axis: tuple(found.get(axis, named.get(axis, ()))) for axis in ("depth", "hidden", "embedding")}
    if not any(keys.values()):
        raise ValueError(
            f"Nothing grows if whole-number arguments of the model are doubled: {', '.join(configured.options) or 'none'}. "
            "Give it arguments for depth, hidden width or embedding, or name them: --depth, --hidden, --embedding."
        )
    said = "; ".join(f"{axis}: {', '.join(names)}" for axis, names in keys.items() if names)
    note = f"Arguments of the shape: {said} (found by doubling each; name others with --depth, --hidden, --embedding)."
    return replace(configured, keys=keys, notes=(*configured.notes, note))
