"""The format of reference files: a header and other metadata as JSON, and tensors that are verified on reading."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from mlu_lightning.observation.batches import clone_batch, decode_batch, encoded_hash
from mlu_lightning.observation.locations import LocationName, parse_location_name
from mlu_lightning.utilities.lightning_steps import StepName
from mlu_lightning.utilities.tensor_files import DTYPES, parse_json, read_tensor_file, tensors_hash

FORMAT = "mlu_lightning.reference"  # in the metadata
_VERSION = "2"
_TEXTS = {"format", "version", "run", "header", "probe", "recordings", "losses", "digest"}
_TEXTS_OF = {"1": _TEXTS - {"run"}, _VERSION: _TEXTS}
ReadT = TypeVar("ReadT")


@dataclass(frozen=True)
class ReferenceHeader:
    """What was recorded, and of which run."""

    depth: tuple[int, ...]  # residual additions of every stream
    embedding: tuple[int, ...]  # dimension of every stream
    hidden: dict[str, int]  # width by kind of branch
    depths: tuple[float, ...]  # relative
    locations: dict[LocationName, tuple[int, int]]  # positions and dimension
    runs: StepName  # that the probe was passed through
    data_sizes: dict[str, tuple[int, ...]]  # of embeddings and readouts, by parameter (vocabulary, classes)
    plan: str | None  # YAML
    dtype: Literal["float32", "bfloat16"] = "float32"  # of values in the file
    count: int | None = None  # positions that the probe has in the module, of which some are recorded

    def __post_init__(self) -> None:
        sizes = "a tuple of whole numbers from 1 on"
        depths = isinstance(self.depths, tuple) and all(type(s) in (int, float) and 0 <= s <= 1 for s in self.depths)
        locations = _is_table(self.locations, lambda shape: _is_sizes(shape) and len(shape) == 2)
        for field, right, what in (
            ("depth", _is_sizes(self.depth), sizes),
            ("embedding", _is_sizes(self.embedding), sizes),
            ("hidden", _is_table(self.hidden, _is_size), "a dict of whole numbers from 1 on"),
            ("depths", depths, "a tuple of numbers from 0 to 1"),
            ("locations", locations, "a dict of tuples (positions, dimension)"),
            ("runs", self.runs in get_args(StepName), "'training_step' or 'validation_step'"),
            ("data_sizes", _is_table(self.data_sizes, _is_sizes), f"a dict of which each value is {sizes}"),
            ("plan", self.plan is None or isinstance(self.plan, str), "YAML or None"),
            ("count", self.count is None or _is_size(self.count), "a whole number from 1 on, or None"),
            ("dtype", self.dtype in ("float32", "bfloat16"), "'float32' or 'bfloat16'"),
        ):
            if not right:
                value = shorten(getattr(self, field))
                raise ValueError(f"{field}={value} in the header of a reference should be {what}")

    @classmethod
    def from_json(cls, text: str) -> ReferenceHeader:
        """Read the JSON of a header, in which tuples are lists."""
        text_fields = _parse_fields(text, {field.name for field in fields(cls)})
        values = {name: _with_tuples(value) for name, value in text_fields.items()}
        if isinstance(values["locations"], dict):
            values["locations"] = {parse_location_name(name): shape for name, shape in values["locations"].items()}
        return cls(**values)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The same dtype, as torch has it."""
        return torch.float32 if self.dtype == "float32" else torch.bfloat16


@dataclass(frozen=True)
class RunName:
    """By what a run is known when it is started again from its beginning."""

    parts: dict[str, str]  # hashes of what decides how it goes on: settings, initial weights, seed
    job: str = ""  # of a scheduler that starts it again by itself
    restarts: int = 0  # of the job, before it began
    kept: bool = False  # whether it has a checkpoint, or has ended: nobody has to begin it again

    def __post_init__(self) -> None:
        parts = _is_table(self.parts, lambda digest: isinstance(digest, str))
        kinds = type(self.job), type(self.restarts), type(self.kept)
        if not parts or kinds != (str, int, bool):
            raise ValueError(f"the name of its run is {shorten(self)}")

    def differences(self, other: RunName) -> list[str]:
        """Parts in which another run differs."""
        return [part for part in {**self.parts, **other.parts} if self.parts.get(part) != other.parts.get(part)]


def reference_texts(
    header: ReferenceHeader,
    digests: Mapping[int, str],
    structure: Any,
    probe: Mapping[str, Tensor],
    losses: Tensor,
    run: RunName,
) -> dict[str, str]:
    """Write the metadata of a file: hashes of recordings by step, the structure and tensors of the probe, and losses."""
    specs = [[DTYPES[tensor.dtype], [*tensor.shape]] for tensor in probe.values()]
    encoded = {"structure": structure, "tensors": specs, "digest": encoded_hash(structure, probe)}
    texts = {
        "format": FORMAT,
        "version": _VERSION,
        "run": json.dumps(asdict(run)),
        "header": json.dumps(asdict(header)),
        "probe": json.dumps(encoded),
        "recordings": json.dumps({"steps": list(digests), "digests": list(digests.values())}),
        "losses": json.dumps({"count": len(losses), "digest": _losses_hash(losses)}),
    }
    return {**texts, "digest": _texts_hash(texts)}


class ReferenceFile:
    """An open file; what is read of it are copies, because its tensors are the file itself."""

    def __init__(self, file: Any, texts: Mapping[str, str]) -> None:
        self._file = file
        if texts.get("format") != FORMAT:
            raise _UnknownFormatError(
                "it is a safetensors file of another kind, such as weights. Give a file that ReferenceRecorder wrote."
            )
        if texts.get("version") not in _TEXTS_OF:
            raise _UnknownFormatError(
                f"it has version {texts.get('version', '')[:20]!r} of the format, and this package reads version "
                f"{_VERSION!r}. Install the version of mlu-lightning that wrote it, or record the run again."
            )
        if set(texts) != (expected := _TEXTS_OF[texts["version"]]):
            raise ValueError(f"it does not have the metadata {', '.join(sorted(expected))}")
        if texts["digest"] != _texts_hash({name: text for name, text in texts.items() if name != "digest"}):
            raise ValueError("its metadata do not have the hash that they should have")
        self.header = ReferenceHeader.from_json(texts["header"])
        names = {field.name for field in fields(RunName)}
        self.run = RunName(**_parse_fields(texts["run"], names)) if "run" in texts else RunName({}, kept=True)
        self.digests = _parse_digests(texts["recordings"])
        self._probe = _parse_fields(texts["probe"], {"structure", "tensors", "digest"})
        self.probe_hash: str = self._probe["digest"]
        self._losses = _parse_fields(texts["losses"], {"count", "digest"})
        self._check_tensors()

    def read_recording(self, step: int) -> dict[LocationName, Tensor]:
        """Read the values at a step, in the dtype of the file."""
        recording = {name: self._file.get_tensor(f"{step}/{name}") for name in self.header.locations}
        if recording_hash(recording) != self.digests[step]:
            raise ValueError(f"the recording of step {step} does not have the hash that it should have")
        return {name: values.clone() for name, values in recording.items()}

    def read_probe(self) -> Any:
        """Read the probe batch."""
        structure, count = self._probe["structure"], len(self._probe["tensors"])
        tensors = {str(number): self._file.get_tensor(f"probe/{number}") for number in range(count)}
        probe = decode_batch(structure, tensors)
        if encoded_hash(structure, tensors) != self.probe_hash:
            raise ValueError("the probe does not have the hash that it should have")
        return clone_batch(probe)

    def read_losses(self) -> Tensor:
        """Read the training losses."""
        losses: Tensor = self._file.get_tensor("losses")
        if _losses_hash(losses) != self._losses["digest"]:
            raise ValueError("the losses do not have the hash that they should have")
        return losses.clone()

    def _check_tensors(self) -> None:
        names, locations, described = set(self._file.keys()), self.header.locations, self._probe["tensors"]
        if not isinstance(described, list):
            raise ValueError("the tensors of its probe are not a list")
        if not all(map(_is_spec, described)):
            raise ValueError("a tensor of its probe is not described by dtype and shape")
        if type(self._losses["count"]) is not int:
            raise ValueError("the number of its losses is none")
        # before they are listed: they would exhaust the memory if a file said to have very many steps and locations
        count = len(self.digests) * len(locations) + len(described) + 1
        if len(names) != count:
            raise ValueError(f"it has {len(names)} tensors, and its metadata tell of {count}")
        dtype = DTYPES[self.header.torch_dtype]
        specs = {f"{step}/{name}": [dtype, [*shape]] for step in self.digests for name, shape in locations.items()}
        specs |= {f"probe/{number}": spec for number, spec in enumerate(described)}
        specs["losses"] = ["F32", [self._losses["count"]]]
        for name, spec in specs.items():
            found = self._file.get_slice(name) if name in names else None
            if found is None or [found.get_dtype(), found.get_shape()] != spec:
                raise ValueError(f"the tensor {name[:80]!r} in it is not as it should be")


def read_reference(path: Path, read: Callable[[ReferenceFile], ReadT]) -> ReadT:
    """Read something of a file that says to be a reference, or refuse one that is something else, or damaged."""
    if path.is_dir():
        raise ValueError(f"{path} is not a readable reference: it is a folder. Give the path of the file in it.")
    try:
        return read_tensor_file(path, lambda file, texts: read(ReferenceFile(file, texts)))
    except ValueError as error:
        remedy = ". It is no reference, or was damaged or cut off on the way: copy it again, or record the run again."
        remedy = "" if isinstance(error, _UnknownFormatError) else remedy
        raise ValueError(f"{path} is not a readable reference: {error}{remedy}") from error


def is_reference(path: Path) -> bool:
    """Whether a file says to be a reference; a damaged one does not."""
    try:
        return not path.is_dir() and read_tensor_file(path, lambda file, texts: texts.get("format") == FORMAT)
    except ValueError:
        return False


def recording_hash(recording: Mapping[LocationName, Tensor]) -> str:
    """Hash the values at one step, whatever the order of the locations is."""
    return tensors_hash(sorted(recording.items()))


def listed(numbers: Sequence[int]) -> str:
    """Write numbers, without the middle ones where there are many."""
    few = numbers if len(numbers) <= 10 else [*numbers[:5], "...", *numbers[-3:]]
    return ", ".join(map(str, few))


def shorten(value: Any) -> str:
    """Write a value into an error message, cut where it is long, such as a plan."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


class _UnknownFormatError(ValueError): ...


def _parse_digests(text: str) -> dict[int, str]:
    recordings = _parse_fields(text, {"steps", "digests"})
    steps, digests = recordings["steps"], recordings["digests"]
    if not isinstance(steps, list) or not isinstance(digests, list) or len(steps) != len(digests):
        raise ValueError("its steps and their hashes are not two lists of one length")
    if not all(type(step) is int and step >= 0 for step in steps) or steps != sorted(set(steps)):
        raise ValueError("its steps do not increase from 0 on")
    return dict(zip(steps, digests, strict=True))


def _parse_fields(text: str, names: set[str]) -> dict[str, Any]:
    found = parse_json(text)
    if not isinstance(found, dict) or set(found) != names:
        raise ValueError(f"a part of its metadata does not have the fields {', '.join(sorted(names))}")
    return found


def _losses_hash(losses: Tensor) -> str:
    return tensors_hash([("losses", losses)])


def _texts_hash(texts: Mapping[str, str]) -> str:
    return tensors_hash((), json.dumps(texts, sort_keys=True))


def _with_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_size, value))


def _is_table(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) and is_right(value[key]) for key in value)


def _is_spec(value: Any) -> bool:
    if not isinstance(value, list) or [type(part) for part in value] != [str, list]:
        return False
    return all(type(size) is int for size in value[1])
