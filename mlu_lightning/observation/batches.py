"""Copy, cut, hash and save batches, in files that execute nothing when they are read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn, strided
from torch.utils._pytree import tree_leaves, tree_map_only

from mlu_lightning.utilities.tensor_files import DTYPES, read_tensor_file, tensors_hash


def clone_batch(batch: Any) -> Any:
    """Copy the tensors and the containers of a batch, which steps may change."""
    return tree_map_only(Tensor, lambda leaf: leaf.clone(), batch)


def sample_count(batch: Any) -> int | None:
    """Number of samples in a batch: the first dimension of its tensors, None if it is not the same in all."""
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
    return sizes.pop() if len(sizes) == 1 and 0 not in sizes else None


def first_samples(batch: Any, count: int) -> Any:
    """Leave only the first samples of a batch, if it can be told what they are."""
    if (sample_count(batch) or 0) <= count:
        return batch
    return tree_map_only(Tensor, lambda leaf: leaf[:count].clone(), batch)


def encode_batch(batch: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split a batch into JSON and contiguous tensors on the CPU, by the names that the JSON has.

    It may hold tensors, numbers, strings and None in mappings (which become dicts), lists and tuples.
    """
    tensors: dict[str, Tensor] = {}
    return _encode(batch, tensors, "batch", 0), tensors


def decode_batch(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put a batch together again from what :func:`encode_batch` returned, or refuse what it does not return."""
    return _decode(structure, tensors, 0)


def batch_hash(batch: Any) -> str:
    """Name the content of a batch: equal structures and values have equal hashes, on any device."""
    return encoded_hash(*encode_batch(batch))


def encoded_hash(structure: Any, tensors: Mapping[str, Tensor]) -> str:
    """Name the content of a batch that was taken apart, as :func:`batch_hash` does."""
    return tensors_hash(tensors.items(), json.dumps(structure))


def load_batch(path: str | PathLike[str]) -> Any:
    """Read a batch from a safetensors file: a tensor named "batch", or a tuple of those named "0", "1", ..., or a dict."""
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder. Give the path of a safetensors file with a batch.")
    try:
        # copies, because what is read is the file itself, which somebody may write to
        tensors = read_tensor_file(Path(path), lambda file, _: {n: file.get_tensor(n).clone() for n in [*file.keys()]})
    except ValueError as error:
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
_SEQUENCES: dict[str, Callable[..., Any]] = {"list": list, "tuple": tuple}
_REMEDY = "Give the recorder probe=..., a batch of tensors, numbers and strings in dicts, lists and tuples."


def _encode(part: Any, tensors: dict[str, Tensor], where: str, level: int) -> dict[str, Any]:
    if level > _MOST_LEVELS:
        raise ValueError(f"The batch is nested more than {_MOST_LEVELS} levels deep. {_REMEDY}")
    if isinstance(part, Tensor):
        name = str(len(tensors))
        tensors[name] = _contiguous_copy(part, where)
        return {"tensor": name}
    if isinstance(part, Mapping):
        for key in part:
            if type(key) is not str:
                kind = _type_name(key)
                raise ValueError(f"{where} has a key of type {kind}, {key!r}, and should have strings. {_REMEDY}")
        return {
            "dict": {
                key: _encode(item, tensors, f"{where}[{json.dumps(key, ensure_ascii=False)}]", level + 1)
                for key, item in part.items()
            }
        }
    # exactly these, because an instance of a subclass, such as a named tuple, would come back without its class
    if type(part) in (list, tuple):
        items = [_encode(item, tensors, f"{where}[{index}]", level + 1) for index, item in enumerate(part)]
        return {type(part).__name__: items}
    if type(part) is float and not math.isfinite(part):
        return {"float": str(part)}
    if type(part) in _LEAVES:
        return {"value": part}
    raise ValueError(f"{where} is of type {_type_name(part)}, which cannot be kept in a file. {_REMEDY}")


def _contiguous_copy(tensor: Tensor, where: str) -> Tensor:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not strided or tensor.is_meta:
        kind = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout} and type {_type_name(tensor)}"
        raise ValueError(f"{where} is a tensor {kind}, which cannot be kept in a file. {_REMEDY}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{where} is a tensor of {tensor.dtype}, which cannot be kept in a file. {_REMEDY}")
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().clone()


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


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
