"""Folders and files of others, damaged or edited at random: each is read, or costs a line or an error."""

import random
import resource
import signal
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import check_command
from helpers.check_reports import failing_report
from helpers.damage import Read, damaged, edited, refused_of, respelled
from helpers.references import write
from helpers.run_folders import event, plan_yaml, text_of, write_csv, write_events

from mlu_lightning.checking.configuration import read_config
from mlu_lightning.quickstart.study import Run, Study, read_runs, save_runs
from mlu_lightning.reporting import read_run

Change = Callable[[bytes, random.Random], bytes]
GOOD = {0: 2.5, 1: 2.25}
SECONDS, MEMORY = 300, 3 * 2**20  # of a batch of files; KiB of the process that reads them
BATCH = 40


def with_checksums(content: bytes, draw: random.Random) -> bytes:
    """Damage in a record of TensorBoard's, whose checksums are right."""
    records = []
    while content:
        length = int.from_bytes(content[:8], "little")
        records.append(content[12 : 12 + length])
        content = content[16 + length :]
    at = draw.randrange(len(records))
    records[at] = damaged(records[at], draw)
    return b"".join(map(event, records))


def in_archive(content: bytes, draw: random.Random) -> bytes:
    """Damage in the pickle of a checkpoint, whose archive is whole."""
    written = BytesIO()
    with zipfile.ZipFile(BytesIO(content)) as archive, zipfile.ZipFile(written, "w") as other:
        for entry in archive.namelist():
            data = archive.read(entry)
            other.writestr(entry, damaged(data, draw) if entry.endswith("data.pkl") else data)
    return written.getvalue()


def edited_plan(content: bytes, draw: random.Random) -> bytes:
    return edited(content.decode(), draw).encode()


CHANGES: dict[str, list[Change]] = {
    "events.out.tfevents.1": [damaged, with_checksums],
    "metrics.csv": [damaged, respelled],
    "a.ckpt": [damaged, in_archive, in_archive],
    "old.ckpt": [damaged],
    "plan.yaml": [damaged, edited_plan],
    "reference.safetensors": [damaged],
    "check.json": [damaged, respelled],
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A file of each kind, as it should be."""
    folder = tmp_path_factory.mktemp("sources")
    checkpoint = {"callbacks": {"MLUCallback": {"plan": plan_yaml()}}, "state_dict": {"weight": torch.ones(2, 3)}}
    torch.save(checkpoint, folder / "a.ckpt")
    torch.save(checkpoint, folder / "old.ckpt", _use_new_zipfile_serialization=False)
    write_csv(folder / "metrics.csv", {step: 1 / (1 + step) for step in range(9)}, "mlu/update/blocks.0")
    write_events(folder / "events", {step: 1 / (1 + step) for step in range(9)}).rename(
        folder / "events.out.tfevents.1"
    )
    (folder / "plan.yaml").write_text(plan_yaml())
    (folder / "check.json").write_text(failing_report().to_json())
    write(folder / "reference.safetensors", [0, 3])
    return {name: (folder / name).read_bytes() for name in CHANGES}


@pytest.mark.parametrize("batches", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_folders_of_runs(batches: int, sources: dict[str, bytes], tmp_path: Path) -> None:
    """The page is made of any files, the others stay on it, and time and memory have limits."""

    def late(*_: Any) -> None:
        raise AssertionError("it takes too long")

    said = 0
    before = signal.signal(signal.SIGALRM, late)
    try:
        for batch in range(batches):
            draw, folder = random.Random(batch), tmp_path / str(batch)
            write_csv(folder / "metrics.csv", GOOD, "good")
            names = []
            for number in range(BATCH):
                name = draw.choice([*CHANGES])
                path = folder / f"run{number}" / name
                path.parent.mkdir()
                path.write_bytes(draw.choice(CHANGES[name])(sources[name], draw))
                names.append(str(path.relative_to(folder)))
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            record = read_run(folder)
            page = text_of(record)
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert dict(record.values["good"]) == GOOD
            # where TensorBoard's files contradict others, it is said of their folder
            assert record.problems.keys() <= {*names, *(str(Path(name).parent) for name in names)}
            assert all(name in page for name in record.problems)
            assert max(map(len, record.problems.values())) < 500
            said += len(record.problems)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    print(f"\n{batches * BATCH} files, {said} of them named as damaged")
    assert said > batches * BATCH // 3
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < MEMORY


TEXT, STUDY = b"a text" * 2000, Study()


def read_study(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    try:
        assert all(isinstance(run, Run) for run in read_runs(STUDY, TEXT, path))
    except ValueError as error:
        assert str(path) in str(error) and len(str(error)) < 2000
        return True
    return False


def read_configuration(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    try:
        read_config(path, check_command.KEYS)
    except ValueError as error:
        assert len(str(error)) < 3000
        return True
    return False


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("texts") / "runs.json"
    save_runs(STUDY, TEXT, [Run("base", True, exponent, 2.0) for exponent in (-9, -8)], path)
    return {
        "runs of the quickstart": path.read_bytes(),
        "configuration": yaml.safe_dump(check_command.content()).encode(),
    }


READERS: dict[str, Read] = {"runs of the quickstart": read_study, "configuration": read_configuration}


@pytest.mark.parametrize("count", [40, pytest.param(1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_files_of_commands(name: str, count: int, texts: dict[str, bytes], tmp_path: Path) -> None:
    draw = random.Random(name)
    inputs = (draw.choice((damaged, respelled))(texts[name], draw) for _ in range(count))
    refused = refused_of(READERS[name], tmp_path, inputs, count)
    print(f"\n{count} files, {refused} of them refused")
    assert count // 3 < refused
