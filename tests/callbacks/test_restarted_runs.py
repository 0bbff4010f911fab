"""Reference files of runs that are started again, of other runs, and of two processes that write at once."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import exit_code, forked
from helpers.watched_runs import SHAPE, fit, loader
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mlu_lightning import Plan, ReferenceRecorder
from mlu_lightning.models import ResNet
from mlu_lightning.observation import Reference
from mlu_lightning.utilities.locks import WriterLock

STEPS = 6


class KilledAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(path: Path, kill: int = 0, seed: int | None = 0, job: str = "", restarts: int = 0, **model: Any) -> None:
    """A script that is started again as it is; its first checkpoint comes after 4 steps."""
    if job:
        os.environ |= {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restarts)}
    _ = torch.seed() if seed is None else torch.manual_seed(seed)
    saving = ModelCheckpoint(path.parent, "{step}", every_n_train_steps=4, save_last=True)
    callbacks = [ReferenceRecorder(path, steps=1), saving, *([KilledAt(kill)] if kill else [])]
    try:
        module, data = ResNet(**SHAPE | model), loader(8, shuffle=False)
        fit(module, *callbacks, steps=STEPS, data=data, enable_checkpointing=True, ckpt_path="last")
    except (OSError, ValueError) as error:
        (path.parent / "error").write_text(f"{type(error).__name__}: {error}")


def error(path: Path) -> str:
    found = path.parent / "error"
    return found.read_text() if found.exists() else ""


JOB = {"seed": None, "job": "7"}


@pytest.mark.parametrize(
    ("first", "kill", "second", "message"),
    [
        ({}, 2, {}, ""),  # the same script, before its first checkpoint
        ({}, 5, {}, ""),  # and after it
        (JOB, 2, JOB | {"restarts": 1}, ""),  # without a seed, but Slurm has started it again
        (JOB, 2, JOB, "other initial weights, seed"),  # a second script of the same job
        ({}, 2, {"seed": 1}, "other initial weights, seed"),
        ({}, 2, {"lr": 0.5}, "other module, optimizers"),
        ({}, 2, {"hidden": 8}, "other module, recordings, optimizers, initial weights"),
    ],
)
def test_killed_run_goes_on_and_another_is_refused(
    first: dict[str, Any], kill: int, second: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path, whole = tmp_path / "run.safetensors", tmp_path / "whole" / "run.safetensors"
    assert exit_code(train, path, kill, **first) == -signal.SIGKILL
    before = path.read_bytes()
    assert exit_code(train, path, **second) == 0
    assert message in error(path)
    if message:
        assert error(path).startswith("FileExistsError") and path.read_bytes() == before
        return
    assert not error(path)
    exit_code(train, whole)
    one, other = Reference.load(path), Reference.load(whole)
    assert one.steps == other.steps == tuple(range(STEPS + 1))
    if second == {}:
        assert one.digests == other.digests and one.losses.equal(other.losses)


def test_a_run_that_has_a_checkpoint_or_an_end_is_not_begun_again(tmp_path: Path) -> None:
    for folder, kill in (("checkpoint", 6), ("end", 0)):
        path = tmp_path / folder / "run.safetensors"
        exit_code(train, path, kill)
        for checkpoint in path.parent.glob("*.ckpt"):
            checkpoint.unlink()
        before = path.read_bytes()
        exit_code(train, path)
        assert "or resume its run" in error(path) and path.read_bytes() == before
    module = ResNet(**SHAPE)
    fit(module, ReferenceRecorder(path, overwrite=True), steps=1)
    assert Reference.load(path).steps == (0, 1)


def test_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    with WriterLock(path):
        exit_code(train, path)
        assert error(path).startswith(f"BlockingIOError: Another process is writing {path}. Give each")
        assert not path.exists()
    exit_code(train, path, kill=2)
    assert any(file.suffix == ".lock" for file in tmp_path.iterdir()), "what a killed process leaves is in nobody's way"
    (tmp_path / "error").unlink()
    exit_code(train, path)
    assert not error(path) and not [*tmp_path.glob(".*")]


def save(plan: Plan, path: Path, begun: int) -> None:
    try:
        os.write(begun, b"1")
        plan.save(path)
    except BlockingIOError as reason:
        (path.parent / "error").write_text(str(reason))


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_of_two_processes_that_save_a_plan_one_is_refused_unless_it_is_the_same(alpha: float, tmp_path: Path) -> None:
    path, example = tmp_path / "plan.yaml", (torch.ones(2, 3), torch.ones(2, 2))
    first, second = (Plan.from_model(ResNet(**SHAPE), example, alpha=value) for value in (1.0, alpha))
    begun = os.pipe()
    with WriterLock(path):
        process = forked(save, second, path, begun[1])
        os.read(begun[0], 1)
        process.join(0.3)
        path.write_text(first.to_yaml())
    process.join()
    assert error(path).startswith("Another process is writing" if alpha != 1 else "")
    assert bool(error(path)) == (alpha != 1) and Plan.load(path) == first
    second.save(path)
    assert Plan.load(path) == second and not [*tmp_path.glob(".*")]
