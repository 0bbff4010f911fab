"""Reference files that are damaged, or forged with hashes that are right, and what a header refuses."""

import math
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.references import HEADER, Harmful, everything, forge, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mlu_lightning.observation import Reference

REFUSED: list[tuple[str, Any, str]] = [
    ("depth", (0,), r"\(0,\) .* whole numbers from 1"),
    *(("depth", [4], ""), ("depth", (True,), ""), ("embedding", 4, "4"), ("hidden", {"mlp": 1.0}, "")),
    *(("hidden", {1: 1}, ""), ("depths", (0.5, 1.5), ".* from 0 to 1"), ("depths", (math.nan,), "")),
    *(("locations", {"s=0": (3,)}, ".*positions, dimension"), ("locations", {"s=0": (3, 0)}, "")),
    *(("locations", {"s=0": 3}, ""), ("runs", "test_step", "'test_step' .*'training_step' or 'validation_step'")),
    *(("data_sizes", {"w": (-1,)}, ""), ("plan", 1, "1"), ("dtype", "float16", "'float16'"), ("dtype", {}, "")),
]


@pytest.mark.parametrize(("field", "value", "message"), REFUSED)
def test_header_refuses(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"{field}={message}"):
        replace(HEADER, **{field: value})


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


def test_cut_at_every_length(path: Path, content: bytes) -> None:
    for length in range(len(content)):
        assert raises_or_is(path, content[:length], None)
    assert raises_or_is(path, content + b"\0", None)


@pytest.mark.parametrize("mask", [0x01, 0x08, 0xFF])
def test_every_flipped_byte(path: Path, content: bytes, mask: int) -> None:
    path.write_bytes(content)
    expected = everything(path)
    start = 8 + int.from_bytes(content[:8], "little")
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= mask
        if not raises_or_is(path, bytes(flipped), expected):
            assert content[position : position + 1] == b" " and position < start, "only spaces are harmless"


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage(path: Path, content: bytes, data: st.DataObject) -> None:
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


def test_files_that_are_something_else(path: Path, tmp_path: Path, content: bytes) -> None:
    def refused(message: str, wrong: bytes | None = None, of: Path = path) -> None:
        if wrong is not None:
            path.write_bytes(wrong)
        with pytest.raises(ValueError, match=message):
            Reference.load(of)

    for wrong in (b"", b"1234567", pickle.dumps(Harmful(tmp_path / "harm")), struct.pack("<Q", 2**63) + bytes(99)):
        refused(r"is not a readable reference: .*safetensors.*copy it again, or record", wrong)
    assert not (tmp_path / "harm").exists()
    save_file({"weight": torch.ones(2)}, path)
    refused(r"of another kind, such as weights. Give a file that ReferenceRecorder wrote")
    save_file({"weight": torch.ones(2)}, path, {"format": "pt"})
    refused("of another kind")
    refused("of another kind", struct.pack("<Q", 22) + b'{"__metadata__": null}')
    version = content.replace(b'"version":"2"', b'"version":"7"')
    refused(r"has version '7'.*reads version '2'. Install the version", version)
    refused(r"it is a folder. Give the path of the file", of=tmp_path)
    with pytest.raises(FileNotFoundError):
        Reference.load(tmp_path / "none")


def test_files_of_version_1_are_read(path: Path, content: bytes) -> None:
    path.write_bytes(forge(content, lambda entries, parsed: parsed.pop("run")))
    assert Reference.load(path).steps == (0, 1)


@pytest.mark.parametrize("run", [{}, {"parts": {"a": 1}, "job": "", "restarts": 0, "kept": True}])
def test_names_of_runs_are_checked(run: dict[str, Any], path: Path, content: bytes) -> None:
    path.write_bytes(forge(content, lambda entries, parsed: parsed.update(run=run)))
    with pytest.raises(ValueError, match=r"name of its run|have the fields job, kept, parts, restarts"):
        Reference.load(path)


def test_forging_works(path: Path, content: bytes) -> None:
    path.write_bytes(forge(content, lambda entries, parsed: parsed["header"].update(plan=None)))
    assert Reference.load(path).header == replace(HEADER, plan=None)


Change = Callable[[dict[str, Any], dict[str, Any]], Any]


def put(*way: Any) -> Change:
    """Put the last of these in the place that the others lead to: an entry, whose name has a slash, or metadata."""
    *names, key, value = way
    return lambda e, p: reduce(getitem, names, e if "/" in way[0] else p).__setitem__(key, value)


header, probe, losses = partial(put, "header"), partial(put, "probe"), partial(put, "losses")
located, recorded = partial(put, "header", "locations"), partial(put, "recordings", "steps")
dtype, shape = partial(put, "probe", "tensors", 0, 0), partial(put, "probe", "tensors", 0, 1)
deep_batch: Any = reduce(lambda inner, _: {"list": [inner]}, range(450), {"value": 1})
deep_list: Any = reduce(lambda inner, _: [inner], range(949), [])


FORGERIES: dict[str, list[Change]] = {
    "the recording of step 0 does not have the hash": [
        lambda e, p: e.update({"0/s=0": e["1/s=0"], "1/s=0": e["0/s=0"]}),
        lambda e, p: e.update({"0/s=0": e["0/s=0.5"], "0/s=0.5": e["0/s=0"]}),
        lambda e, p: p["recordings"]["digests"].reverse(),
    ],
    "not as it should be": [
        *(put("0/s=0", "shape", [2, 3]), put("0/s=0", "dtype", "I32"), recorded([0, 2]), header("dtype", "bfloat16")),
        *(located("s=0", size) for size in ([2, 3], [10**8, 10**8], [10**12, 10**12])),
        *(losses("count", 7), dtype("I32"), shape([0, 2**40, 2**40]), shape([1] * 10**4)),
        lambda e, p: e.update({"0/s=1": e.pop("0/s=0")}),
    ],
    "not a whole safetensors file": [
        *(put("0/output", "shape", shape) for shape in ([2, True], [2.0, 1.0])),
        lambda e, p: e["0/s=0"].update(data_offsets=e["0/s=0.5"]["data_offsets"]),
        *(put("0/s=0", "data_offsets", [0, 2**62]), lambda e, p: e.pop("0/output")),
        lambda e, p: e.update(more=e["losses"]),
    ],
    "not two lists of one length": [lambda e, p: p["recordings"]["digests"].pop()],
    "not two lists": [recorded("01")],
    "steps do not increase": [
        lambda e, p: p["recordings"]["steps"].reverse(),
        *map(recorded, ([0, 0], [-1, 0], [0.0, 1.0], [False, True])),
    ],
    "it has 9 tensors": [
        lambda e, p: p["recordings"].update(steps=list(range(10**5)), digests=[""] * 10**5),
        lambda e, p: p["probe"]["tensors"].pop(),
    ],
    "locations=": [located("s=0", [0, 2])],
    "'s=0.50' is not the name of a stream": [located("s=0.50", [3, 2])],
    "'s=2' is not the name of a stream": [located("s=2", [3, 2])],
    "should be JSON is not": [header("depths", [math.nan]), header("[" * 100_000)],
    "dtype='float64'": [header("dtype", "float64")],
    "dtype=": [header("dtype", [])],
    "does not have the fields": [
        *(header("extra", 1), header([]), header("[" * 900 + "]" * 900), header('{"depth": 1e999}')),
        lambda e, p: p["header"].pop("plan"),
    ],
    "depth=|recursion|JSON": [header("depth", deep_list)],
    "not described|recursion|JSON": [dtype(deep_list)],
    "the tensor 'losses' in it is not as it should be": [losses("count", -1)],
    "the number of its losses is none": [losses("count", 1.0)],
    "losses do not have the hash": [losses("digest", None)],
    "probe does not have the hash": [probe("digest", ""), probe("structure", {"tensor": "0"})],
    "structure of a batch": [probe("structure", {"tensor": "7"}), probe("structure", {"value": []})],
    "structure": [probe("structure", deep_batch)],
    "not a list": [probe("tensors", {})],
    "not described by dtype and shape": [probe("tensors", [1, 2]), dtype([]), shape([2.0, 2.0])],
    "the tensor 'probe/0' in it is not as it should be": [dtype("I128")],
}


@pytest.mark.parametrize(
    ("message", "change"), [(message, change) for message, changes in FORGERIES.items() for change in changes]
)
def test_forged(path: Path, content: bytes, change: Change, message: str) -> None:
    path.write_bytes(forge(content, change))
    with pytest.raises(ValueError, match=rf"is not a readable reference: .*{message}"):
        Reference.load(path)


NO_HEADERS = [b"[]", b"null", b'{"__metadata__": {"format": 1}}', b"\xff\xff", b"[" * 10**5, b'{"__metadata__": NaN}']


@pytest.mark.parametrize("header", [*NO_HEADERS, b'{"x": ' + b"9" * 5000 + b"}"])
def test_headers_that_are_none(path: Path, header: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"is not a readable reference: .*copy it again"):
        Reference.load(path)


any_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda parts: st.one_of(st.lists(parts, max_size=3), st.dictionaries(st.text(max_size=5), parts, max_size=3)),
    max_leaves=5,
)


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_forgery(path: Path, content: bytes, data: st.DataObject) -> None:
    def change(entries: dict[str, Any], parsed: dict[str, Any]) -> None:
        place: Any = data.draw(st.sampled_from([entries, parsed]))
        while True:
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
                place[key] = data.draw(any_json)
                return
            place = place[key]

    path.write_bytes(forge(content, change))
    try:
        everything(path)
    except ValueError as error:
        assert f"{path} is not a readable reference: " in str(error)
