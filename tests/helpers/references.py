"""References of which a test knows all that is in them, and forged ones whose hashes are right."""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlu_lightning.observation import LocationName, Observation, OutputName, Reference, StreamName
from mlu_lightning.observation.batches import batch_hash
from mlu_lightning.observation.reference_format import ReferenceHeader
from mlu_lightning.observation.reference_writer import ReferenceWriter

LOCATIONS: dict[LocationName, tuple[int, int]] = {StreamName(0): (3, 2), StreamName(0.5): (3, 2), OutputName(): (2, 1)}
HEADER = ReferenceHeader(
    **{"depth": (4,), "embedding": (2,), "hidden": {"mlp": 16, "attention": 4}, "depths": (0.0, 0.5)},
    **{"locations": LOCATIONS, "runs": "validation_step", "data_sizes": {"tokens.weight": (7,), "bias": ()}},
    plan="alpha: 1.0\n",
)
PROBE: dict[str, Any] = {"x": torch.tensor([[1, 2], [3, 4]]), "meta": [None, "ä", math.nan, True]}
PROBE["mask"] = torch.tensor([True, False])


def observation(step: int, locations: dict[LocationName, tuple[int, int]] = LOCATIONS) -> Observation:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in locations.items()}


def losses(step: int) -> Tensor:
    return torch.arange(step, dtype=torch.float32) / 2


def write(path: Path, steps: list[int], header: ReferenceHeader = HEADER) -> ReferenceWriter:
    writer = ReferenceWriter(path, header, PROBE)
    for step in steps:
        writer.write(step, observation(step, header.locations), losses(step))
    return writer


def check(path: Path, steps: list[int], dtype: torch.dtype = torch.float32) -> Reference:
    """Everything in the file is what :func:`write` wrote."""
    reference = Reference.load(path)
    assert reference.steps == tuple(steps)
    assert torch.equal(reference.losses, losses(steps[-1]))
    assert reference.probe_hash == batch_hash(reference.probe) == batch_hash(PROBE)
    for step in steps:
        read = reference.read(step)
        assert list(read) == list(LOCATIONS)
        for name, values in observation(step).items():
            assert read[name].dtype == torch.float32
            assert torch.equal(read[name], values.to(dtype).float())
    return reference


def everything(path: Path) -> Any:
    reference = Reference.load(path)
    read = {step: {name: value.tolist() for name, value in reference.read(step).items()} for step in reference.steps}
    return reference.header, reference.steps, reference.losses.tolist(), batch_hash(reference.probe), read


@contextmanager
def deep() -> Iterator[None]:
    """Let what is nested deeply be written, wherever in the stack the test is run."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


@deep()
def forge(content: bytes, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> bytes:
    """Change the entries and the parsed metadata of a file, and make the hash of the metadata right again."""
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    texts = entries.pop("__metadata__")
    parsed = {name: json.loads(texts[name]) for name in ("run", "header", "probe", "recordings", "losses")}
    change(entries, parsed)
    texts.update({name: value if isinstance(value, str) else json.dumps(value) for name, value in parsed.items()})
    del texts["digest"]
    if "run" not in parsed:  # as version 1 had none
        del texts["run"]
        texts["version"] = "1"
    texts["digest"] = hashlib.sha256(json.dumps(json.dumps(texts, sort_keys=True)).encode()).hexdigest()
    header = json.dumps({"__metadata__": texts, **entries}).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


class Harmful:  # makes a file when it is unpickled
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)
