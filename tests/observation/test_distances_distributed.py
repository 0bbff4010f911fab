"""Recordings and distances of two processes (DDP and FSDP2, gloo) are those of one."""

from pathlib import Path

import pytest
import torch
from helpers.distributed_run import distances, logged, start

from mlu_lightning.observation.reference import Reference


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    result = start("single", folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_record_and_measure_what_one_does(strategy: str, single: Path, tmp_path: Path) -> None:
    result = start(strategy, tmp_path)
    assert result.returncode == 0, result.stderr
    one, two = (Reference.load(folder / "large.safetensors") for folder in (single, tmp_path))
    assert one.steps == two.steps == (0, 1, 2, 4, 8, 12)
    assert one.header == two.header
    assert one.probe_hash == two.probe_hash
    # a mean of gradients over two halves of a batch, and over the batch, in float32, for 12 steps
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(one.losses, two.losses, **tolerance)
    for step in one.steps:
        torch.testing.assert_close(one.read(step), two.read(step), **tolerance)
    # and the losses are means over both processes: those of a half differ by far more
    assert one.losses.std() > 0.01

    updates, of_two = (logged(folder / "32", "mlu/update/") for folder in (single, tmp_path))
    assert list(of_two) == list(updates) == [1, 2, 4, 8, 12]
    for step in updates:
        assert of_two[step] == pytest.approx(updates[step], rel=1e-3, abs=1e-5)

    expected, found = distances(single), distances(tmp_path)
    assert list(found) == list(expected) == list(one.steps)
    for step in expected:
        assert found[step] == pytest.approx(expected[step], rel=1e-3, abs=1e-5)


def test_error_of_the_first_process_ends_all_of_them(single: Path, tmp_path: Path) -> None:
    (tmp_path / "large.safetensors").write_bytes((single / "large.safetensors").read_bytes())
    result = start("ddp", tmp_path)
    assert result.returncode != 0
    assert result.stderr.count("FileExistsError: ") == 2
    assert "would overwrite it" in result.stderr
