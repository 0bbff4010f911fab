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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mlu_lightning.observation.batches import encode_batch, encoded_hash, load_batch
from mlu_lightning.observation.reference_format import (
    FORMAT,
    ReferenceContents,
    ReferenceHeader,
    losses_hash,
    opened,
    recording_hash,
    shown,
)
from mlu_lightning.planning.fingerprint import fingerprint
from mlu_lightning.planning.plan import Plan
from mlu_lightning.utilities.lightning_steps import StepName
from mlu_lightning.utilities.plain_yaml import parse_yaml
from mlu_lightning.utilities.tensor_files import TensorSpec, write_tensors

__all__ = ["Reference", "ReferenceHeader", "ReferenceWriter", "load_probe"]


class ReferenceWriter:
    """Writes the reference of a run that is under way.

    Recordings are kept in memory, as they are in the file.

    Args:
        path: of the file, which is made, or replaced, when the first recording is written.
        header: what will be recorded.
        probe: batch that is recorded, of tensors, numbers and strings in dicts, lists and tuples.

    Raises:
        ValueError: if the probe cannot be kept in a file.

    >>> from tempfile import TemporaryDirectory
    >>> header = ReferenceHeader((4,), (8,), {"mlp": 16}, (1,), {"s=1": (5, 8)}, "training_step", {}, None)
    >>> with TemporaryDirectory() as folder:
    ...     writer = ReferenceWriter(f"{folder}/run.safetensors", header, torch.ones(5, 3))
    ...     writer.write(0, {"s=1": torch.zeros(5, 8)}, torch.tensor([]))
    ...     writer.write(2, {"s=1": torch.ones(5, 8)}, torch.tensor([0.5, 0.25]))
    ...     reference = Reference.load(f"{folder}/run.safetensors")
    >>> reference.steps, reference.losses
    ((0, 2), tensor([0.5000, 0.2500]))
    """

    def __init__(self, path: str | PathLike[str], header: ReferenceHeader, probe: Any) -> None:
        self._path = Path(path)
        structure, self._probe = encode_batch(probe)
        self._contents = ReferenceContents(
            header=header,
            digests={},
            probe_structure=structure,
            probe_specs={name: TensorSpec.of(tensor) for name, tensor in self._probe.items()},
            probe_hash=encoded_hash(structure, self._probe),
            losses_count=0,
            losses_digest=losses_hash(torch.empty(0)),
        )
        self._recordings: dict[int, dict[str, Tensor]] = {}
        self._losses = torch.empty(0)

    @classmethod
    def resume(cls, path: str | PathLike[str], header: ReferenceHeader, probe: Any, step: int) -> ReferenceWriter:
        """Go on in the file of a run that goes on from one of its checkpoints.

        Args:
            path: of the file, which stays as it is until the next recording.
            header: of the run, which has to be that in the file, up to what initialization alone uses of the plan.
            probe: as well.
            step: optimizer steps before the checkpoint; what was recorded after them is dropped.

        Raises:
            FileNotFoundError: if there is no file.
            ValueError: if it cannot be read, or is of another run.
        """
        writer = cls(path, header, probe)
        with opened(writer._path) as file:
            found = ReferenceContents.of(file)
            recordings = {number: found.read_recording(file, number) for number in found.digests if number <= step}
            losses = found.read_losses(file)[:step].clone()
        differences = [
            f"its {field.name} is {shown(getattr(found.header, field.name))} instead of "
            f"{shown(getattr(header, field.name))}"
            for field in fields(ReferenceHeader)
            if field.name != "plan" and getattr(found.header, field.name) != getattr(header, field.name)
        ]
        differences += _plan_differences(found.header.plan, header.plan, f"the plan in {path}")
        if found.probe_hash != writer._contents.probe_hash:
            differences.append("its probe has other values")
        if differences:
            raise ValueError(
                f"{path} is the reference of another run: {'; '.join(differences)}. Give the recorder another path, or "
                "delete the file."
            )
        # it has the plan that the run was initialized with, of a base that may have been drawn anew since
        writer._contents = replace(writer._contents, header=found.header)
        writer._keep(recordings, {number: found.digests[number] for number in recordings}, losses)
        return writer

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps that were recorded so far."""
        return tuple(self._recordings)

    @property
    def losses(self) -> Tensor:
        """Training losses so far, by step."""
        return self._losses.clone()

    def write(self, step: int, observation: Mapping[str, Tensor], losses: Tensor) -> None:
        """Add a recording, and write the file.

        Args:
            step: optimizer steps made, more than at the recording before.
            observation: values [positions, dimension] in float32 at every location of the header.
            losses: training loss [steps] of every optimizer step made, in float32.

        Raises:
            ValueError: if these are not of the form that the header says, or the step is not a later one.
            OSError: if the file could not be written. An older file is intact then, and the recording is kept, to be
                written with the next one.
        """
        self._check(step, observation, losses)
        header = self._contents.header
        recording = {name: _copy(observation[name], header.torch_dtype) for name in header.locations}
        digests = {**self._contents.digests, step: recording_hash(recording)}
        self._keep({**self._recordings, step: recording}, digests, _copy(losses, torch.float32))
        tensors = {
            f"{step}/{name}": value for step, values in self._recordings.items() for name, value in values.items()
        }
        tensors.update({f"probe/{name}": value for name, value in self._probe.items()})
        write_tensors(self._path, {**tensors, "losses": self._losses}, self._contents.metadata)

    def _keep(self, recordings: dict[int, dict[str, Tensor]], digests: dict[int, str], losses: Tensor) -> None:
        self._recordings = recordings
        self._losses = losses
        self._contents = replace(
            self._contents, digests=digests, losses_count=len(losses), losses_digest=losses_hash(losses)
        )

    def _check(self, step: int, observation: Mapping[str, Tensor], losses: Tensor) -> None:
        last = max(self._recordings, default=-1)
        if step <= last:
            raise ValueError(f"Step {step} cannot be recorded after step {last}: steps have to increase, from 0 on.")
        shapes = {name: tuple(values.shape) for name, values in observation.items()}
        if shapes != self._contents.header.locations:
            raise ValueError(
                f"What was observed at step {step} has the shapes {shapes}, and the header says "
                f"{self._contents.header.locations}. Pass the same probe through the same module at each step."
            )
        dtypes = {values.dtype for values in (*observation.values(), losses)}
        if dtypes != {torch.float32} or losses.ndim != 1:
            raise ValueError(
                "Observations and losses have to be in float32 and losses of one dimension, and they are in "
                f"{', '.join(sorted(map(str, dtypes)))} and of {losses.ndim}. Convert them with .float()."
            )


@dataclass(frozen=True, eq=False, repr=False)
class Reference:
    """A recorded run, whose recordings stay in the file until they are read.

    Args:
        path: of the file.
        header: what was recorded, and of which run.
        steps: optimizer steps at which it was recorded.
        probe: the batch that was recorded, on the CPU.
        probe_hash: :func:`mlu_lightning.observation.batches.batch_hash` of it.
        losses: training loss [steps] of every optimizer step up to the last recording, NaN where it is unknown.
        size: of the file, in bytes.
        digests: hash of every recording, by step.

    >>> from tempfile import TemporaryDirectory
    >>> header = ReferenceHeader((4,), (8,), {"mlp": 16}, (1,), {"s=1": (5, 8)}, "training_step", {}, None)
    >>> with TemporaryDirectory() as folder:
    ...     ReferenceWriter(f"{folder}/run", header, torch.ones(5, 3)).write(0, {"s=1": torch.ones(5, 8)}, torch.empty(0))
    ...     reference = Reference.load(f"{folder}/run")
    ...     values = reference.read(0)["s=1"]
    >>> list(values.shape), reference.probe.shape
    ([5, 8], torch.Size([5, 3]))
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
            path: of the file.

        Raises:
            FileNotFoundError: if there is no file.
            ValueError: if it is not a reference, or is damaged.
        """
        path = Path(path)
        with opened(path) as file:
            contents = ReferenceContents.of(file)
            for step in contents.digests:
                contents.read_recording(file, step)
            return cls(
                path=path,
                header=contents.header,
                steps=tuple(contents.digests),
                probe=contents.read_probe(file),
                probe_hash=contents.probe_hash,
                losses=contents.read_losses(file),
                size=file.size,
                digests=contents.digests,
            )

    def read(self, step: int) -> dict[str, Tensor]:
        """Read what was recorded at a step.

        The file may have been replaced since it was loaded, by the run that goes on recording.

        Args:
            step: one of ``steps``.

        Returns:
            For every location the values [positions, dimension], in float32.

        Raises:
            FileNotFoundError: if the file is gone.
            ValueError: if the step was not recorded, the file is damaged, or what it has now for this step is not what
                it had when it was loaded.
        """
        if step not in self.digests:
            raise ValueError(f"{self.path} has no recording at step {step}. It has some at {_listed(self.steps)}.")
        with opened(self.path) as file:
            contents = ReferenceContents.of(file)
            if contents.digests.get(step) == self.digests[step]:
                return {name: values.float() for name, values in contents.read_recording(file, step).items()}
        raise ValueError(
            f"{self.path} was replaced after it was loaded, and no longer holds the same recording at step {step}: another "
            "run was written to it, or its run was resumed from an earlier step. Load it again."
        )

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
        path: of the file; see :func:`mlu_lightning.observation.batches.load_batch`.

    Returns:
        The batch, and the step that it was passed through, None if it is not of a reference.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is neither.

    >>> from tempfile import TemporaryDirectory
    >>> from safetensors.torch import save_file
    >>> with TemporaryDirectory() as folder:
    ...     save_file({"batch": torch.ones(1)}, f"{folder}/probe.safetensors")
    ...     load_probe(f"{folder}/probe.safetensors")
    (tensor([1.]), None)
    """
    is_reference = False
    if not Path(path).is_dir():
        try:
            with safe_open(path, framework="pt") as file:
                is_reference = (file.metadata() or {}).get("format") == FORMAT
        except SafetensorError:
            pass  # load_batch says what is wrong
    if not is_reference:
        return load_batch(path), None
    reference = Reference.load(path)
    return reference.probe, reference.header.runs


def _plan_differences(found: str | None, own: str | None, source: str) -> list[str]:
    """Where the plan in a file differs first from that of a run, in what training depends on."""
    if found == own:
        return []
    if found is None or own is None:
        return ["it has no plan and this run has one" if found is None else "it has a plan and this run has none"]
    plans = [Plan.from_yaml(found, source), Plan.from_yaml(own, "the plan of this run")]
    if fingerprint(plans[0]) == fingerprint(plans[1]):
        return []
    place, one, other = _first_difference(*map(_as_trained, plans))
    return [f"its plan has {shown(one)} instead of {shown(other)} at {': '.join(place)}"]


def _first_difference(one: Any, other: Any, place: tuple[str, ...] = ()) -> tuple[tuple[str, ...], Any, Any]:
    """The first place where two that are not equal differ, and what each has there."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(key, one[key], other[key]) for key in one]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        # branches and multipliers are known by their names
        names = [
            item.get("name", str(number)) if isinstance(item, dict) else str(number) for number, item in enumerate(one)
        ]
        pairs = list(zip(names, one, other, strict=True))
    elif isinstance(one, dict) and isinstance(other, dict):
        return place, [key for key in one if key not in other], [key for key in other if key not in one]
    else:
        return place, one, other
    return next(_first_difference(a, b, (*place, key)) for key, a, b in pairs if a != b)


def _as_trained(plan: Plan) -> Any:
    """A plan as lists and mappings of texts, without what only initialization uses, and without warnings."""
    parameters = {name: replace(parameter, base_std=None) for name, parameter in plan.parameters.items()}
    return parse_yaml(replace(plan, parameters=parameters, warnings=()).to_yaml(), "a plan")


def _copy(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)


def _listed(numbers: Sequence[int]) -> str:
    """Numbers, the middle ones left out where there are many."""
    few = numbers if len(numbers) <= 10 else [*numbers[:5], "...", *numbers[-3:]]
    return ", ".join(map(str, few))
