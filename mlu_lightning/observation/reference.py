"""The reference file: what the residual stream and the outputs of one run are on a probe, at some of its steps.

It is a safetensors file, so reading it executes nothing. It holds the tensors

- ``<step>/<location>``: values [positions, dimension] of every recorded step at every location (``s=0.25``: a stream at a
  relative depth; ``output``: a readout's), in float32 or bfloat16;
- ``probe/<number>``: those of the probe batch;
- ``losses``: the training loss of every optimizer step, in float32;

and the metadata ``format``, ``version``, ``header``, ``probe``, ``recordings``, ``losses`` and ``digest``, most of them
JSON: what is in the file, and SHA-256 hashes of every recording, of the probe, of the losses and of the metadata
themselves, so that any damage is found. Its size in bytes is, with B = 4 (float32) or 2 (bfloat16),

    K recordings · B · (sum over depths and streams of positions · D + sum over readouts of positions · outputs)
    + probe + 4 · steps + header (about 100 for each tensor, and the plan)

The file is written anew for each recording, in the place of the older one, and is whole at every moment; K recordings
cost K²/2 times the writing of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from mlu_lightning.observation.batches import load_batch
from mlu_lightning.observation.probe import Observation
from mlu_lightning.observation.reference_format import ReferenceFile, ReferenceHeader, is_reference, read_reference
from mlu_lightning.utilities.lightning_steps import StepName

__all__ = ["Reference", "load_probe"]


@dataclass(frozen=True, eq=False, repr=False)
class Reference:
    """A recorded run, whose recordings stay in the file until they are read.

    Args:
        path: Path of the file.
        header: What was recorded, and of which run.
        steps: Optimizer steps at which it was recorded.
        probe: Batch that was recorded, on the CPU.
        probe_hash: Hash of the probe's content.
        losses: Training loss [steps] of every optimizer step up to the last recording, NaN where it is unknown.
        size: Size of the file in bytes.
        digests: Hash of every recording, by step.
    """

    path: Path
    header: ReferenceHeader
    steps: tuple[int, ...]
    probe: Any
    probe_hash: str
    losses: Tensor
    size: int
    digests: dict[int, str]

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Reference:
        """Read a file and verify all that is in it; it may be that of a run that goes on.

        Args:
            path: Path of the file.

        Raises:
            FileNotFoundError: If there is no file.
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
        """Read what was recorded at a step: values [positions, dimension] at every location, in float32.

        The file may have been replaced since it was loaded, by the run that goes on recording.

        Args:
            step: One of ``steps``.

        Raises:
            FileNotFoundError: If the file is gone.
            ValueError: If the step was not recorded, the file is damaged, or what it has now for this step is not what
                it had when it was loaded.
        """
        if step not in self.digests:
            raise ValueError(f"{self.path} has no recording at step {step}. It has some at {_listed(self.steps)}.")

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
        shape = [f"L = {_listed(header.depth)}", f"D = {_listed(header.embedding)}"]
        shape += [f"M = {hidden} ({kind})" for kind, hidden in header.hidden.items()]
        positions = sorted({positions for positions, _ in header.locations.values()})
        return "\n".join(
            (
                f"Reference {self.path}: {self.size / 1e6:.3g} MB",
                f"  shape: {', '.join(shape)}",
                f"  steps: {_listed(self.steps)} ({len(self.steps)} recordings, {len(self.losses)} losses)",
                f"  read at: {', '.join(header.locations)} (positions: {_listed(positions)}; {header.dtype})",
            )
        )


def load_probe(path: str | PathLike[str]) -> tuple[Any, StepName | None]:
    """Read a probe from a reference, or from a safetensors file that only holds a batch.

    Args:
        path: Path of the file; see :func:`mlu_lightning.observation.batches.load_batch`.

    Returns:
        The batch, and the step that it was passed through, None if it is not of a reference.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it is neither.

    >>> from tempfile import TemporaryDirectory
    >>> import torch
    >>> from safetensors.torch import save_file
    >>> with TemporaryDirectory() as folder:
    ...     save_file({"batch": torch.ones(1)}, f"{folder}/probe.safetensors")
    ...     load_probe(f"{folder}/probe.safetensors")
    (tensor([1.]), None)
    """
    if not is_reference(Path(path)):
        return load_batch(path), None
    reference = Reference.load(path)
    return reference.probe, reference.header.runs


def _listed(numbers: Sequence[int]) -> str:
    """Numbers, the middle ones left out where there are many."""
    few = numbers if len(numbers) <= 10 else [*numbers[:5], "...", *numbers[-3:]]
    return ", ".join(map(str, few))
