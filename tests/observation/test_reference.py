"""What comes back from a reference file, and how it is read while it changes."""

import gc
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.references import HEADER, PROBE, check, losses, observation, write
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mlu_lightning.observation import Reference, StreamName, load_probe
from mlu_lightning.observation.batches import batch_hash
from mlu_lightning.observation.reference_writer import ReferenceWriter


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "some" / "folder" / "reference.safetensors"
    writer = write(path, [0, 3, 10])
    assert writer.steps == (0, 3, 10) and torch.equal(writer.losses, losses(10))
    reference = check(path, [0, 3, 10])
    assert (reference.header, reference.path, type(reference.header.depths[0])) == (HEADER, path, float)
    assert set(reference.probe) == {"x", "meta", "mask"} and torch.equal(reference.probe["x"], PROBE["x"])
    assert os.listdir(path.parent) == [path.name]
    probe, step = load_probe(path)
    assert (batch_hash(probe), step) == (batch_hash(PROBE), reference.header.runs)


def test_the_safetensors_library_reads_it(path: Path) -> None:
    write(path, [0, 3])
    expected = {f"{step}/{name}": values for step in (0, 3) for name, values in observation(step).items()}
    expected |= {"probe/0": PROBE["x"], "probe/1": PROBE["mask"], "losses": losses(3)}
    tensors = load_file(path)
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], values) for name, values in expected.items())
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "mlu_lightning.reference"
        assert json.loads(file.metadata()["header"])["depth"] == [4]


def test_bfloat16(path: Path) -> None:
    header = replace(HEADER, dtype="bfloat16")
    write(path, [0, 3], header)
    check(path, [0, 3], torch.bfloat16)
    ReferenceWriter.resume(path, header, PROBE, 3).write(4, observation(4), losses(4))
    check(path, [0, 3, 4], torch.bfloat16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_that_are_not_finite(path: Path, dtype: Any) -> None:
    header, values = replace(HEADER, dtype=dtype), observation(0)
    values["s=0"][0, 0], values["s=0"][1, 0], values["output"][0] = math.nan, -math.inf, math.inf
    ReferenceWriter(path, header, PROBE).write(0, values, torch.tensor([math.nan, 1]))
    ReferenceWriter.resume(path, header, PROBE, 1).write(1, observation(1), torch.tensor([math.nan]))
    reference = Reference.load(path)
    found = reference.read(0)
    assert torch.equal(found["s=0"].isnan(), values["s=0"].isnan())
    assert (found["s=0"][1, 0], found["output"][0]) == (-math.inf, math.inf)
    assert reference.losses.isnan().tolist() == [True]


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2)])
def test_size(path: Path, dtype: Any, item: int) -> None:
    depths, positions, embedding, outputs, steps = 5, 64, 32, 100, [0, 1, 2, 4, 8]
    locations = {StreamName(k / 4): (positions, embedding) for k in range(depths)} | {"output": (positions, outputs)}
    write(path, steps, replace(HEADER, locations=locations, dtype=dtype))
    probe = 4 * 8 + 2
    values = len(steps) * item * (depths * positions * embedding + positions * outputs) + probe + 4 * steps[-1]
    assert 0 <= os.path.getsize(path) - values < 100 * (len(steps) * len(locations) + 3) + 1500
    assert Reference.load(path).size == os.path.getsize(path)


def test_print(path: Path) -> None:
    write(path, list(range(20)))
    text = str(Reference.load(path))
    assert str(path) in text and "MB" in text and "L = 4, D = 2, M = 16 (mlp), M = 4 (attention)" in text
    assert "steps: 0, 1, 2, 3, 4, ..., 17, 18, 19 (20 recordings, 19 losses)" in text
    assert "s=0, s=0.5, output (positions: 2, 3; float32)" in text


def test_recordings_stay_in_the_file(path: Path) -> None:
    writer = write(path, list(range(10)), replace(HEADER, locations={"s=0": (1000, 100)}))
    reference = Reference.load(path)
    del writer
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is Tensor and thing.shape == (1000, 100)]
    assert reference.read(3)["s=0"].shape == (1000, 100)


def refused(message: str, reference: Reference, step: int) -> None:
    with pytest.raises(ValueError, match=message):
        reference.read(step)


def test_read_from_a_file_that_grew(path: Path) -> None:
    writer = write(path, [0, 3])
    reference = Reference.load(path)
    writer.write(5, observation(5), losses(5))
    assert torch.equal(reference.read(3)["output"], observation(3)["output"])
    refused(r"has no recording at step 5. It has some at 0, 3\.", reference, 5)


def test_read_from_a_file_of_another_run(path: Path) -> None:
    write(path, [0, 3])
    reference = Reference.load(path)
    ReferenceWriter.resume(path, HEADER, PROBE, 2).write(3, observation(4), losses(3))
    assert torch.equal(reference.read(0)["output"], observation(0)["output"])
    refused(r"was replaced after it was loaded.*step 3.*Load it again", reference, 3)
    write(path, [0], replace(HEADER, locations={"s=0": (9, 9)}))
    refused("was replaced after it was loaded", reference, 0)
    path.write_bytes(path.read_bytes()[:100])
    refused(r"is not a readable reference.*copy it again", reference, 0)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        reference.read(0)


def test_read_finds_damage_since_it_was_loaded(path: Path) -> None:
    write(path, [0])
    reference = Reference.load(path)
    content = bytearray(path.read_bytes())
    content[content.index(observation(0)["s=0"].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    refused("recording of step 0 does not have the hash", reference, 0)
