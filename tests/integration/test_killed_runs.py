"""Runs that are killed in the middle of anything, and go on from their last checkpoint: bit for bit the whole run."""

import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.killed_run import OPTIMIZERS, SCHEDULES, STEPS, run
from helpers.processes import exit_code
from helpers.runs_by_hand import listed

from mlu_lightning.observation.reference import Reference

KILLED = -signal.SIGKILL


def losses(folder: Path) -> list[tuple[int, str]]:
    path = folder / "losses"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [(int(step), loss) for step, _, loss in (line.partition(" ") for line in lines)]


def life(folder: Path, names: dict[str, str], kill: tuple[int, float] | None = None) -> int:
    """Let a run begin or go on until it ends, or is killed so many steps and seconds later; its exit code."""
    folder.mkdir(exist_ok=True)
    return int(exit_code(run, folder, **names, kill=kill))


def outcome(folder: Path) -> Any:
    recording = Reference.load(folder / "run.safetensors")
    assert recording.steps == (*range(STEPS + 1),)
    read = [listed(recording.read(step)) for step in recording.steps]
    return listed(torch.load(folder / "end.pt", weights_only=True)), recording.losses.tolist(), read


def compare_with_whole(folder: Path, names: dict[str, str], kills: int, seed: int) -> None:
    moments = random.Random(seed)
    assert life(folder / "whole", names) == 0
    kill = [(moments.randint(1, STEPS // 3), moments.uniform(0, 0.02)) for _ in range(kills)]
    codes = [life(folder / "killed", names, moment) for moment in kill]
    assert codes == [KILLED] * kills and not (folder / "killed" / "end.pt").exists()
    # what is there when a run is killed is whole
    for path in (folder / "killed").glob("*.ckpt"):
        assert torch.load(path, weights_only=True)["global_step"] == int(path.stem)
    recorded = Reference.load(folder / "killed" / "run.safetensors")
    assert life(folder / "killed", names) == 0 and outcome(folder / "killed") == outcome(folder / "whole")
    whole, killed = losses(folder / "whole"), losses(folder / "killed")
    assert [step for step, _ in whole] == [*range(1, STEPS + 1)]
    assert set(killed) == set(whole)  # a step that was made again had the same loss
    assert set(recorded.steps) <= {*range(STEPS + 1)}


@pytest.mark.parametrize("residual", ["hook", "fold"])
def test_killed_run_is_the_whole_run(residual: str, tmp_path: Path) -> None:
    compare_with_whole(tmp_path, {"optimizer": "adamw", "schedule": "one-cycle", "residual": residual}, 1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["hook", "fold"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_run_killed_twice_with_every_schedule(schedule: str, residual: str, tmp_path: Path) -> None:
    seed = [*SCHEDULES].index(schedule)
    optimizer = [*OPTIMIZERS][seed % len(OPTIMIZERS)]
    names = {"optimizer": optimizer, "schedule": schedule, "residual": residual}
    compare_with_whole(tmp_path, names, 2, 2 * seed + (residual == "fold"))
