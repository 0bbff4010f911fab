"""Batches as tensors and JSON, so that they can be kept in a file that executes nothing when it is read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn, strided

from mlu_lightning.utilities.tensor_files import DTYPES, tensors_hash

__all__ = ["batch_hash", "decode_batch", "encode_batch", "encoded_hash", "load_batch"]


def encode_batch(batch: Any) -> tuple[Any, dict[str, Tensor]]:
    """Take a batch apart into JSON and tensors.

    Args:
        batch: tensors, numbers, strings and None in dicts (or other mappings, which come back as dicts), lists and
            tuples. Other classes, also named tuples, would not come back as what they are.

    Returns:
        The structure, as JSON knows it (the names of ``json.dumps``), and the tensors that it mentions, by name:
        contiguous copies on the CPU.

    Raises:
        ValueError: if there is anything else in it, saying where.

    >>> import torch
    >>> encode_batch([torch.ones(1), {"labels": None}])
    ({'list': [{'tensor': '0'}, {'dict': {'labels': {'value': None}}}]}, {'0': tensor([1.])})
    """
    tensors: dict[str, Tensor] = {}
    return _encode(batch, tensors, "batch", 0), tensors


def decode_batch(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put a batch together again.

    Args:
        structure: from :func:`encode_batch`.
        tensors: from there too.

    Returns:
        The batch, with the given tensors in it.

    Raises:
        ValueError: if the structure is not one, or mentions a tensor that is not there.

    >>> import torch
    >>> decode_batch(*encode_batch((torch.ones(1), 2.5, "text")))
    (tensor([1.]), 2.5, 'text')
    """
    return _decode(structure, tensors, 0)


def batch_hash(batch: Any) -> str:
    """Name the content of a batch: batches of equal structure and equal values have equal hashes, on any device.

    Args:
        batch: as for :func:`encode_batch`.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: as :func:`encode_batch`.

    >>> import torch
    >>> batch_hash([torch.zeros(2)]) == batch_hash([torch.zeros(2, 2)[0]])
    True
    """
    return encoded_hash(*encode_batch(batch))


def encoded_hash(structure: Any, tensors: Mapping[str, Tensor]) -> str:
    """Name the content of a batch that was taken apart, as :func:`batch_hash` does.

    Args:
        structure: from :func:`encode_batch`.
        tensors: from there too.

    >>> encoded_hash(*encode_batch([1.5])) == batch_hash([1.5])
    True
    """
    return tensors_hash(tensors.items(), json.dumps(structure))


def load_batch(path: str | PathLike[str]) -> Any:
    """Read a batch from a safetensors file, such as ``safetensors.torch.save_file`` writes.

    Args:
        path: of the file.

    Returns:
        The tensor, if there is one by the name of ``"batch"`` and no other; a tuple, if their names are ``"0"``,
        ``"1"`` and so on; otherwise a dict by their names.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is not a safetensors file, or has no tensors.

    >>> import torch
    >>> from tempfile import TemporaryDirectory
    >>> from safetensors.torch import save_file
    >>> with TemporaryDirectory() as folder:
    ...     save_file({"0": torch.ones(1), "1": torch.zeros(2)}, f"{folder}/probe.safetensors")
    ...     load_batch(f"{folder}/probe.safetensors")
    (tensor([1.]), tensor([0., 0.]))
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder. Give the path of a safetensors file with a batch.")
    try:
        with safe_open(path, framework="pt") as file:
            # copies, because what is read is the file itself, which somebody may write to; a safe_open has keys() only
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a safetensors file with a batch: {error}. Write one with "
            'safetensors.torch.save_file({"batch": tensor}, path), or with the names "0", "1", ... for a tuple of '
            "tensors, or those of a dict."
        ) from error
    if not tensors:
        raise ValueError(f"{path} holds no tensors. Write a batch with safetensors.torch.save_file(...).")
    if set(tensors) == {"batch"}:
        return tensors["batch"]
    numbers = [str(number) for number in range(len(tensors))]
    return tuple(tensors[number] for number in numbers) if set(tensors) == set(numbers) else tensors


_MOST_LEVELS = 32
_LEAVES = (str, int, float, bool, type(None))


def _encode(part: Any, tensors: dict[str, Tensor], where: str, level: int) -> dict[str, Any]:
    if level > _MOST_LEVELS:
        raise ValueError(f"The batch is nested more than {_MOST_LEVELS} levels deep. {_REMEDY}")
    if isinstance(part, Tensor):
        name = str(len(tensors))
        tensors[name] = _plain_tensor(part, where)
        return {"tensor": name}
    if isinstance(part, Mapping):
        for key in part:
            if type(key) is not str:
                raise ValueError(f"{where} has a key of type {_name(key)}, {key!r}, and should have strings. {_REMEDY}")
        return {"dict": {key: _encode(part[key], tensors, f"{where}[{_quoted(key)}]", level + 1) for key in part}}
    # exactly these, because an instance of a subclass, such as a named tuple, would come back without its class
    if type(part) in (list, tuple):
        items = [_encode(item, tensors, f"{where}[{index}]", level + 1) for index, item in enumerate(part)]
        return {type(part).__name__: items}
    if type(part) is float and not math.isfinite(part):
        return {"float": str(part)}
    if type(part) in _LEAVES:
        return {"value": part}
    raise ValueError(f"{where} is of type {_name(part)}, which cannot be kept in a file. {_REMEDY}")


def _plain_tensor(tensor: Tensor, where: str) -> Tensor:
    """A contiguous copy on the CPU."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not strided or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout} and type {_name(tensor)}"
        raise ValueError(f"{where} is a tensor {kind}, which cannot be kept in a file. {_REMEDY}")
    if tensor.dtype not in DTYPES.values():
        raise ValueError(f"{where} is a tensor of {tensor.dtype}, which cannot be kept in a file. {_REMEDY}")
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.clone()


def _decode(node: Any, tensors: Mapping[str, Tensor], level: int) -> Any:
    if not isinstance(node, dict) or len(node) != 1 or level > _MOST_LEVELS:
        raise ValueError("the structure of a batch in it is not one")
    ((kind, content),) = node.items()
    if kind == "tensor" and isinstance(content, str) and content in tensors:
        return tensors[content]
    if kind == "dict" and isinstance(content, dict):
        return {key: _decode(item, tensors, level + 1) for key, item in content.items()}
    if kind in _SEQUENCES and isinstance(content, list):
        return _SEQUENCES[kind](_decode(item, tensors, level + 1) for item in content)
    if kind == "float" and content in ("nan", "inf", "-inf"):
        return float(content)
    if kind == "value" and type(content) in _LEAVES:
        return content
    raise ValueError(f"the structure of a batch in it has a part {kind[:80]!r} that is not one")


_SEQUENCES: dict[str, Callable[..., Any]] = {"list": list, "tuple": tuple}
_REMEDY = "Give the recorder probe=..., a batch of tensors, numbers and strings in dicts, lists and tuples."


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _quoted(key: str) -> str:
    return json.dumps(key, ensure_ascii=False)
