"""The reference file: what comes back from it, and all the ways in which it can be broken, interrupted and forged."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlu_lightning.models import ResNet
from mlu_lightning.observation.batches import batch_hash
from mlu_lightning.observation.reference import Reference, ReferenceHeader, ReferenceWriter, load_probe
from mlu_lightning.planning.plan import Plan
from mlu_lightning.table import Ratios, Role

LOCATIONS = {"s=0": (3, 2), "s=0.5": (3, 2), "output": (2, 1)}
HEADER = ReferenceHeader(
    depth=(4,),
    embedding=(2,),
    hidden={"mlp": 16, "attention": 4},
    depths=(0.0, 0.5),
    locations=LOCATIONS,
    runs="validation_step",
    data_sizes={"tokens.weight": (7,), "bias": ()},
    plan="alpha: 1.0\n",
)
PROBE: dict[str, Any] = {
    "x": torch.tensor([[1, 2], [3, 4]]),
    "meta": [None, "ä", math.nan, True],
    "mask": torch.tensor([True, False]),
}


def observation(step: int, locations: dict[str, tuple[int, int]] = LOCATIONS) -> dict[str, Tensor]:
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


def test_writer_copies(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    probe = torch.ones(2)
    writer = ReferenceWriter(path, HEADER, probe)
    values, loss = observation(0), losses(1)
    values["s=0"] = values["s=0"].T.contiguous().T
    writer.write(0, values, loss)
    for tensor in (*values.values(), loss, probe):
        tensor.fill_(9)
    writer.write(1, observation(1), losses(1))
    assert torch.equal(Reference.load(path).read(0)["s=0"], observation(0)["s=0"])
    assert torch.equal(Reference.load(path).probe, torch.ones(2))


def test_permissions_are_those_of_any_file(tmp_path: Path) -> None:
    write(tmp_path / "reference", [0])
    (tmp_path / "other").touch()
    assert (tmp_path / "reference").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2)])
def test_size(tmp_path: Path, dtype: Any, item: int) -> None:
    path = tmp_path / "reference.safetensors"
    depths, positions, embedding, outputs, steps = 5, 64, 32, 100, [0, 1, 2, 4, 8]
    locations = {f"s={depth}": (positions, embedding) for depth in range(depths)} | {"output": (positions, outputs)}
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


# --- what a writer and a header refuse


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": (0,)}, r"depth=\(0,\) .* whole numbers from 1"),
        ({"depth": [4]}, "depth="),
        ({"depth": (True,)}, "depth="),
        ({"embedding": 4}, "embedding=4"),
        ({"hidden": {"mlp": 1.0}}, "hidden="),
        ({"hidden": {1: 1}}, "hidden="),
        ({"depths": (0.5, 1.5)}, "depths=.* from 0 to 1"),
        ({"depths": (math.nan,)}, "depths="),
        ({"locations": {"s=0": (3,)}}, "locations=.*positions, dimension"),
        ({"locations": {"s=0": (3, 0)}}, "locations="),
        ({"locations": {"s=0": 3}}, "locations="),
        ({"runs": "test_step"}, "runs='test_step' .*'training_step' or 'validation_step'"),
        ({"data_sizes": {"w": (-1,)}}, "data_sizes="),
        ({"plan": 1}, "plan=1"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"dtype": {}}, "dtype="),
    ],
)
def test_header_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(HEADER, **change)


def test_writer_refuses(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    with pytest.raises(ValueError, match=r'batch\["x"\] is of type set.*probe='):
        ReferenceWriter(path, HEADER, {"x": {1}})
    writer = ReferenceWriter(path, HEADER, PROBE)
    with pytest.raises(ValueError, match="Step -1 cannot be recorded"):
        writer.write(-1, observation(0), losses(0))
    writer.write(3, observation(3), losses(3))
    wrong: list[tuple[int, dict[str, Tensor], Tensor, str]] = [
        (3, observation(3), losses(3), "Step 3 cannot be recorded after step 3: steps have to increase"),
        (2, observation(3), losses(3), "Step 2 cannot be recorded after step 3"),
        (4, observation(4) | {"s=1": torch.ones(3, 2)}, losses(4), "the header says.*same probe"),
        (4, {"s=0": torch.ones(3, 2)}, losses(4), "the header says"),
        (4, observation(4) | {"output": torch.ones(1, 1)}, losses(4), r"'output': \(1, 1\).*the header says"),
        (4, observation(4) | {"output": torch.ones(2, 1).double()}, losses(4), r"torch.float64.*\.float\(\)"),
        (4, observation(4), losses(4).long(), r"torch.int64.*\.float\(\)"),
        (4, observation(4), losses(4)[None], "of 2"),
    ]
    for step, values, loss, message in wrong:
        with pytest.raises(ValueError, match=message):
            writer.write(step, values, loss)
    check(path, [3])
    writer.write(4, observation(4), losses(4))
    check(path, [3, 4])


# --- going on


def test_resume_drops_what_came_after(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    write(path, [0, 3, 10])
    before = path.read_bytes()
    writer = ReferenceWriter.resume(path, HEADER, PROBE, 5)
    assert path.read_bytes() == before
    assert writer.steps == (0, 3)
    assert torch.equal(writer.losses, losses(5))
    writer.write(6, observation(6), losses(6))
    check(path, [0, 3, 6])
    assert ReferenceWriter.resume(path, HEADER, PROBE, 6).steps == (0, 3, 6)
    assert ReferenceWriter.resume(path, HEADER, PROBE, 2).steps == (0,)


def test_a_resumed_file_is_that_of_one_run(tmp_path: Path) -> None:
    write(tmp_path / "whole", [0, 3, 6, 9])
    write(tmp_path / "parts", [0, 3, 5])
    # the order of locations in a header is of no importance
    header = replace(HEADER, locations=dict(reversed(LOCATIONS.items())))
    writer = ReferenceWriter.resume(tmp_path / "parts", header, PROBE, 4)
    for step in (6, 9):
        writer.write(step, observation(step), losses(step))
    check(tmp_path / "whole", [0, 3, 6, 9])
    parts = Reference.load(tmp_path / "parts")
    assert parts.digests == Reference.load(tmp_path / "whole").digests
    assert parts.header == HEADER
    assert torch.equal(parts.losses, losses(9))


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    write(path, [0])
    other = replace(HEADER, depth=(8,), plan=None)
    message = r"its depth is \(4,\) instead of \(8,\); it has a plan and this run has none\. Give"
    with pytest.raises(ValueError, match=message):
        ReferenceWriter.resume(path, other, PROBE, 0)
    with pytest.raises(
        ValueError, match=r"its probe has other values. Give the recorder another path, or delete the file"
    ):
        ReferenceWriter.resume(path, HEADER, PROBE | {"x": PROBE["x"] + 1}, 0)
    with pytest.raises(FileNotFoundError):
        ReferenceWriter.resume(tmp_path / "none", HEADER, PROBE, 0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not a readable reference"):
        ReferenceWriter.resume(path, HEADER, PROBE, 0)


@pytest.mark.parametrize(
    ("own", "difference"),
    [
        (lambda plan: None, "it has a plan and this run has none"),
        (lambda plan: replace(plan, alpha=2.0), "its plan has '1.0' instead of '2.0' at alpha"),
        (
            lambda plan: edited(plan, "readout.weight", role=Role.EMBEDDING),
            "'readout' instead of 'embedding' at parameters: readout.weight: role",
        ),
        (
            lambda plan: edited(plan, "readout.weight", base_std=9.0, ratios=Ratios(inputs=3.0)),
            "its plan has '2.0' instead of '3.0' at parameters: readout.weight: ratios: inputs",
        ),
        (
            lambda plan: replace(plan, multipliers=(replace(plan.multipliers[0], value=0.125), *plan.multipliers[1:])),
            "its plan has '0.5' instead of '0.125' at multipliers: blocks.0: value",
        ),
        (
            lambda plan: replace(plan, parameters=dict([*plan.parameters.items()][1:])),
            r"its plan has \['embed.weight'\] instead of \[\] at parameters",
        ),
    ],
)
def test_resume_says_where_plans_differ(own: Any, difference: str, tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    first, again = (Plan.from_model(ResNet(2, 8, 4, 3, 2), base=ResNet(1, 4, 2, 3, 2)) for _ in range(2))
    header = replace(HEADER, plan=first.to_yaml())
    write(path, [0, 3], header)
    # a base that is drawn anew has another std, which only initialization uses, and the run goes on from another
    redrawn = replace(again, warnings=("something",))
    assert redrawn != first
    ReferenceWriter.resume(path, replace(HEADER, plan=redrawn.to_yaml()), PROBE, 3).write(4, observation(4), losses(4))
    assert Reference.load(path).header == header
    other = own(redrawn)
    with pytest.raises(
        ValueError, match=rf"is the reference of another run: .*{difference}\. Give the recorder another"
    ):
        ReferenceWriter.resume(path, replace(HEADER, plan=other and other.to_yaml()), PROBE, 0)
    with pytest.raises(ValueError, match=r"it has no plan and this run has one\. Give the recorder another"):
        write(tmp_path / "plain", [0], replace(HEADER, plan=None))
        ReferenceWriter.resume(tmp_path / "plain", header, PROBE, 0)


def edited(plan: Plan, name: str, **changes: Any) -> Plan:
    return replace(plan, parameters=plan.parameters | {name: replace(plan.parameters[name], **changes)})


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


# --- damage


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "reference"
    write(path, [0, 1])
    return path.read_bytes()


def everything(path: Path) -> Any:
    """All that a file says, in a form that can be compared."""
    reference = Reference.load(path)
    read = {step: {name: value.tolist() for name, value in reference.read(step).items()} for step in reference.steps}
    return reference.header, reference.steps, reference.losses.tolist(), batch_hash(reference.probe), read


def raises_or_is(path: Path, content: bytes, expected: Any) -> bool:
    """Whether reading raises; otherwise it gives what is expected."""
    path.unlink(missing_ok=True)  # some file systems wait for the disk when a file is overwritten
    path.write_bytes(content)
    try:
        found = everything(path)
    except ValueError as error:
        assert f"{path} is not a readable reference: " in str(error)
        return True
    assert found == expected
    return False


def test_cut_at_every_length(tmp_path: Path, content: bytes) -> None:
    for length in range(len(content)):
        assert raises_or_is(tmp_path / "cut", content[:length], None)
    assert raises_or_is(tmp_path / "longer", content + b"\0", None)


@pytest.mark.parametrize("mask", [0x01, 0x08, 0xFF])
def test_every_flipped_byte(tmp_path: Path, content: bytes, mask: int) -> None:
    path = tmp_path / "flipped"
    path.write_bytes(content)
    expected = everything(path)
    flipped = bytearray(content)
    harmless = []
    for position in range(len(content)):
        flipped[position] ^= mask
        if not raises_or_is(path, bytes(flipped), expected):
            harmless.append(position)
        flipped[position] ^= mask
    start = 8 + int.from_bytes(content[:8], "little")
    assert all(content[position : position + 1] == b" " and position < start for position in harmless)


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage(tmp_path: Path, content: bytes, data: st.DataObject) -> None:
    path = tmp_path / "fuzzed"
    path.write_bytes(content)
    expected = everything(path)
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.one_of(st.just(start), st.integers(start, min(len(content), start + 40))))
    pieces = st.one_of(
        st.binary(max_size=40),
        st.text(alphabet='0123456789{}[]",:-.eE ', max_size=20).map(str.encode),
        st.integers(0, len(content) - 20).map(lambda at: content[at : at + 20]),
    )
    raises_or_is(path, content[:start] + data.draw(pieces) + content[end:], expected)


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_files_that_are_something_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "reference.safetensors"
    for wrong in (b"", b"1234567", pickle.dumps(Harmful(tmp_path / "harm")), struct.pack("<Q", 2**63) + bytes(99)):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"is not a readable reference: .*safetensors.*copy it again, or record"):
            Reference.load(path)
    assert not (tmp_path / "harm").exists()
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"of another kind, such as weights. Give a file that ReferenceRecorder wrote"):
        Reference.load(path)
    save_file({"weight": torch.ones(2)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="of another kind"):
        Reference.load(path)
    path.write_bytes(content.replace(b'"version":"1"', b'"version":"7"'))
    with pytest.raises(ValueError, match=r"has version '7'.*reads version '1'. Install the version"):
        Reference.load(path)
    with pytest.raises(ValueError, match=r"it is a folder. Give the path of the file"):
        Reference.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Reference.load(tmp_path / "none")


# --- forged files: their hashes are right


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
    parsed = {name: json.loads(texts[name]) for name in ("header", "probe", "recordings", "losses")}
    change(entries, parsed)
    texts.update({name: value if isinstance(value, str) else json.dumps(value) for name, value in parsed.items()})
    del texts["digest"]
    texts["digest"] = hashlib.sha256(json.dumps(json.dumps(texts, sort_keys=True)).encode()).hexdigest()
    header = json.dumps({"__metadata__": texts, **entries}).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def test_forging_works(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "forged").write_bytes(forge(content, lambda entries, parsed: parsed["header"].update(plan=None)))
    assert Reference.load(tmp_path / "forged").header == replace(HEADER, plan=None)


def swap(entries: dict[str, Any], a: str, b: str) -> None:
    entries[a], entries[b] = entries[b], entries[a]


def nested_list(levels: int) -> list[Any]:
    value: list[Any] = json.loads("[" * levels + "]" * levels)
    return value


FORGERIES: list[tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = [
    (lambda e, p: swap(e, "0/s=0", "1/s=0"), "the tensor '0/s=0' in it is not as it should be"),
    (lambda e, p: swap(e, "0/s=0", "0/s=0.5"), "not as it should be"),
    (lambda e, p: e["0/s=0"].update(shape=[2, 3]), "not as it should be"),
    (lambda e, p: e["0/s=0"].update(dtype="I32"), "not as it should be"),
    (lambda e, p: e["0/output"].update(shape=[2, True]), "the tensor '0/output' in it is not as it should be"),
    (lambda e, p: e["0/output"].update(shape=[2.0, 1.0]), "the tensor '0/output' in it is not as it should be"),
    (lambda e, p: e["0/s=0"].update(data_offsets=[0, 2**62]), "not as it should be"),
    (lambda e, p: e["0/s=0"].update(data_offsets=e["0/s=0.5"]["data_offsets"]), "not as it should be"),
    (lambda e, p: e.update({"0/s=1": e.pop("0/s=0")}), "not as it should be"),
    (lambda e, p: e.pop("losses"), "it has 8 tensors, and its metadata tell of 9"),
    (lambda e, p: e.update(more=e["losses"]), "it has 10 tensors"),
    (lambda e, p: p["recordings"]["digests"].reverse(), "recording of step 0 does not have the hash"),
    (lambda e, p: p["recordings"]["digests"].pop(), "not two lists of one length"),
    (lambda e, p: p["recordings"]["steps"].reverse(), "steps do not increase"),
    (lambda e, p: p["recordings"].update(steps=[0, 0]), "steps do not increase"),
    (lambda e, p: p["recordings"].update(steps=[-1, 0]), "steps do not increase"),
    (lambda e, p: p["recordings"].update(steps=[0.0, 1.0]), "steps do not increase"),
    (lambda e, p: p["recordings"].update(steps=[False, True]), "steps do not increase"),
    (lambda e, p: p["recordings"].update(steps=[0, 2]), "not as it should be"),
    (lambda e, p: p["recordings"].update(steps="01"), "not two lists"),
    (lambda e, p: p["recordings"].update(steps=list(range(10**5)), digests=[""] * 10**5), "it has 9 tensors"),
    (lambda e, p: p["header"]["locations"].update({"s=0": [2, 3]}), "not as it should be"),
    (lambda e, p: p["header"]["locations"].update({"s=0": [10**8, 10**8]}), "not as it should be"),
    (lambda e, p: p["header"]["locations"].update({"s=0": [10**12, 10**12]}), "no tensor of such a shape"),
    (lambda e, p: p["header"]["locations"].update({"s=0": [0, 2]}), "locations="),
    (lambda e, p: p["header"].update(depths=[math.nan]), "should be JSON is not"),
    (lambda e, p: p["header"].update(dtype="bfloat16"), "not as it should be"),
    (lambda e, p: p["header"].update(dtype="float64"), "dtype='float64'"),
    (lambda e, p: p["header"].update(dtype=[]), "dtype="),
    (lambda e, p: p["header"].update(extra=1), "does not have the fields"),
    (lambda e, p: p["header"].pop("plan"), "does not have the fields"),
    (lambda e, p: p.update(header=[]), "does not have the fields"),
    (lambda e, p: p.update(header="[" * 100_000), "should be JSON is not"),
    (lambda e, p: p.update(header="[" * 900 + "]" * 900), "does not have the fields"),
    (lambda e, p: p["header"].update(depth=nested_list(950)), "depth=|recursion|JSON"),
    (lambda e, p: p["probe"]["tensors"][0].__setitem__(0, nested_list(950)), "dtype|recursion|JSON"),
    (lambda e, p: p.update(header='{"depth": 1e999}'), "does not have the fields"),
    (lambda e, p: p["losses"].update(count=7), "not as it should be"),
    (lambda e, p: p["losses"].update(count=-1), "no tensor of such a shape"),
    (lambda e, p: p["losses"].update(count=1.0), "no tensor of such a shape"),
    (lambda e, p: p["losses"].update(digest=None), "losses do not have the hash"),
    (lambda e, p: p["probe"].update(digest=""), "probe does not have the hash"),
    (lambda e, p: p["probe"].update(structure={"tensor": "0"}), "probe does not have the hash"),
    (lambda e, p: p["probe"].update(structure={"tensor": "7"}), "structure of a batch"),
    (lambda e, p: p["probe"].update(structure={"value": []}), "structure of a batch"),
    (
        lambda e, p: p["probe"].update(structure=json.loads('{"list": [' * 450 + '{"value": 1}' + "]}" * 450)),
        "structure",
    ),
    (lambda e, p: p["probe"].update(tensors={}), "not a list"),
    (lambda e, p: p["probe"]["tensors"].pop(), "it has 9 tensors"),
    (lambda e, p: p["probe"].update(tensors=[1, 2]), "not described by dtype and shape"),
    (lambda e, p: p["probe"]["tensors"][0].__setitem__(0, "I32"), "not as it should be"),
    (lambda e, p: p["probe"]["tensors"][0].__setitem__(0, []), r"no dtype \[\]"),
    (lambda e, p: p["probe"]["tensors"][0].__setitem__(0, "I128"), "no dtype 'I128'"),
    (lambda e, p: p["probe"]["tensors"][0].__setitem__(1, [0, 2**40, 2**40]), "no tensor of such a shape"),
    (lambda e, p: p["probe"]["tensors"][0].__setitem__(1, [1] * 10**4), "no tensor of such a shape"),
    (lambda e, p: p["probe"]["tensors"][0].__setitem__(1, [2.0, 2.0]), "no tensor of such a shape"),
]


@pytest.mark.parametrize(("change", "message"), FORGERIES)
def test_forged(tmp_path: Path, content: bytes, change: Any, message: str) -> None:
    path = tmp_path / "forged"
    path.write_bytes(forge(content, change))
    with pytest.raises(ValueError, match=rf"is not a readable reference: .*{message}"):
        Reference.load(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"null",
        b'{"__metadata__": null}',
        b'{"__metadata__": {"format": 1}}',
        b"\xff\xff",
        b"[" * 10**5,
        b'{"__metadata__": NaN}',
        b'{"x": ' + b"9" * 5000 + b"}",
    ],
)
def test_headers_that_are_none(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "forged"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"is not a readable reference: .*copy it again"):
        Reference.load(path)


any_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda parts: st.one_of(st.lists(parts, max_size=3), st.dictionaries(st.text(max_size=5), parts, max_size=3)),
    max_leaves=5,
)


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_forgery(tmp_path: Path, content: bytes, data: st.DataObject) -> None:
    def change(entries: dict[str, Any], parsed: dict[str, Any]) -> None:
        place: Any = data.draw(st.sampled_from([entries, parsed]))
        while True:
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
                place[key] = data.draw(any_json)
                return
            place = place[key]

    path = tmp_path / "forged"
    path.write_bytes(forge(content, change))
    try:
        everything(path)
    except ValueError as error:
        assert f"{path} is not a readable reference: " in str(error)


# --- processes that are killed, disks that are full


fork = multiprocessing.get_context("fork")


def record_forever(path: Path, step: int) -> None:
    writer = ReferenceWriter.resume(path, HEADER, PROBE, step) if step >= 0 else ReferenceWriter(path, HEADER, PROBE)
    while True:
        step += 1
        writer.write(step, observation(step), losses(step))


def wait_for(path: Path, known: int) -> None:
    deadline = time.monotonic() + 20
    while not path.exists() or len(Reference.load(path).steps) <= known:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    moments = random.Random(0)
    known = 0
    for _ in range(6):
        process = fork.Process(target=record_forever, args=(path, known - 1))
        process.start()
        wait_for(path, known)
        time.sleep(moments.uniform(0, 0.05))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        steps = list(Reference.load(path).steps)
        assert len(steps) > known
        known = len(steps)
        check(path, list(range(known)))
    ReferenceWriter.resume(path, HEADER, PROBE, known).write(known, observation(known), losses(known))
    assert os.listdir(tmp_path) == [path.name]


def test_read_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "reference.safetensors"
    process = fork.Process(target=record_forever, args=(path, -1))
    process.start()
    try:
        wait_for(path, 0)
        first = Reference.load(path)
        end = time.monotonic() + 1
        counts = []
        while time.monotonic() < end:
            reference = Reference.load(path)
            counts.append(len(reference.steps))
            assert reference.steps == tuple(range(len(reference.steps)))
            last = reference.steps[-1]
            assert torch.equal(reference.read(last)["output"], observation(last)["output"])
            assert torch.equal(first.read(0)["output"], observation(0)["output"])
        assert process.is_alive()
        assert counts == sorted(counts)
        assert counts[-1] > counts[0]
    finally:
        process.kill()
        process.join()


def record_on_a_full_disk(path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = write(path, [0, 1])
    before = path.read_bytes()
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, most))
    with pytest.raises(OSError, match="too large"):
        writer.write(2, observation(2), losses(2))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    check(path, [0, 1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    writer.write(3, observation(3), losses(3))
    check(path, [0, 1, 2, 3])


def test_disk_that_is_full(tmp_path: Path) -> None:
    process = fork.Process(target=record_on_a_full_disk, args=(tmp_path / "reference.safetensors",))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write(tmp_path / "file" / "reference", [0])
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write(tmp_path / "folder", [0])
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
