"""What a writer refuses, how it goes on in a file, and what is left when it is killed or the disk is full."""

import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import forked
from helpers.references import HEADER, PROBE, check, losses, observation, write
from torch import Tensor

from mlu_lightning.models import ResNet
from mlu_lightning.observation import Reference
from mlu_lightning.observation.reference_format import ReferenceHeader
from mlu_lightning.observation.reference_writer import ReferenceWriter
from mlu_lightning.planning.plan import Plan
from mlu_lightning.table import Role
from mlu_lightning.utilities import tensor_files


def test_writer_copies(path: Path) -> None:
    probe, values, loss = torch.ones(2), observation(0), losses(1)
    writer = ReferenceWriter(path, HEADER, probe)
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


def test_writer_refuses(path: Path) -> None:
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


def test_resume_drops_what_came_after(path: Path) -> None:
    write(path, [0, 3, 10])
    before = path.read_bytes()
    writer = ReferenceWriter.resume(path, HEADER, PROBE, 5)
    assert (path.read_bytes(), writer.steps) == (before, (0, 3)) and torch.equal(writer.losses, losses(5))
    writer.write(6, observation(6), losses(6))
    check(path, [0, 3, 6])
    assert ReferenceWriter.resume(path, HEADER, PROBE, 6).steps == (0, 3, 6)
    assert ReferenceWriter.resume(path, HEADER, PROBE, 2).steps == (0,)


def refused(message: str, path: Path, header: ReferenceHeader = HEADER, probe: Any = PROBE) -> None:
    with pytest.raises(ValueError, match=message):
        ReferenceWriter.resume(path, header, probe, 0)


def test_resume_refuses_another_run(path: Path) -> None:
    write(path, [0])
    message = r"its depth is \(4,\) instead of \(8,\); it has a plan and this run has none\. Give"
    refused(message, path, replace(HEADER, depth=(8,), plan=None))
    message = r"its probe has other values. Give the recorder another path, or delete the file"
    refused(message, path, probe=PROBE | {"x": PROBE["x"] + 1})
    with pytest.raises(FileNotFoundError):
        ReferenceWriter.resume(path.with_name("none"), HEADER, PROBE, 0)
    path.write_bytes(path.read_bytes()[:-1])
    refused("is not a readable reference", path)


def edited(plan: Plan, **changes: Any) -> Plan:
    name = "readout.weight"
    return replace(plan, parameters=plan.parameters | {name: replace(plan.parameters[name], **changes)})


PLANS: dict[str, Callable[[Plan], Plan | None]] = {
    "it has a plan and this run has none": lambda p: None,
    "its plan has '1.0' instead of '2.0' at alpha": lambda p: replace(p, alpha=2.0),
    "'readout' instead of 'embedding' at parameters: readout.weight: role": lambda p: edited(p, role=Role.EMBEDDING),
    "'2' instead of '3' at .*: readout.weight: base_fans: 0": lambda p: edited(p, base_std=9.0, base_fans=(3, 2)),
    "its plan has '0.5' instead of '0.125' at multipliers: blocks.0: value": lambda p: replace(
        p, multipliers=(replace(p.multipliers[0], value=0.125), *p.multipliers[1:])
    ),
    r"its plan has \['embed.weight'\] instead of \[\] at parameters": lambda p: replace(
        p, parameters=dict([*p.parameters.items()][1:])
    ),
}


@pytest.mark.parametrize("difference", PLANS)
def test_resume_says_where_plans_differ(difference: str, path: Path) -> None:
    first, again = (Plan.from_model(ResNet(2, 8, 4, 3, 2), base=ResNet(1, 4, 2, 3, 2)) for _ in range(2))
    header = replace(HEADER, plan=first.to_yaml())
    write(path, [0, 3], header)
    # a base that is drawn anew has another std, which only initialization uses, and the run goes on from another
    redrawn = replace(again, warnings=("something",))
    assert redrawn != first
    ReferenceWriter.resume(path, replace(HEADER, plan=redrawn.to_yaml()), PROBE, 3).write(4, observation(4), losses(4))
    assert Reference.load(path).header == header
    other = PLANS[difference](redrawn)
    message = rf"the reference of another run: .*{difference}\. Give the recorder another"
    refused(message, path, replace(HEADER, plan=other and other.to_yaml()))
    plain = path.with_name("plain")
    write(plain, [0], replace(HEADER, plan=None))
    refused(r"it has no plan and this run has one\. Give the recorder another", plain, header)


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


def test_killed_at_any_moment(path: Path) -> None:
    moments, known = random.Random(0), 0
    for _ in range(6):
        process = forked(record_forever, path, known - 1)
        wait_for(path, known)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        steps = list(Reference.load(path).steps)
        assert len(steps) > known
        known = len(steps)
        check(path, list(range(known)))
    ReferenceWriter.resume(path, HEADER, PROBE, known).write(known, observation(known), losses(known))
    left = {name for name in os.listdir(path.parent) if not name.endswith(".tmp")}  # of writers that were killed
    assert left == {path.name}


def test_read_while_it_is_written(path: Path) -> None:
    process = forked(record_forever, path, -1)
    try:
        wait_for(path, 0)
        first, counts = Reference.load(path), []
        end = time.monotonic() + 1
        while time.monotonic() < end:
            reference = Reference.load(path)
            counts.append(len(reference.steps))
            assert reference.steps == tuple(range(len(reference.steps)))
            for read, step in ((reference, reference.steps[-1]), (first, 0)):
                assert torch.equal(read.read(step)["output"], observation(step)["output"])
        assert process.is_alive() and counts == sorted(counts) and counts[-1] > counts[0]
    finally:
        process.kill()
        process.join()


def test_a_file_that_is_replaced_as_it_is_opened_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes the size of one file and maps the other."""
    path, longer = tmp_path / "a", tmp_path / "b"
    write(path, [0])
    write(longer, [0, 3])
    own = tensor_files.safe_open

    def open_one(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(tensor_files, "safe_open", own)
        longer.replace(path)
        raise RuntimeError("file <a> size <1602> is smaller than the required mapping size <1938>")

    monkeypatch.setattr(tensor_files, "safe_open", open_one)
    check(path, [0, 3])
