"""Named tensors and texts in one safetensors file, which can be read at any moment while a run writes it again and again.

The format is that of the safetensors library, whose functions read these files too. They do not serve here: its reader
opens a path twice, and the file may have been replaced in between; its writer leaves a temporary file of an unknown
name, which only its owner may read, when it is killed. Nothing in a file is executed, and nothing in it is believed: a
reader says which tensors it expects.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPES", "TensorFile", "TensorSpec", "parse_json", "tensors_hash", "write_tensors"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What a tensor can hold, by its name in the file."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LONGEST_HEADER = 2**25  # bytes; one of JSON takes up to 25 in memory, and a tensor has about 100
_MOST_DIMENSIONS = 64
_LARGEST = 2**62  # entries, with which strides in bytes are still 64-bit integers


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor without its values.

    Args:
        dtype: one of the names in :data:`DTYPES`.
        shape: its sizes.

    Raises:
        ValueError: if there can be no such tensor.

    >>> TensorSpec.of(torch.ones(2, 3)), TensorSpec("BF16", (2, 3)).size
    (TensorSpec(dtype='F32', shape=(2, 3)), 12)
    """

    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise ValueError(f"there is no dtype {repr(self.dtype)[:80]}")
        sizes = len(self.shape) <= _MOST_DIMENSIONS and all(type(size) is int and size >= 0 for size in self.shape)
        if not sizes or math.prod(max(size, 1) for size in self.shape) > _LARGEST // 8:
            raise ValueError("there is no tensor of such a shape")

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Describe a tensor.

        Args:
            tensor: of one of the dtypes in :data:`DTYPES`.
        """
        return cls(_CODES[tensor.dtype], tuple(tensor.shape))

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return DTYPES[self.dtype].itemsize * math.prod(self.shape)


class TensorFile:
    """An open safetensors file, whose tensors are read one at a time, after :meth:`check`.

    Args:
        file: open for reading in binary mode; it may be replaced under its path afterwards.

    Raises:
        ValueError: if it is not a safetensors file, saying what is wrong.

    >>> from tempfile import TemporaryFile
    >>> with TemporaryFile() as file:
    ...     _ = file.write((2).to_bytes(8, "little") + b"{}")
    ...     TensorFile(file).metadata
    {}
    """

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self.size = file.seek(0, os.SEEK_END)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        self._start = 8 + length
        if self.size < 8 or not 2 <= length <= _LONGEST_HEADER or self.size < self._start:
            raise ValueError("it does not begin with the header of a safetensors file, or ends within it")
        header = parse_json(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._entries: dict[str, Any] = header
        self._specs: Mapping[str, TensorSpec] = {}
        self._offsets: dict[str, int] = {}
        if not isinstance(self.metadata, dict) or not all(isinstance(text, str) for text in self.metadata.values()):
            raise ValueError("the metadata in its header are not texts")

    @property
    def count(self) -> int:
        """Number of tensors that it says to hold."""
        return len(self._entries)

    def check(self, specs: Mapping[str, TensorSpec]) -> None:
        """Refuse a file that does not hold these tensors and nothing else, as :func:`write_tensors` writes them.

        Args:
            specs: by name.

        Raises:
            ValueError: with the first difference.
        """
        expected = _layout(specs)
        for name in sorted(self._entries.keys() | expected.keys()):
            # as texts, because to Python true and 1.0 are 1
            if _text(self._entries.get(name)) != _text(expected.get(name)):
                raise ValueError(f"the tensor {name[:80]!r} in it is not as it should be")
        size = self._start + sum(spec.size for spec in specs.values())
        if self.size != size:
            raise ValueError(f"it has {self.size} bytes and should have {size}")
        self._specs = specs
        self._offsets = {name: self._start + entry["data_offsets"][0] for name, entry in expected.items()}

    def read(self, name: str) -> Tensor:
        """Read the values of a tensor.

        Args:
            name: of one of those that were given to :meth:`check`.

        Raises:
            ValueError: if the file ends before.
        """
        spec = self._specs[name]
        if spec.size == 0:
            return torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
        values = bytearray(spec.size)
        self._file.seek(self._offsets[name])
        if self._file.readinto(values) < spec.size:
            raise ValueError("it became shorter while it was read")
        return torch.frombuffer(values, dtype=DTYPES[spec.dtype]).reshape(spec.shape)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in the place of an older one, which stays as it is until the new one is complete.

    Args:
        path: of the file; folders on the way are made.
        tensors: on the CPU, by name.
        metadata: texts.

    Raises:
        OSError: if it cannot be written; an older file is intact then.

    >>> from tempfile import TemporaryDirectory
    >>> from safetensors.torch import load_file
    >>> with TemporaryDirectory() as folder:
    ...     write_tensors(Path(folder, "a.safetensors"), {"ones": torch.ones(2)}, {})
    ...     load_file(Path(folder, "a.safetensors"))
    {'ones': tensor([1., 1.])}
    """
    layout = _layout({name: TensorSpec.of(tensor) for name, tensor in tensors.items()})
    header = json.dumps({"__metadata__": dict(metadata), **layout}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > _LONGEST_HEADER:
        raise OSError(f"{path} would have a header of {len(header)} bytes, and at most {_LONGEST_HEADER} are read")
    path.parent.mkdir(parents=True, exist_ok=True)
    # always the same name, so that what a killed process left behind is overwritten by the next
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        # no fsync: what a killed process has written is not lost, the system has it. Only a power failure may lose or
        # garble the last file, which readers find out.
        with temporary.open("wb") as file:
            file.write(len(header).to_bytes(8, "little"))
            file.write(header)
            for name in layout:
                file.write(_bytes_of(tensors[name]))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def tensors_hash(tensors: Iterable[tuple[str, Tensor]], text: str = "") -> str:
    """Hash names, dtypes, shapes and values of tensors, and a text before them.

    Args:
        tensors: with their names, in an order that is always the same.
        text: anything.

    Returns:
        64 hexadecimal digits, of SHA-256.

    >>> tensors_hash([("x", torch.zeros(2, 3))]) == tensors_hash([("x", torch.zeros(3, 2))])
    False
    """
    hasher = hashlib.sha256(json.dumps(text).encode())
    for name, tensor in tensors:
        spec = TensorSpec.of(tensor)
        # JSON shows where it ends, and dtype and shape tell where the values end
        hasher.update(json.dumps([name, spec.dtype, spec.shape]).encode())
        hasher.update(_bytes_of(tensor.detach().cpu()))
    return hasher.hexdigest()


def parse_json(text: str | bytes) -> Any:
    """Read JSON that somebody else has written.

    Args:
        text: JSON, UTF-8 as bytes.

    Raises:
        ValueError: if it is not JSON, nested too deeply, or has numbers that JSON does not know (NaN).

    >>> parse_json('[1, "a"]')
    [1, 'a']
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError("a part of it that should be JSON is not") from error


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _layout(specs: Mapping[str, TensorSpec]) -> dict[str, dict[str, Any]]:
    """Entries of the header in the order of the values: larger numbers first, so that all are aligned, then by name."""
    entries = {}
    start = 0
    for name, spec in sorted(specs.items(), key=lambda item: (-DTYPES[item[1].dtype].itemsize, item[0])):
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, start + spec.size]}
        start += spec.size
    return entries


def _bytes_of(tensor: Tensor) -> memoryview:
    """Values of a tensor on the CPU, in row-major order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
