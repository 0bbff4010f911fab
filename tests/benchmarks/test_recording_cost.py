"""What recording and distances cost. Run with ``pytest tests/benchmarks --benchmark-enable -m slow -k 2000``.

Three trainings of 2,000 steps of the quickstart's smallest Transformer, the one whose steps are shortest, take turns of one
step in threads: two plain ones and one with the callback. Printed are the processor time in the callback's hooks, as a
share of the rest of its training, and the ratio of its other steps to those of the plain training, because a cost that
comes later (caches, compiled code) would be in these.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from pytest_benchmark.fixture import BenchmarkFixture
from test_speed import Runner, Turns
from torch.utils.data import DataLoader

from mlu_lightning import EmbeddingDistance, MLUCallback, ReferenceRecorder
from mlu_lightning.models import CausalTransformer
from mlu_lightning.quickstart import BASE, SHAPES, Study, load_text

STEPS = 2000
HOOKS = "on_train_start", "on_train_batch_start", "on_train_batch_end", "on_train_end"


def transformer() -> CausalTransformer:
    shape, context = SHAPES[BASE], Study().context
    return CausalTransformer(
        256, context, shape.depth, shape.embedding, shape.heads, mlp_hidden=shape.mlp_hidden, lr=2**-6
    )


def metered(callback: Callback) -> list[float]:
    """Processor time of every call of the callback's hooks, from now on."""
    seconds: list[float] = []

    def timed(hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> None:
            start = time.thread_time()
            hook(*args)
            seconds.append(time.thread_time() - start)

        return call

    for name in HOOKS:
        setattr(callback, name, timed(getattr(callback, name)))
    return seconds


def train(variants: list[list[Callback]]) -> tuple[list[float], np.ndarray]:
    """Processor time of whole trainings, and of their steps, [variant, step]."""
    text = torch.frombuffer(bytearray(load_text()), dtype=torch.uint8).long()
    length = Study().context + 1
    samples: Any = text[: len(text) // length * length].reshape(-1, length)
    data = DataLoader(samples, batch_size=Study().samples)
    turns = Turns(len(variants))

    def fit(number: int) -> float:
        start = time.thread_time()
        Trainer(
            max_steps=STEPS,
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[MLUCallback(transformer, init="coupled"), *variants[number], Runner(turns, number)],
        ).fit(transformer(), data)
        return time.thread_time() - start

    with ThreadPoolExecutor(len(variants)) as pool:
        fits = []
        for number in range(len(variants)):
            fits.append(pool.submit(fit, number))
            turns.wait_for_start(number)
        return [done.result() for done in fits], np.array(turns.seconds)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore:.*val_dataloader.*")
def test_run_of_2000_steps(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The aim is 1 %; 3 % leaves room for a busy machine."""
    path = tmp_path / "reference.safetensors"
    callbacks = ReferenceRecorder(path), EmbeddingDistance(path)

    def measure() -> list[tuple[float, np.ndarray, np.ndarray]]:
        found = []
        for callback in callbacks:
            hooks = metered(callback)
            (*_, whole), steps = train([[], [], [callback]])
            found.append((sum(hooks) / (whole - sum(hooks)), steps[2] / steps[0], steps[1] / steps[0]))
        return found

    measured = benchmark.pedantic(measure, rounds=1)
    with capsys.disabled():
        for callback, (share, steps, plain) in zip(callbacks, measured, strict=True):
            name = type(callback).__name__
            print(f"\n{name}: {share:.2%} of a training of {STEPS} steps is in its hooks")
            for what, ratios in ((f"steps with {name} / plain", steps), ("plain again / plain", plain)):
                low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
                print(f"{what}: {middle:.4f} (quartiles {low:.4f} to {high:.4f}, {ratios.size} steps)")
                benchmark.extra_info[f"{name}: {what}"] = {"median": middle, "quartiles": [low, high]}
            benchmark.extra_info[f"{name}: share"] = share
            assert share < 0.03
            assert np.median(steps) < 1.05
