"""What recording and distances cost. Run with ``pytest tests/benchmarks --benchmark-enable -m slow``.

Runs of 2,000 steps of the quickstart's smallest Transformer, the one whose steps are shortest, take turns of one step in
threads; the ratio of their whole processor time to that of the plain run is printed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


def transformer() -> CausalTransformer:
    shape, context = SHAPES[BASE], Study().context
    return CausalTransformer(
        256, context, shape.depth, shape.embedding, shape.heads, mlp_hidden=shape.mlp_hidden, lr=2**-6
    )


def seconds(variants: list[list[Callback]]) -> list[float]:
    """Processor time of whole trainings that take turns."""
    text = torch.frombuffer(bytearray(load_text()), dtype=torch.uint8).long()
    length = Study().context + 1
    data = DataLoader(text[: len(text) // length * length].reshape(-1, length), batch_size=Study().samples)  # type: ignore[arg-type]
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
        return [done.result() for done in fits]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore:.*val_dataloader.*")
def test_run_of_2000_steps(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The aim is a ratio of 1.01; 1.03 leaves room for a busy machine. The plain run against itself is the error."""
    path = tmp_path / "reference.safetensors"
    turns: dict[str, Callable[[], Callback]] = {
        "ReferenceRecorder": lambda: ReferenceRecorder(path),
        "EmbeddingDistance": lambda: EmbeddingDistance(path, ["rms", "gram", "cka", "procrustes", "output"]),
    }

    def measure() -> dict[str, list[float]]:
        return {name: seconds([[], [], [make()]]) for name, make in turns.items()}

    measured = benchmark.pedantic(measure, rounds=1)
    with capsys.disabled():
        for name, (plain, again, watched) in measured.items():
            ratios = watched / plain, watched / again
            benchmark.extra_info[f"{name} / plain"] = ratios
            print(
                f"\n{name} / plain: {ratios[0]:.4f} and {ratios[1]:.4f} of two plain runs, which took {plain:.1f} s and "
                f"{again:.1f} s of processor time"
            )
            assert min(ratios) < 1.03
