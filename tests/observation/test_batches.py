"""Batches taken apart and put together again, and read from files."""

import collections
import dataclasses
import hashlib
import json
import math
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.references import Harmful
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BatchEncoding

from mlu_lightning.observation import batches
from mlu_lightning.observation.batches import batch_hash, decode_batch, encode_batch, first_samples, load_batch


def through_json(batch: Any) -> Any:
    structure, tensors = encode_batch(batch)
    return decode_batch(json.loads(json.dumps(structure, allow_nan=False)), tensors)


def same(a: Any, b: Any) -> bool:
    """Equal values of equal types at every level; NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or (a != a and b != b)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def test_batch_comes_back_as_it_was() -> None:
    batch = (
        {"x": torch.randn(2, 3), "empty": torch.ones(0, 2), "n": None, "": [True, 1, 1.5, "ä\ud800", -0.0]},
        [torch.tensor(2), (), [], {}],
        *(torch.tensor([1, 2], dtype=torch.int64), math.inf, -math.inf, math.nan, 10**30),
    )
    assert same(through_json(batch), batch) and math.copysign(1, through_json(-0.0)) == -1


DTYPES = "float64 float16 bfloat16 float8_e4m3fn complex64 int8 uint8 uint16 int32 bool"


@pytest.mark.parametrize("dtype", DTYPES.split())
def test_dtypes(dtype: str) -> None:
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(getattr(torch, dtype))
    assert same(through_json(tensor), tensor)


def test_values_are_copied_in_row_major_order() -> None:
    tensor = torch.randn(3, 4)
    batch = [tensor.T, tensor[::2], nn.Parameter(tensor), torch.ones(2, dtype=torch.complex64).conj()]
    _, tensors = encode_batch(batch)
    assert all(value.is_contiguous() and not value.requires_grad for value in tensors.values())
    before = tensor.clone()
    tensor.zero_()
    assert all(map(torch.equal, tensors.values(), (before.T, before[::2], before)))


def test_mappings_come_back_as_dicts() -> None:
    tokens = torch.tensor([[1, 2]])
    assert same(through_json(BatchEncoding({"input_ids": tokens})), {"input_ids": tokens})
    assert same(through_json(collections.OrderedDict(x=tokens)), {"x": tokens})


leaves = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    st.lists(st.integers(-5, 5), max_size=4).map(lambda values: torch.tensor(values, dtype=torch.int32)),
)


def nests(parts: Any) -> Any:
    lists = st.lists(parts, max_size=4)
    return st.one_of(lists, lists.map(tuple), st.dictionaries(st.text(), parts, max_size=4))


@given(st.recursive(leaves, nests))
@settings(max_examples=100, deadline=None)
def test_any_batch_comes_back(batch: Any) -> None:
    assert same(through_json(batch), batch) and batch_hash(through_json(batch)) == batch_hash(batch)


def test_only_first_samples_of_a_larger_probe_are_kept() -> None:
    batch = {"x": torch.arange(8).reshape(4, 2), "label": torch.arange(4), "name": "words"}
    cut = first_samples(batch, 3)
    assert cut["x"].equal(batch["x"][:3]) and cut["label"].equal(batch["label"][:3]) and cut["name"] == "words"
    assert first_samples(batch, 4) is batch
    uneven = torch.ones(4), torch.ones(3)
    assert first_samples(uneven, 2) is uneven
    assert [batches.sample_count(one) for one in (batch, uneven, "words")] == [4, None, None]


Point = collections.namedtuple("Point", "x y")
Sample = dataclasses.make_dataclass("Sample", ["x"])
Image = type("Image", (Tensor,), {})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"meta": [Sample(torch.ones(1))]}, r'^batch\["meta"\]\[0\] is of type \S*Sample, .*probe='),
        ([Point(torch.ones(1), torch.ones(1))], r"^batch\[0\] is of type \S*Point, .*dicts, lists and tuples"),
        (torch.ones(2).numpy(), r"^batch is of type numpy.ndarray"),
        ((np.float64(1.0),), r"^batch\[0\] is of type numpy.float64"),
        ([b"bytes"], r"^batch\[0\] is of type bytes,"),
        ([{1, 2}], r"^batch\[0\] is of type set,"),
        ({"x": {3: 1}}, r'^batch\["x"\] has a key of type int, 3, and should have strings'),
        ([torch.ones(2).to_sparse()], r"^batch\[0\] is a tensor of layout torch.sparse_coo"),
        ([torch.ones(2, device="meta")], r"^batch\[0\] is a tensor on the meta device"),
        ([torch.ones(2, dtype=torch.complex128)], r"^batch\[0\] is a tensor of torch.complex128"),
        ([torch.ones(2).as_subclass(Image)], r"^batch\[0\] is a tensor of .* type \S*Image"),
    ],
)
def test_refused_with_the_way_to_it(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_batch(batch)


def test_cycles_are_refused() -> None:
    batch: list[Any] = []
    batch.append(batch)
    with pytest.raises(ValueError, match="more than 32 levels"):
        encode_batch(batch)


def nested(levels: int) -> dict[str, Any]:
    node: dict[str, Any] = {"value": 1}
    for _ in range(levels):
        node = {"list": [node]}
    return node


STRUCTURES: list[Any] = [
    *(None, [], {}, "tensor", {"tensor": "7"}, {"tensor": 0}, {"tensor": ["0"]}, {"tensor": "0", "value": 1}),
    *({"dict": [["a", {"value": 1}]]}, {"list": {"value": 1}}, {"list": [1]}, {"set": []}, {"value": [1]}),
    *({"value": {}}, {"float": "1e3"}, {"float": ["nan"]}, nested(33), nested(900)),
]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_structures_that_are_none(structure: Any) -> None:
    with pytest.raises(ValueError, match="structure of a batch"):
        decode_batch(structure, {"0": torch.ones(1)})


def test_deepest_structure() -> None:
    assert same(through_json(decode_batch(nested(32), {})), decode_batch(nested(32), {}))


def test_hash_is_of_the_values_only() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    assert batch_hash([tensor]) == batch_hash([tensor.T.contiguous().T]) == batch_hash([nn.Parameter(tensor)])
    assert batch_hash(collections.OrderedDict(x=tensor)) == batch_hash({"x": tensor})


def test_different_batches_have_different_hashes() -> None:
    x = torch.arange(6.0)
    different: list[Any] = [
        *(x, [x], (x,), {"x": x}, {"y": x}, [x, x], [x, None], [x, 1], [x, 1.0], [x, True], [x, "1"]),
        *(x.reshape(2, 3), x.reshape(3, 2), x.double(), x.view(torch.int32), x + 1, -x),
        *(torch.zeros(6), torch.zeros(6, 0), [torch.zeros(2), torch.zeros(4)], [torch.zeros(4), torch.zeros(2)]),
    ]
    assert len({batch_hash(batch) for batch in different}) == len(different)


def test_hash_stays_the_same() -> None:
    structure = r'"{\"list\": [{\"tensor\": \"0\"}, {\"value\": 1.5}]}"'
    content = structure.encode() + b'["0", "I64", [1, 3]]' + np.array([0, 1, 2], dtype="<i8").tobytes()
    assert batch_hash([torch.arange(3)[None], 1.5]) == hashlib.sha256(content).hexdigest()


ONES, ZEROS = torch.ones(1), torch.zeros(2)


@pytest.mark.parametrize(
    ("tensors", "batch"),
    [
        ({"batch": ZEROS}, ZEROS),
        ({"1": ONES, "0": ZEROS}, (ZEROS, ONES)),
        ({str(i): torch.full((1,), i) for i in range(12)}, tuple(torch.full((1,), i) for i in range(12))),
        ({"0": ONES}, (ONES,)),
        *((named, named) for named in ({"input_ids": torch.arange(3)}, {"batch": ZEROS, "x": ONES})),
        ({"0": ONES, "2": ZEROS}, {"0": ONES, "2": ZEROS}),
    ],
)
def test_files_of_users(tmp_path: Path, tensors: dict[str, Tensor], batch: Any) -> None:
    save_file(tensors, tmp_path / "probe.safetensors", {"format": "pt"})
    assert same(load_batch(tmp_path / "probe.safetensors"), batch)
    assert same(load_batch(str(tmp_path / "probe.safetensors")), batch)


def test_a_file_may_change_after_it_was_read(tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    save_file({"batch": torch.ones(4096)}, path)
    batch = load_batch(path)
    with path.open("r+b") as file:
        file.seek(-4096 * 4, 2)
        file.write(bytes(4096 * 4))
    assert torch.equal(batch, torch.ones(4096))


def test_files_that_are_no_batch(tmp_path: Path) -> None:
    path, harm = tmp_path / "probe.safetensors", tmp_path / "harm"
    header = b'{"x":{"dtype":"F32","shape":[99],"data_offsets":[0,396]}}'
    torch.save(torch.ones(2), tmp_path / "torch.pt")
    contents = [
        *(b"", b"text", pickle.dumps(Harmful(harm)), (tmp_path / "torch.pt").read_bytes()),
        *(struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", len(header)) + header),
    ]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is not a safetensors file with a batch.*save_file"):
            load_batch(path)
    assert not harm.exists()
    save_file({}, path)
    for wrong, message in ((path, "holds no tensors"), (tmp_path, "is a folder")):
        with pytest.raises(ValueError, match=message):
            load_batch(wrong)
    with pytest.raises(FileNotFoundError):
        load_batch(tmp_path / "none")
