"""Reference files that are damaged, or forged with hashes that are right, and what a header refuses."""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.references import HEADER, Harmful, everything, forge, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mlu_lightning.observation import Reference

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


# --- damage


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "reference"
    write(path, [0, 1])
    return path.read_bytes()


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
    path.write_bytes(struct.pack("<Q", 22) + b'{"__metadata__": null}')
    with pytest.raises(ValueError, match="of another kind"):
        Reference.load(path)
    path.write_bytes(content.replace(b'"version":"1"', b'"version":"7"'))
    with pytest.raises(ValueError, match=r"has version '7'.*reads version '1'. Install the version"):
        Reference.load(path)
    with pytest.raises(ValueError, match=r"it is a folder. Give the path of the file"):
        Reference.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        Reference.load(tmp_path / "none")


def test_forging_works(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "forged").write_bytes(forge(content, lambda entries, parsed: parsed["header"].update(plan=None)))
    assert Reference.load(tmp_path / "forged").header == replace(HEADER, plan=None)


def swap(entries: dict[str, Any], a: str, b: str) -> None:
    entries[a], entries[b] = entries[b], entries[a]


def nested_list(levels: int) -> list[Any]:
    value: list[Any] = json.loads("[" * levels + "]" * levels)
    return value


FORGERIES: list[tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = [
    (lambda e, p: swap(e, "0/s=0", "1/s=0"), "the recording of step 0 does not have the hash"),
    (lambda e, p: swap(e, "0/s=0", "0/s=0.5"), "the recording of step 0 does not have the hash"),
    (lambda e, p: e["0/s=0"].update(shape=[2, 3]), "not as it should be"),
    (lambda e, p: e["0/s=0"].update(dtype="I32"), "not as it should be"),
    (lambda e, p: e["0/output"].update(shape=[2, True]), "not a whole safetensors file"),
    (lambda e, p: e["0/output"].update(shape=[2.0, 1.0]), "not a whole safetensors file"),
    (lambda e, p: e["0/s=0"].update(data_offsets=[0, 2**62]), "not a whole safetensors file"),
    (lambda e, p: e["0/s=0"].update(data_offsets=e["0/s=0.5"]["data_offsets"]), "not a whole safetensors file"),
    (lambda e, p: e.update({"0/s=1": e.pop("0/s=0")}), "not as it should be"),
    (lambda e, p: e.pop("0/output"), "not a whole safetensors file"),
    (lambda e, p: e.update(more=e["losses"]), "not a whole safetensors file"),
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
    (lambda e, p: p["header"]["locations"].update({"s=0": [10**12, 10**12]}), "not as it should be"),
    (lambda e, p: p["header"]["locations"].update({"s=0": [0, 2]}), "locations="),
    (lambda e, p: p["header"]["locations"].update({"s=0.50": [3, 2]}), "'s=0.50' is not the name of a stream"),
    (lambda e, p: p["header"]["locations"].update({"s=2": [3, 2]}), "'s=2' is not the name of a stream"),
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
    (lambda e, p: p["probe"]["tensors"][0].__setitem__(0, nested_list(950)), "not described|recursion|JSON"),
    (lambda e, p: p.update(header='{"depth": 1e999}'), "does not have the fields"),
    (lambda e, p: p["losses"].update(count=7), "not as it should be"),
    (lambda e, p: p["losses"].update(count=-1), "the tensor 'losses' in it is not as it should be"),
    (lambda e, p: p["losses"].update(count=1.0), "the number of its losses is none"),
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
    (lambda e, p: p["probe"]["tensors"][0].__setitem__(0, []), "not described by dtype and shape"),
    (lambda e, p: p["probe"]["tensors"][0].__setitem__(0, "I128"), "the tensor 'probe/0' in it is not as it should be"),
    (lambda e, p: p["probe"]["tensors"][0].__setitem__(1, [0, 2**40, 2**40]), "not as it should be"),
    (lambda e, p: p["probe"]["tensors"][0].__setitem__(1, [1] * 10**4), "not as it should be"),
    (lambda e, p: p["probe"]["tensors"][0].__setitem__(1, [2.0, 2.0]), "not described by dtype and shape"),
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
        *(b"[]", b"null", b'{"__metadata__": {"format": 1}}', b"\xff\xff", b"[" * 10**5, b'{"__metadata__": NaN}'),
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
