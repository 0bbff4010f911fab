"""Write the reference file of a run as it trains, and continue that of a run that is resumed."""

from __future__ import annotations

from dataclasses import fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlu_lightning.observation.batches import encode_batch, encoded_hash
from mlu_lightning.observation.locations import LocationName
from mlu_lightning.observation.probe import Observation
from mlu_lightning.observation.reference_format import (
    ReferenceFile,
    ReferenceHeader,
    RunName,
    read_reference,
    recording_hash,
    reference_texts,
    shorten,
)
from mlu_lightning.planning import Plan
from mlu_lightning.planning.fingerprint import fingerprint
from mlu_lightning.utilities.plain_yaml import parse_yaml
from mlu_lightning.utilities.tensor_files import write_tensors

_UNKNOWN = RunName({}, kept=True)


class ReferenceWriter:
    """Writes the reference of a run with each recording; recordings are kept in memory, as they are in the file."""

    def __init__(self, path: str | PathLike[str], header: ReferenceHeader, probe: Any, run: RunName = _UNKNOWN) -> None:
        self._path = Path(path)
        self._header = header
        self._run = run
        self._probe_structure, self._probe = encode_batch(probe)
        self._recordings: dict[int, dict[LocationName, Tensor]] = {}
        self._digests: dict[int, str] = {}
        self._losses = torch.empty(0)

    @classmethod
    def resume(
        cls, path: str | PathLike[str], header: ReferenceHeader, probe: Any, step: int, run: RunName | None = None
    ) -> ReferenceWriter:
        """Continue the file of a run that is resumed at a step; later recordings are dropped.

        Header, probe and, if known, name have to be those of the run, but for what only initialization uses of the
        plan.
        """
        writer = cls(path, header, probe)

        def read(file: ReferenceFile) -> list[str]:
            writer._digests = {number: digest for number, digest in file.digests.items() if number <= step}
            writer._recordings = {number: file.read_recording(number) for number in writer._digests}
            writer._losses = file.read_losses()[:step].clone()
            # it has the plan that the run was initialized with, of a base that may have been drawn anew since
            writer._header = file.header
            writer._run = replace(file.run, kept=True)  # there is a checkpoint to go on from
            found = _header_differences(writer._header, header, f"the plan in {path}")
            same_probe = file.probe_hash == encoded_hash(writer._probe_structure, writer._probe)
            found = found if same_probe else [*found, "its probe has other values"]
            if not found and run is not None and file.run.parts and (others := file.run.differences(run)):
                return [f"its run had other {', '.join(others)}"]
            return found

        if differences := read_reference(writer._path, read):
            raise ValueError(
                f"{path} is the reference of another run: {'; '.join(differences)}. Give the recorder another path, or "
                "delete the file."
            )
        return writer

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps that were recorded so far."""
        return tuple(self._recordings)

    @property
    def losses(self) -> Tensor:
        """Training losses so far, by step."""
        return self._losses.clone()

    def write(self, step: int, observation: Observation, losses: Tensor) -> None:
        """Write a recording and the training losses [steps] so far; after an ``OSError`` it is written with the next."""
        self._check(step, observation, losses)
        recording = {name: _copy(observation[name], self._header.torch_dtype) for name in self._header.locations}
        self._recordings[step] = recording
        self._digests[step] = recording_hash(recording)
        self._losses = _copy(losses, torch.float32)
        self.rewrite()

    def keep(self) -> bool:
        """Let what is written next tell that the run has a checkpoint or has ended; whether it did not, and there is any."""
        new = not self._run.kept
        self._run = replace(self._run, kept=True)
        return new and bool(self._recordings)

    def rewrite(self) -> None:
        """Write all recordings again."""
        probe = self._probe_structure, self._probe
        texts = reference_texts(self._header, self._digests, *probe, self._losses, self._run)
        tensors = {f"{step}/{name}": value for step, read in self._recordings.items() for name, value in read.items()}
        tensors.update({f"probe/{number}": tensor for number, tensor in self._probe.items()})
        write_tensors(self._path, {**tensors, "losses": self._losses}, texts)

    def _check(self, step: int, observation: Observation, losses: Tensor) -> None:
        last = max(self._recordings, default=-1)
        if step <= last:
            raise ValueError(f"Step {step} cannot be recorded after step {last}: steps have to increase, from 0 on.")
        shapes = {name: tuple(values.shape) for name, values in observation.items()}
        if shapes != self._header.locations:
            raise ValueError(
                f"What was observed at step {step} has the shapes {shapes}, and the header says {self._header.locations}. "
                "Pass the same probe through the same module at each step."
            )
        dtypes = {values.dtype for values in (*observation.values(), losses)}
        if dtypes != {torch.float32} or losses.ndim != 1:
            raise ValueError(
                "Observations and losses have to be in float32 and losses of one dimension, and they are in "
                f"{', '.join(sorted(map(str, dtypes)))} and of {losses.ndim}. Convert them with .float()."
            )


def _header_differences(found: ReferenceHeader, own: ReferenceHeader, source: str) -> list[str]:
    return [
        f"its {field.name} is {shorten(getattr(found, field.name))} instead of {shorten(getattr(own, field.name))}"
        for field in fields(ReferenceHeader)
        if field.name != "plan" and getattr(found, field.name) != getattr(own, field.name)
    ] + _plan_differences(found.plan, own.plan, source)


def _plan_differences(found: str | None, own: str | None, source: str) -> list[str]:
    if found == own:
        return []
    if found is None or own is None:
        return ["it has no plan and this run has one" if found is None else "it has a plan and this run has none"]
    plans = [Plan.from_yaml(found, source), Plan.from_yaml(own, "the plan of this run")]
    if fingerprint(plans[0]) == fingerprint(plans[1]):
        return []
    place, theirs, ours = _first_difference(*map(_as_trained, plans))
    return [f"its plan has {shorten(theirs)} instead of {shorten(ours)} at {': '.join(place)}"]


def _first_difference(a: Any, b: Any, place: tuple[str, ...] = ()) -> tuple[tuple[str, ...], Any, Any]:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        pairs = [(key, a[key], b[key]) for key in a]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        # branches and multipliers are known by their names
        names = [item.get("name", str(i)) if isinstance(item, dict) else str(i) for i, item in enumerate(a)]
        pairs = list(zip(names, a, b, strict=True))
    elif isinstance(a, dict) and isinstance(b, dict):
        return place, [key for key in a if key not in b], [key for key in b if key not in a]
    else:
        return place, a, b
    return next(_first_difference(x, y, (*place, key)) for key, x, y in pairs if x != y)


def _as_trained(plan: Plan) -> Any:
    """A plan as lists and mappings of texts, without what only initialization uses, and without warnings."""
    parameters = {name: replace(parameter, base_std=None) for name, parameter in plan.parameters.items()}
    return parse_yaml(replace(plan, parameters=parameters, warnings=()).to_yaml(), "a plan")


def _copy(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
