"""Files that somebody has damaged or forged: a plan or reference is read as what it says, or refused with its name."""

import json
import random
import signal
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.damage import Read, damaged, edited, limits, refused_of, run_to_end
from helpers.references import forge, write
from safetensors.torch import load_file

from mlu_lightning.models import CausalTransformer, ResNet
from mlu_lightning.observation.batches import load_batch
from mlu_lightning.observation.reference import Reference, load_probe
from mlu_lightning.planning import serialization as plan_files
from mlu_lightning.planning.plan import Plan
from mlu_lightning.table import OptimizerFamily
from mlu_lightning.utilities import tensor_files
from mlu_lightning.utilities.plain_yaml import LONGEST

NUMBERS = [-1, 0, 1, 2**31, 2**53, 2**62, 2**63, 2**64, 10**30, 1.5, 1e308]
VALUES: list[Any] = [*NUMBERS, True, None, "", "1", "F32", "é", [], {}, [[]], [0, 0]]


def forged(content: bytes, draw: random.Random) -> bytes:
    """A reference of which one entry says something else, with hashes of its metadata that are right."""

    def change(entries: dict[str, Any], parsed: dict[str, Any]) -> None:
        place: Any = draw.choice((entries, parsed, parsed))
        while True:
            key = draw.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], (dict, list)) or not place[key] or draw.random() < 0.2:
                kind = draw.randrange(4)
                if kind == 0 and isinstance(place, dict):
                    place[draw.choice(("more", "0", *map(str, place)))] = place.pop(key)
                elif kind == 1:
                    place[key] = [place[key]] * draw.choice((0, 1, 3, 1000))
                elif kind == 2 and type(place[key]) is int:
                    place[key] += draw.choice((-8, -1, 1, 4, 2**40))
                else:
                    place[key] = draw.choice(VALUES)
                return
            place = place[key]

    return forge(content, change)


def check_value(value: Any, node: Any) -> None:
    if is_dataclass(value):
        assert node.keys() <= {field.name for field in fields(value)}
        for field in fields(value):
            if field.name in node:
                check_value(getattr(value, field.name), node[field.name])
            else:
                assert getattr(value, field.name) == field.default is not MISSING
    elif isinstance(value, dict):
        assert node.keys() <= value.keys()
        for key, item in value.items():
            if key in node:
                check_value(item, node[key])
            else:
                assert key in ("tuned", "optimizers") and not item
    elif isinstance(value, tuple):
        for item, part in zip(value, node, strict=True):
            check_value(item, part)
    elif isinstance(value, Enum):
        assert value.value == node
    elif isinstance(value, bool) or value is None:
        assert node.lower() in ({True: ("true",), False: ("false",), None: ("null", "~", "")}[value])
    else:
        assert value == type(value)(node)


def read_plan(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    try:
        plan = Plan.load(path)
    except ValueError as error:
        assert str(error).startswith(str(path)) and len(str(error)) < 2000
        return True
    # a tab may separate, and a question mark be in a word, as YAML has it, and PyYAML's own scanner refuses them
    own = b"\t" in content or b"?" in content
    loader: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader) if own else yaml.BaseLoader
    node = yaml.load(content.decode(), Loader=loader)
    assert node.pop("mlu_plan") == "2"
    check_value({field.name: getattr(plan, field.name) for field in fields(plan)}, node)
    # what was read can be used
    assert Plan.from_yaml(plan.to_yaml(), "written again") == plan
    for family in OptimizerFamily:
        try:
            plan.table(family)
        except ValueError as error:
            assert "batch_ratio" in str(error)
    assert plan.base is None or plan.base.parameters.keys() == plan.parameters.keys()
    return False


def read_reference(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    for loader in (load_probe, load_batch):
        try:
            loader(path)
        except ValueError as error:
            assert str(path) in str(error)
    try:
        reference = Reference.load(path)
    except ValueError as error:
        assert str(error).startswith(f"{path} is not a readable reference: ") and len(str(error)) < 2000
        return True
    tensors = load_file(path)
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    header = json.loads(metadata["header"])
    assert json.loads(json.dumps(vars(reference.header))) == header
    assert len(tensors) == len(reference.steps) * len(header["locations"]) + 2 + 1
    assert torch.equal(reference.losses, tensors["losses"])
    for step in reference.steps:
        for name, values in reference.read(step).items():
            assert torch.equal(values, tensors[f"{step}/{name}"].float())
    return False


@pytest.fixture(scope="module")
def plans() -> list[str]:
    resnet, base = ResNet(2, 8, 4, inputs=3, outputs=2), ResNet(1, 4, 4, inputs=3, outputs=2)
    transformer, tokens = CausalTransformer(11, 8, depth=1, embedding=16, heads=2), torch.zeros(2, 8, dtype=torch.int64)
    return [Plan.from_model(resnet, base=base).to_yaml(), Plan.from_model(transformer, tokens).to_yaml()]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("reference") / "reference"
    write(path, [0, 3])
    return path.read_bytes()


CASES: dict[str, tuple[Read, Callable[[Any, random.Random], bytes]]] = {
    "damaged plan": (read_plan, lambda sources, draw: damaged(draw.choice(sources["plans"]).encode(), draw)),
    "edited plan": (read_plan, lambda sources, draw: edited(draw.choice(sources["plans"]), draw).encode()),
    "damaged reference": (read_reference, lambda sources, draw: damaged(sources["reference"], draw)),
    "forged reference": (read_reference, lambda sources, draw: forged(sources["reference"], draw)),
}


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("case", CASES)
def test_mutated_files(case: str, seed: int, plans: list[str], reference: bytes, tmp_path: Path) -> None:
    read, mutate = CASES[case]
    count, sources = 5_000 if seed else 150, {"plans": plans, "reference": reference}
    draw = random.Random(f"{case} {seed}")
    refused = refused_of(read, tmp_path, (mutate(sources, draw) for _ in range(count)), count)
    assert count * 0.5 < refused < count


LARGE: dict[str, Callable[[int], bytes]] = {
    "number": lambda size: b"a: " + b"9" * (size - 3),
    "escapes": lambda size: b'"' + b"\\x41" * (size // 4 - 1) + b'"',
    "texts": lambda size: b"[" + b"a," * (size // 2 - 1) + b"]",
    "long texts": lambda size: b"[" + b"abcd," * (size // 5 - 1) + b"]",
    "lists": lambda size: b"[" + b"[]," * (size // 3 - 2) + b"1]",
    "mappings": lambda size: b"[" + b"{a: b}," * (size // 7 - 2) + b"1]",
    "keys": lambda size: b"".join(b"%07d: a\n" % key for key in range(size // 11)),
    "depth": lambda size: b"[" * size,
    "dashes": lambda size: b"- " * (size // 2),
    "anchors": lambda size: b"a: " + b"&a " * (size // 3 - 1),
    "bomb": lambda size: b"a: &a [b]\n" + b"c: &a [*a, *a]\n" * (size // 15 - 2),
}


def read_large(path: Path, read: Callable[[Path], Any], memory: int, message: str) -> None:
    with limits(memory), pytest.raises(ValueError, match=message):
        signal.setitimer(signal.ITIMER_PROF, 120)
        read(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("form", ["plan", "reference"])
def test_largest_files_that_are_read(form: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "large"
    if form == "plan":
        content, read = LARGE[kind](LONGEST), Plan.load
        message = "(is not YAML|is not a plan|has an anchor|has more than 8 levels)"
    else:
        header, read, message = LARGE[kind](2**25), Reference.load, "is not a readable reference"
        content = len(header).to_bytes(8, "little") + header
    path.write_bytes(content)
    del content
    run_to_end(read_large, path, read, 2**31, f"^{path} {message}")


def test_longer_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long"
    path.write_bytes(b" " * (LONGEST + 1))
    with pytest.raises(ValueError, match="long is longer than 32 MB, which is more than is read"):
        Plan.load(path)
    path.write_bytes((2**25 + 1).to_bytes(8, "little") + b" " * (2**25 + 1))
    with pytest.raises(ValueError, match="long is not a readable reference: it is not a whole safetensors file"):
        Reference.load(path)
    write(path, [0])
    before = path.read_bytes()
    monkeypatch.setattr(tensor_files, "_LONGEST_HEADER", len(before) // 2)
    with pytest.raises(OSError, match=r"would have a header of \d+ bytes, and at most \d+ are read"):
        write(path, [0, 1, 2, 3, 4])
    assert path.read_bytes() == before


def test_longer_plans_are_not_written(plans: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan.from_yaml(plans[0], "a plan")
    monkeypatch.setattr(plan_files, "LONGEST", len(plans[0].encode()))
    assert plan.to_yaml() == plans[0]
    monkeypatch.setattr(plan_files, "LONGEST", len(plans[0].encode()) - 1)
    with pytest.raises(ValueError, match=r"The plan of 6 parameters has \d+ bytes, and at most \d+ are read"):
        plan.to_yaml()


LINES = "branches features horizon multipliers parameterization parameters streams".split()
PARAMETERIZATIONS = "Parameterizations are: mlu, completep, mup, sp"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("alpha: 1.0", "alpha: 1.0\nalpha: 2.0", r"has the key 'alpha' a second time in line \d+"),
        ("alpha: 1.0", "alpha: &a 1.0", r"has an anchor or alias in line \d+"),
        ("alpha: 1.0", "alpha: !!float 1.0", r"has a tag in line \d+"),
        ("alpha: 1.0", "alpha: [[[[[[[[[[1]]]]]]]]]]", r"has more than 8 levels in line \d+"),
        ("alpha: 1.0", "alpha: .nan", r"alpha: '.nan' should be a number from 1e-20 to 1e\+20"),
        ("alpha: 1.0", "alpha: 0", "alpha: '0' should be a number"),
        ("alpha: 1.0", "? [a]\n: b\nalpha: 1.0", r"has a key that is no text in line \d+"),
        ("warnings: []", "warnings:", "warnings: '' should be a list"),
        ("depth: 2,", "depth: 0,", "streams, depth: '0' should be a whole number from 1 on"),
        ("transposed: false", "transposed: 0", "transposed: '0' should be true or false"),
        ("kind: mlp", "kind: mpl", "kind: 'mpl' should be one of attention, convolution, mlp"),
        ("fans: [3, 4]", "fans: [3]", r"embed.weight, fans: \['3'\] should be a list of 2"),
        ("stream: 0", "stream: 1", "contradicts itself: it has a branch 'blocks.0' in a stream 1"),
        ("name: blocks.0, kind: branch", "name: b, kind: branch", "a branch 'blocks.0' without a multiplier"),
        ("base_fans: [3, 4]", "base_fans: [3, 0]", "base_fans: '0' should be a whole number from 1 on"),
        (
            "variant: null",
            "variant: big",
            "no variant 'big'. Variants are: before_norm, post_norm, every_block, of_block, summed, in_head",
        ),
        ("parameters:", "mlu_plan: 1\n--- x\nparameters:", "is not YAML|a second"),
        ("role: readout", "role: output", r"readout\.weight: there is no role 'output'"),
        ("base_depth", "depth0", "streams: .*should be a mapping with the keys depth, base_depth"),
        ("parameterization: mlu", "parameterization: ntk", f"no parameterization 'ntk'. {PARAMETERIZATIONS}"),
        *(
            (
                "mlu_plan: 2",
                f"mlu_plan: {version}",
                f" has version '?{version}'? of .* reads version 2. Update mlu-lightn",
            )
            for version in ("1", "1.5", "next")
        ),
        ("", "a: [", "is not YAML"),
        ("", "lr: 1.0", "is not a plan: it has no line 'mlu_plan: 2'"),
        ("", "mlu_plan: 2\nalpha: 1.0", f"is not a complete plan: {', '.join(LINES)}"),
    ],
)
def test_what_is_wrong_in_a_plan_is_said(old: str, new: str, message: str, plans: list[str]) -> None:
    assert old in plans[0]
    with pytest.raises(ValueError, match=f"^a.yaml.*({message})"):
        Plan.from_yaml(plans[0].replace(old, new, 1) if old else new, "a.yaml")


@pytest.mark.parametrize("name", ["on", "1.5", "null", "a: b", "[x]", "#", "'", "é\n\u2028", "x" * 900])
def test_any_name_comes_back(name: str, plans: list[str]) -> None:
    plan = Plan.from_yaml(plans[0], "a.yaml")
    plan = replace(plan, parameters={name: next(iter(plan.parameters.values()))}, warnings=(name,))
    assert Plan.from_yaml(plan.to_yaml(), "a.yaml") == plan
