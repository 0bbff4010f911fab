"""What comes back from a reference file, and how it is read while it changes."""

from __future__ import annotations

import gc
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.references import HEADER, LOCATIONS, PROBE, check, losses, observation, write
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mlu_lightning.observation import Reference, StreamName, load_probe
from mlu_lightning.observation.batches import batch_hash
from mlu_lightning.observation.reference_writer import ReferenceWriter

# --- what is written comes back


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "some" / "folder" / "reference.safetensors"
    writer = write(path, [0, 3, 10])
    assert writer.steps == (0, 3, 10)
    assert torch.equal(writer.losses, losses(10))
    reference = check(path, [0, 3, 10])
    assert reference.header == HEADER
    assert type(reference.header.depths[0]) is float
    assert reference.path == path
    assert set(reference.probe) == {"x", "meta", "mask"}
    assert torch.equal(reference.probe["x"], PROBE["x"])
    assert os.listdir(path.parent) == [path.name]
    probe, step = load_probe(path)
    assert batch_hash(probe) == batch_hash(PROBE)
    assert step == Reference.load(path).header.runs


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    write(path, [0, 3])
    tensors = load_file(path)
    assert set(tensors) == {f"{step}/{name}" for step in (0, 3) for name in LOCATIONS} | {
        "probe/0",
        "probe/1",
        "losses",
    }
    for step in (0, 3):
        for name, values in observation(step).items():
            assert torch.equal(tensors[f"{step}/{name}"], values)
    assert torch.equal(tensors["probe/0"], PROBE["x"])
    assert torch.equal(tensors["losses"], losses(3))
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "mlu_lightning.reference"
        assert json.loads(file.metadata()["header"])["depth"] == [4]


def test_bfloat16(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    write(path, [0, 3], replace(HEADER, dtype="bfloat16"))
    check(path, [0, 3], torch.bfloat16)
    ReferenceWriter.resume(path, replace(HEADER, dtype="bfloat16"), PROBE, 3).write(4, observation(4), losses(4))
    check(path, [0, 3, 4], torch.bfloat16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_that_are_not_finite(tmp_path: Path, dtype: Any) -> None:
    path = tmp_path / "reference.safetensors"
    header = replace(HEADER, dtype=dtype)
    values = observation(0)
    values["s=0"][0, 0], values["s=0"][1, 0], values["output"][0] = math.nan, -math.inf, math.inf
    ReferenceWriter(path, header, PROBE).write(0, values, torch.tensor([math.nan, 1]))
    ReferenceWriter.resume(path, header, PROBE, 1).write(1, observation(1), torch.tensor([math.nan]))
    reference = Reference.load(path)
    assert torch.equal(reference.read(0)["s=0"].isnan(), values["s=0"].isnan())
    assert reference.read(0)["s=0"][1, 0] == -math.inf
    assert reference.read(0)["output"][0] == math.inf
    assert reference.losses.isnan().tolist() == [True]


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2)])
def test_size(tmp_path: Path, dtype: Any, item: int) -> None:
    path = tmp_path / "reference.safetensors"
    depths, positions, embedding, outputs, steps = 5, 64, 32, 100, [0, 1, 2, 4, 8]
    locations = {StreamName(k / 4): (positions, embedding) for k in range(depths)} | {"output": (positions, outputs)}
    write(path, steps, replace(HEADER, locations=locations, dtype=dtype))
    probe = 4 * 8 + 2
    values = len(steps) * item * (depths * positions * embedding + positions * outputs) + probe + 4 * steps[-1]
    assert 0 <= os.path.getsize(path) - values < 100 * (len(steps) * len(locations) + 3) + 1500
    assert Reference.load(path).size == os.path.getsize(path)


def test_print(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    write(path, list(range(20)))
    text = str(Reference.load(path))
    for part in (
        str(path),
        "MB",
        "L = 4, D = 2, M = 16 (mlp), M = 4 (attention)",
        "steps: 0, 1, 2, 3, 4, ..., 17, 18, 19 (20 recordings, 19 losses)",
        "s=0, s=0.5, output (positions: 2, 3; float32)",
    ):
        assert part in text


# --- reading lazily, while the file changes


def test_recordings_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    locations = {"s=0": (1000, 100)}
    writer = ReferenceWriter(path, replace(HEADER, locations=locations), PROBE)
    for step in range(10):
        writer.write(step, observation(step, locations), losses(step))
    reference = Reference.load(path)
    del writer
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) is Tensor and thing.shape == (1000, 100)]
    assert not tensors
    assert reference.read(3)["s=0"].shape == (1000, 100)


def test_read_from_a_file_that_grew(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    writer = write(path, [0, 3])
    reference = Reference.load(path)
    writer.write(5, observation(5), losses(5))
    assert torch.equal(reference.read(3)["output"], observation(3)["output"])
    with pytest.raises(ValueError, match=r"has no recording at step 5. It has some at 0, 3\."):
        reference.read(5)


def test_read_from_a_file_of_another_run(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    write(path, [0, 3])
    reference = Reference.load(path)
    ReferenceWriter.resume(path, HEADER, PROBE, 2).write(3, observation(4), losses(3))
    assert torch.equal(reference.read(0)["output"], observation(0)["output"])
    with pytest.raises(ValueError, match=r"was replaced after it was loaded.*step 3.*Load it again"):
        reference.read(3)
    write(path, [0], replace(HEADER, locations={"s=0": (9, 9)}))
    with pytest.raises(ValueError, match="was replaced after it was loaded"):
        reference.read(0)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"is not a readable reference.*copy it again"):
        reference.read(0)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        reference.read(0)


def test_read_finds_damage_since_it_was_loaded(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    write(path, [0])
    reference = Reference.load(path)
    content = bytearray(path.read_bytes())
    position = content.index(observation(0)["s=0"].numpy().tobytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="recording of step 0 does not have the hash"):
        reference.read(0)
