"""Write named tensors to a safetensors file that a run replaces again and again, and read it at any moment.

The safetensors library writes, parses and checks the format, and nothing in a file is executed; what is here puts a new
file in the place of an older one at once, and reads one that may be replaced meanwhile.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from stat import S_ISREG
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mlu_lightning.utilities.whole_files import write_whole

DTYPES = {  # what a tensor can hold, with its name in the file
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

ReadT = TypeVar("ReadT")
_LONGEST_HEADER = 2**25  # bytes; one of JSON takes up to 25 in memory, and a tensor has about 100


def read_tensor_file(path: Path, read: Callable[[Any, dict[str, str]], ReadT]) -> ReadT:
    """Call a function with the open ``safe_open`` of a file and its metadata; tensors are the mapped file itself.

    safetensors opens a path twice, so the function is called again if the file was replaced in between.
    """
    while True:
        before = _version(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if sum(map(len, metadata.values())) > _LONGEST_HEADER:
                    raise ValueError(f"its metadata are longer than the {_LONGEST_HEADER} bytes that are read")
                return read(file, metadata)
        except (SafetensorError, RuntimeError, ValueError) as error:  # the second is torch's, which maps the file
            if _version(path) != before:
                continue
            if not isinstance(error, ValueError):
                raise ValueError(f"it is not a whole safetensors file ({str(error)[:200]})") from error
            raise


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in the place of an older one, which stays as it is until the new one is complete."""
    content = save(dict(tensors), dict(metadata))
    header = int.from_bytes(content[:8], "little")
    if header > _LONGEST_HEADER:
        raise OSError(f"{path} would have a header of {header} bytes, and at most {_LONGEST_HEADER} are read")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole({path: content})


def tensors_hash(tensors: Iterable[tuple[str, Tensor]], text: str = "") -> str:
    """Hash names, dtypes, shapes and values of tensors, and a text before them, to the digits of a SHA-256."""
    hasher = hashlib.sha256(json.dumps(text).encode())
    for name, tensor in tensors:
        # JSON shows where it ends, and dtype and shape tell where the values end
        hasher.update(json.dumps([name, DTYPES[tensor.dtype], tensor.shape]).encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def parse_json(text: str) -> Any:
    """Read JSON that somebody else has written, without numbers that JSON does not know (NaN)."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError("a part of it that should be JSON is not") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _version(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    if not S_ISREG(status.st_mode):  # reading a pipe would wait for somebody to write to it
        raise ValueError("it is no file, but a folder, a device or a pipe")
    return status.st_ino, status.st_mtime_ns, status.st_size
