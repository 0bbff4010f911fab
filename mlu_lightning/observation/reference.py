"""The reference file: the residual stream and the outputs of one run on a probe, at some of its steps.

It is a safetensors file with values ``<step>/<location>`` [positions, dimension], losses, the probe batch, a header and
SHA-256 hashes, by which any damage is found. Its size in bytes is, with B = 4 (float32) or 2 (bfloat16),

    K recordings · B · (sum over depths and streams of positions · D + sum over readouts of positions · outputs)
    + probe + 4 · steps + header (about 100 for each tensor, and the plan)

It is written anew for each recording, and is whole at every moment; K of them cost K²/2 times the writing of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from mlu_lightning.observation.batches import load_batch
from mlu_lightning.observation.probe import Observation
from mlu_lightning.observation.reference_format import (
    ReferenceFile,
    ReferenceHeader,
    is_reference,
    listed,
    read_reference,
)
from mlu_lightning.utilities.lightning_steps import StepName


@dataclass(frozen=True, eq=False, repr=False)
class Reference:
    """A recorded run, whose recordings stay in the file until they are read."""

    path: Path
    header: ReferenceHeader  # what was recorded, and of which run
    steps: tuple[int, ...]  # optimizer steps at which it was recorded
    probe: Any  # batch that was recorded, on the CPU
    probe_hash: str
    losses: Tensor  # training loss [steps] of every step up to the last recording, NaN where it is unknown
    size: int  # bytes of the file
    digests: dict[int, str]  # hash of every recording, by step

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Reference:
        """Read a file and verify all that is in it; it may be that of a run that goes on.

        Raises:
            ValueError: If it is not a reference, or is damaged.
        """
        path = Path(path)

        def read(file: ReferenceFile) -> Reference:
            for step in file.digests:
                file.read_recording(step)
            return cls(
                path=path,
                header=file.header,
                steps=tuple(file.digests),
                probe=file.read_probe(),
                probe_hash=file.probe_hash,
                losses=file.read_losses(),
                size=path.stat().st_size,
                digests=file.digests,
            )

        return read_reference(path, read)

    def read(self, step: int) -> Observation:
        """Read what was recorded at one of the ``steps``: values [positions, dimension] by location, in float32.

        Raises:
            ValueError: If the step was not recorded, or the file is damaged or was replaced by another run's meanwhile.
        """
        if step not in self.digests:
            raise ValueError(f"{self.path} has no recording at step {step}. It has some at {listed(self.steps)}.")

        def read_same(file: ReferenceFile) -> Observation | None:
            if file.digests.get(step) != self.digests[step]:
                return None
            return {name: values.float() for name, values in file.read_recording(step).items()}

        observation = read_reference(self.path, read_same)
        if observation is None:
            raise ValueError(
                f"{self.path} was replaced after it was loaded, and no longer holds the same recording at step {step}: "
                "another run was written to it, or its run was resumed from an earlier step. Load it again."
            )
        return observation

    def __repr__(self) -> str:
        header = self.header
        hidden = "".join(f", M = {width} ({kind})" for kind, width in header.hidden.items())
        positions = sorted({positions for positions, _ in header.locations.values()})
        return (
            f"Reference {self.path}: {self.size / 1e6:.3g} MB\n"
            f"  shape: L = {listed(header.depth)}, D = {listed(header.embedding)}{hidden}\n"
            f"  steps: {listed(self.steps)} ({len(self.steps)} recordings, {len(self.losses)} losses)\n"
            f"  read at: {', '.join(header.locations)} (positions: {listed(positions)}; {header.dtype})"
        )


def load_probe(path: str | PathLike[str]) -> tuple[Any, StepName | None]:
    """Read a probe from a reference, or from a safetensors file that only holds a batch.

    Args:
        path: Path of the file; the batch is its tensor "batch", a tuple of "0", "1", ..., or a dict.

    Returns:
        The batch, and the step that it was passed through, None if it is not of a reference.

    Raises:
        ValueError: If it is neither.
    """
    if not is_reference(Path(path)):
        return load_batch(path), None
    reference = Reference.load(path)
    return reference.probe, reference.header.runs
