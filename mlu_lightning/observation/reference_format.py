"""What a reference file says about itself: its metadata, made, parsed and verified."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mlu_lightning.observation.batches import decode_batch, encoded_hash
from mlu_lightning.utilities.tensor_files import TensorFile, TensorSpec, parse_json, tensors_hash

__all__ = ["FORMAT", "ReferenceContents", "ReferenceHeader", "losses_hash", "opened", "recording_hash", "shown"]

FORMAT = "mlu_lightning.reference"
"""What the metadata ``format`` of a reference is."""

_VERSION = "1"


@dataclass(frozen=True)
class ReferenceHeader:
    """What was recorded, and of which run.

    Args:
        depth: residual additions L of every stream.
        embedding: dimension D of every stream.
        hidden: hidden width M by kind of branch.
        depths: relative depths s that were recorded.
        locations: positions and dimension of the values, by the name of a location.
        runs: the step that the probe was passed through.
        data_sizes: sizes of embeddings and readouts that are not the model's choice (vocabulary, classes), by name of
            the parameter.
        plan: YAML of the plan of the run, None without one.
        dtype: of values in the file, ``"float32"`` or ``"bfloat16"``.
        count: positions that the probe has in the module, of which those that were recorded are some; None if unknown.

    Raises:
        ValueError: if a field is not of this kind.

    >>> header = ReferenceHeader((4,), (8,), {"mlp": 16}, (0, 1), {"s=0": (5, 8), "s=1": (5, 8)}, "training_step", {}, None)
    >>> header.dtype
    'float32'
    """

    depth: tuple[int, ...]
    embedding: tuple[int, ...]
    hidden: dict[str, int]
    depths: tuple[float, ...]
    locations: dict[str, tuple[int, int]]
    runs: Literal["training_step", "validation_step"]
    data_sizes: dict[str, tuple[int, ...]]
    plan: str | None
    dtype: Literal["float32", "bfloat16"] = "float32"
    count: int | None = None

    def __post_init__(self) -> None:
        sizes = "a tuple of whole numbers from 1 on"
        self._require("depth", _is_sizes(self.depth), sizes)
        self._require("embedding", _is_sizes(self.embedding), sizes)
        hidden = _is_table(self.hidden) and _is_sizes(tuple(self.hidden.values()))
        self._require("hidden", hidden, "a dict of whole numbers from 1 on")
        depths = isinstance(self.depths, tuple) and all(_is_relative(depth) for depth in self.depths)
        self._require("depths", depths, "a tuple of numbers from 0 to 1")
        locations = _is_table(self.locations) and all(
            _is_sizes(shape) and len(shape) == 2 for shape in self.locations.values()
        )
        self._require("locations", locations, "a dict of tuples (positions, dimension)")
        self._require("runs", self.runs in ("training_step", "validation_step"), "'training_step' or 'validation_step'")
        data_sizes = _is_table(self.data_sizes) and all(_is_sizes(shape) for shape in self.data_sizes.values())
        self._require("data_sizes", data_sizes, f"a dict of which each value is {sizes}")
        self._require("plan", self.plan is None or isinstance(self.plan, str), "YAML or None")
        self._require("count", self.count is None or _is_sizes((self.count,)), "a whole number from 1 on, or None")
        self._require("dtype", self.dtype in ("float32", "bfloat16"), "'float32' or 'bfloat16'")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The same dtype, as torch has it."""
        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    def _require(self, field: str, right: bool, what: str) -> None:
        if not right:
            raise ValueError(f"{field}={shown(getattr(self, field))} in the header of a reference should be {what}")


@dataclass(frozen=True)
class ReferenceContents:
    """What is in a file.

    Args:
        header: what was recorded, and of which run.
        digests: :func:`recording_hash` of every recording, by step.
        probe_structure: of the probe, from :func:`mlu_lightning.observation.batches.encode_batch`.
        probe_specs: its tensors, by name.
        probe_hash: :func:`mlu_lightning.observation.batches.batch_hash` of it.
        losses_count: number of training losses.
        losses_digest: :func:`losses_hash` of them.

    >>> header = ReferenceHeader((4,), (8,), {}, (1,), {"s=1": (5, 8)}, "training_step", {}, None)
    >>> contents = ReferenceContents(header, {0: "5f"}, {"value": None}, {}, "08", 0, "1c")
    >>> contents.metadata["recordings"], list(contents.specs)
    ('{"steps": [0], "digests": ["5f"]}', ['0/s=1', 'losses'])
    """

    header: ReferenceHeader
    digests: dict[int, str]
    probe_structure: Any
    probe_specs: dict[str, TensorSpec]
    probe_hash: str
    losses_count: int
    losses_digest: str

    @classmethod
    def of(cls, file: TensorFile) -> ReferenceContents:
        """Parse and verify the metadata, and that the file holds the tensors that they tell of, and no others.

        Args:
            file: that was :func:`opened`.

        Raises:
            ValueError: with what is wrong.
        """
        metadata = dict(file.metadata)
        if set(metadata) != _METADATA:
            raise ValueError(f"it does not have the metadata {', '.join(sorted(_METADATA))}")
        if metadata.pop("digest") != _metadata_hash(metadata):
            raise ValueError("its metadata do not have the hash that they should have")
        probe = _fields_of(metadata["probe"], {"structure", "tensors", "digest"})
        losses = _fields_of(metadata["losses"], {"count", "digest"})
        contents = cls(
            header=_header_of(metadata["header"]),
            digests=_digests_of(metadata["recordings"]),
            probe_structure=probe["structure"],
            probe_specs=_specs_of(probe["tensors"]),
            probe_hash=probe["digest"],
            losses_count=losses["count"],
            losses_digest=losses["digest"],
        )
        # before they are listed: they would exhaust the memory if a file said to have very many steps and locations
        count = len(contents.digests) * len(contents.header.locations) + len(contents.probe_specs) + 1
        if file.count != count:
            raise ValueError(f"it has {file.count} tensors, and its metadata tell of {count}")
        file.check(contents.specs)
        return contents

    @property
    def metadata(self) -> dict[str, str]:
        """The same as texts, for the file."""
        specs = [[spec.dtype, spec.shape] for spec in self.probe_specs.values()]
        probe = {"structure": self.probe_structure, "tensors": specs, "digest": self.probe_hash}
        recordings = {"steps": list(self.digests), "digests": list(self.digests.values())}
        texts = {
            "format": FORMAT,
            "version": _VERSION,
            "header": json.dumps(asdict(self.header)),
            "probe": json.dumps(probe),
            "recordings": json.dumps(recordings),
            "losses": json.dumps({"count": self.losses_count, "digest": self.losses_digest}),
        }
        return {**texts, "digest": _metadata_hash(texts)}

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Tensors in the file, by name."""
        code = TensorSpec.of(torch.empty(0, dtype=self.header.torch_dtype)).dtype
        shapes = self.header.locations.items()
        specs = {f"{step}/{name}": TensorSpec(code, shape) for step in self.digests for name, shape in shapes}
        specs.update({f"probe/{name}": spec for name, spec in self.probe_specs.items()})
        return {**specs, "losses": TensorSpec("F32", (self.losses_count,))}

    def read_recording(self, file: TensorFile, step: int) -> dict[str, Tensor]:
        """Read the values at a step, in the dtype of the file, and verify them.

        Args:
            file: that this was read from.
            step: one of the recorded ones.

        Raises:
            ValueError: if they are not what was written.
        """
        recording = {name: file.read(f"{step}/{name}") for name in self.header.locations}
        if recording_hash(recording) != self.digests[step]:
            raise ValueError(f"the recording of step {step} does not have the hash that it should have")
        return recording

    def read_probe(self, file: TensorFile) -> Any:
        """Read the probe batch, and verify it.

        Args:
            file: that this was read from.

        Raises:
            ValueError: if it is not what was written.
        """
        tensors = {name: file.read(f"probe/{name}") for name in self.probe_specs}
        probe = decode_batch(self.probe_structure, tensors)
        if encoded_hash(self.probe_structure, tensors) != self.probe_hash:
            raise ValueError("the probe does not have the hash that it should have")
        return probe

    def read_losses(self, file: TensorFile) -> Tensor:
        """Read the training losses, and verify them.

        Args:
            file: that this was read from.

        Raises:
            ValueError: if they are not what was written.
        """
        losses = file.read("losses")
        if losses_hash(losses) != self.losses_digest:
            raise ValueError("the losses do not have the hash that they should have")
        return losses


@contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """Open a file that says to be a reference; what is wrong with it, also what is found while it is open, names it.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is something else, or damaged.
    """
    if path.is_dir():
        raise ValueError(f"{path} is not a readable reference: it is a folder. Give the path of the file in it.")
    with path.open("rb") as stream:
        try:
            file = TensorFile(stream)
            kind = file.metadata.get("format")
            version = file.metadata.get("version")
            if kind == FORMAT and version == _VERSION:
                yield file
                return
        except ValueError as error:
            raise ValueError(f"{path} is not a readable reference: {error}. {_DAMAGED}") from error
    if kind != FORMAT:
        raise ValueError(
            f"{path} is not a readable reference: it is a safetensors file of another kind, such as weights. Give a file "
            "that ReferenceRecorder wrote."
        )
    raise ValueError(
        f"{path} is not a readable reference: it has version {str(version)[:20]!r} of the format, and this package reads "
        f"version {_VERSION!r}. Install the version of mlu-lightning that wrote it, or record the run again."
    )


def recording_hash(recording: Mapping[str, Tensor]) -> str:
    """Hash the values at one step, by location.

    Args:
        recording: values by location, in any order.

    >>> a, b = torch.ones(1), torch.ones(2)
    >>> recording_hash({"a": a, "b": b}) == recording_hash({"b": b, "a": a})
    True
    """
    return tensors_hash(sorted(recording.items()))


def losses_hash(losses: Tensor) -> str:
    """Hash training losses.

    Args:
        losses: [steps].

    >>> losses_hash(torch.zeros(2)) == losses_hash(torch.zeros(3))
    False
    """
    return tensors_hash([("losses", losses)])


def shown(value: Any) -> str:
    """Write a value into an error message, cut where it is long, such as a plan.

    Args:
        value: anything.

    >>> len(shown("plan" * 1000))
    83
    """
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


_METADATA = {"format", "version", "header", "probe", "recordings", "losses", "digest"}
_DAMAGED = "It is not a reference, or was damaged or cut off on the way: copy it again, or record the run again."


def _header_of(text: str) -> ReferenceHeader:
    values = _fields_of(text, {field.name for field in fields(ReferenceHeader)})
    # JSON has lists where the header has tuples, also as values of its dicts
    converted: dict[str, Any] = {
        name: {key: _as_tuple(item) for key, item in value.items()} if isinstance(value, dict) else _as_tuple(value)
        for name, value in values.items()
    }
    return ReferenceHeader(**converted)


def _digests_of(text: str) -> dict[int, str]:
    recordings = _fields_of(text, {"steps", "digests"})
    steps, digests = recordings["steps"], recordings["digests"]
    if not isinstance(steps, list) or not isinstance(digests, list) or len(steps) != len(digests):
        raise ValueError("its steps and their hashes are not two lists of one length")
    before = -1
    for step in steps:
        if type(step) is not int or step <= before:
            raise ValueError("its steps do not increase from 0 on")
        before = step
    return dict(zip(steps, digests, strict=True))


def _specs_of(described: Any) -> dict[str, TensorSpec]:
    if not isinstance(described, list):
        raise ValueError("the tensors of its probe are not a list")
    specs = {}
    for number, entry in enumerate(described):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], list):
            raise ValueError("a tensor of its probe is not described by dtype and shape")
        specs[str(number)] = TensorSpec(entry[0], tuple(entry[1]))
    return specs


def _fields_of(text: str, names: set[str]) -> dict[str, Any]:
    """A JSON object with exactly these fields."""
    found = parse_json(text)
    if not isinstance(found, dict) or set(found) != names:
        raise ValueError(f"a part of its metadata does not have the fields {', '.join(sorted(names))}")
    return found


def _metadata_hash(metadata: Mapping[str, str]) -> str:
    return tensors_hash((), json.dumps(metadata, sort_keys=True))


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(size) is int and size >= 1 for size in value)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_relative(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1
