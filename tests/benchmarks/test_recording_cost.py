"""What recording, distances and features cost. Run with ``pytest tests/benchmarks --benchmark-enable -m slow -k 2000``.

Trainings of the quickstart's smallest Transformer take turns of one step in threads. A callback costs the processor time in
its hooks, and what it makes the rest of the steps slower; trainings of one kind differ by where tensors lie in memory.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.trainers import quiet
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from pytest_benchmark.fixture import BenchmarkFixture
from torch.utils.data import DataLoader
from turns import Runner, Turns, take_turns

from mlu_lightning import EmbeddingDistance, FeatureUpdate, MLUCallback, ReferenceRecorder
from mlu_lightning.models import CausalTransformer
from mlu_lightning.quickstart.study import BASE, SHAPES, Study, load_text

STEPS = 2000
ORDER = "plain recorder distance features recorder distance plain features distance plain features recorder".split()
HOOKS = ("on_train_start", "on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end", "on_train_end")


def transformer() -> CausalTransformer:
    shape, context = SHAPES[BASE], Study().context
    sizes = (shape.depth, shape.embedding, shape.heads)
    return CausalTransformer(256, context, *sizes, mlp_hidden=shape.mlp_hidden, lr=2**-6)


class MeteredRunner(Runner):
    """One of those that take turns, whose steps do not count the time in the hooks of other callbacks."""

    def __init__(self, turns: Turns, number: int, callbacks: list[Callback]) -> None:
        super().__init__(turns, number)
        self.in_hooks = 0.0
        for callback in callbacks:
            for name in HOOKS:
                if is_overridden(name, callback, Callback):
                    setattr(callback, name, self._timed(getattr(callback, name)))

    def on_train_batch_start(self, *args: object) -> None:
        super().on_train_batch_start(*args)
        self._start -= self.in_hooks

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        self._start += self.in_hooks
        super().on_train_batch_end(trainer, *args)

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> None:
            start = time.thread_time()
            hook(*args)
            self.in_hooks += time.thread_time() - start

        return call


def train(variants: list[list[Callback]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Processor time of trainings, [variant], of it in hooks, [variant], and of steps without hooks, [variant, step]."""
    text = torch.frombuffer(bytearray(load_text()), dtype=torch.uint8).long()
    length = Study().context + 1
    samples: Any = text[: len(text) // length * length].reshape(-1, length)
    data = DataLoader(samples, batch_size=Study().samples)
    turns, wholes = Turns(len(variants)), np.zeros(len(variants))
    runners = [MeteredRunner(turns, number, callbacks) for number, callbacks in enumerate(variants)]

    def fit(number: int) -> None:
        start = time.thread_time()
        callbacks = [MLUCallback(transformer, init="coupled"), *variants[number], runners[number]]
        quiet(*callbacks, max_steps=STEPS, max_epochs=-1).fit(transformer(), data)
        wholes[number] = time.thread_time() - start

    steps = take_turns(turns, fit)
    return wholes, np.array([runner.in_hooks for runner in runners]), steps


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore:.*val_dataloader.*")
def test_run_of_2000_steps(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The aim is 1 %; 5 % leaves room for a busy machine."""
    reference = tmp_path / "reference.safetensors"
    train([[ReferenceRecorder(reference)]])
    kinds = np.array(ORDER)
    make: dict[str, Callable[[int], list[Callback]]] = {
        "plain": lambda number: [],
        "recorder": lambda number: [ReferenceRecorder(tmp_path / f"{number}.safetensors")],
        "distance": lambda number: [EmbeddingDistance(reference)],
        "features": lambda number: [FeatureUpdate()],
    }
    variants = [make[kind](number) for number, kind in enumerate(ORDER)]
    wholes, hooks, steps = benchmark.pedantic(train, (variants,), rounds=1)
    shares = hooks / wholes[kinds == "plain"].mean()
    slower = np.median(steps / steps[kinds == "plain"].mean(0), axis=1)
    slower = slower / slower[kinds == "plain"].mean() - 1

    def error(values: np.ndarray) -> float:
        return float(values.std(ddof=1) / np.sqrt(len(values)))

    with capsys.disabled():
        plain = slower[kinds == "plain"]
        step = 1e3 * np.median(steps[kinds == "plain"])
        print(f"\nplain step: {step:.2f} ms; they differ by {plain.std(ddof=1):.2%}")
        for kind in ("recorder", "distance", "features"):
            share, later = shares[kinds == kind], slower[kinds == kind]
            total = share.mean() + later.mean()
            uncertain = float(np.hypot(error(share + later), error(plain)))
            print(f"{kind}: {share.mean():.2%} of {STEPS} steps is in its hooks; the rest of a step takes")
            print(
                f"  {later.mean():+.2%} ({', '.join(map('{:+.2%}'.format, later))}); in all {total:.2%} ± {uncertain:.2%}"
            )
            benchmark.extra_info[kind] = {"hooks": share.mean(), "later": later.mean(), "error": uncertain}
            assert share.mean() < 0.03 and total < 0.05
