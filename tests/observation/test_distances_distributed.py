"""Recordings and distances of two processes (DDP and FSDP2, gloo) are those of one."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.distributed_run import logged, run, run_all
from helpers.ranks import on_two_ranks

from mlu_lightning.observation.reference import Reference


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    run("single", folder)
    return folder


@pytest.fixture(scope="module")
def divided(single: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of both strategies, and one that would overwrite a file."""
    folder = tmp_path_factory.mktemp("divided")
    (folder / "again").mkdir()
    shutil.copy(single / "large.safetensors", folder / "again")
    on_two_ranks(run_all, folder)
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_record_and_measure_what_one_does(strategy: str, single: Path, divided: Path) -> None:
    one, two = (Reference.load(folder / "large.safetensors") for folder in (single, divided / strategy))
    assert one.steps == two.steps == (0, 1, 2, 4, 8, 12)
    assert (one.header, one.probe_hash) == (two.header, two.probe_hash)
    # a mean of gradients over two halves of a batch, and over the batch, in float32, for 12 steps
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(one.losses, two.losses, **tolerance)
    for step in one.steps:
        torch.testing.assert_close(one.read(step), two.read(step), **tolerance)
    # and the losses are means over both processes: those of a half differ by far more
    assert one.losses.std() > 0.01
    for name, prefix, steps in (("32", "mlu/update/", one.steps[1:]), ("8", "mlu/distance/", one.steps)):
        compare(single / name, divided / strategy / name, prefix, steps)


def compare(single: Path, divided: Path, prefix: str, steps: tuple[int, ...]) -> None:
    expected, found = (logged(folder, prefix) for folder in (single, divided))
    assert tuple(found) == tuple(expected) == steps
    for step in steps:
        assert found[step] == pytest.approx(expected[step], rel=1e-3, abs=1e-5)


def test_two_processes_measure_the_distance_from_the_infinite_model_that_one_does(single: Path, divided: Path) -> None:
    """Gradients of the limits are means over the processes, whose batches are halves of one."""
    compare(single / "limit" / "8", divided / "ddp" / "limit" / "8", "mlu/distance/", (0, 1, 2, 4, 8, 12))
    # of 4 metrics at 5 depths, and of the output, with their floors
    assert {len(values) for values in logged(divided / "ddp" / "limit" / "8", "mlu/distance/").values()} == {42}


def test_error_of_the_first_process_is_that_of_all(divided: Path) -> None:
    assert all("would overwrite it" in (divided / f"error-{rank}").read_text() for rank in range(2))
