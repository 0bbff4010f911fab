"""What the plugin costs. Run with ``pytest tests/benchmarks --benchmark-enable -m slow``.

The ratio of a training step's time with the callback to that without is measured in one run, variants taking turns, and
printed with its quartiles.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from pytest_benchmark.fixture import BenchmarkFixture
from torch.utils.data import DataLoader

from mlu_lightning import Plan
from mlu_lightning.callbacks import MLUCallback
from mlu_lightning.models import CausalTransformer
from mlu_lightning.multipliers import attach_multipliers
from mlu_lightning.optimization import scale_optimizer

LENGTH = 128
STEPS, WARM_UP = 60, 5


def transformer(depth: int = 12, embedding: int = 256, heads: int = 16) -> CausalTransformer:
    """The default has 10M parameters."""
    return CausalTransformer(vocabulary=512, context=LENGTH, depth=depth, embedding=embedding, heads=heads)


def base() -> CausalTransformer:
    return transformer(depth=4, embedding=128, heads=4)


class Turns:
    """Lets trainings in several threads take turns, a step each, and measures the steps.

    What slows the machine down for a while then slows all of them down. Times are the thread's processor time, which
    work of other processes does not lengthen.
    """

    def __init__(self, runners: int) -> None:
        self.seconds: list[list[float]] = [[] for _ in range(runners)]
        self._waiting = 0  # runners that have come to their first step
        self._turn = 0
        self._changed = threading.Condition()

    def wait_for_start(self, number: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting > number, timeout=300)

    def begin(self, number: int) -> None:
        with self._changed:
            self._waiting = max(self._waiting, number + 1)
            self._changed.notify_all()
            everyone = len(self.seconds)
            reached = self._changed.wait_for(lambda: (self._waiting, self._turn % everyone) == (everyone, number), 300)
            assert reached, "another runner has stopped"

    def end(self, number: int, seconds: float) -> None:
        with self._changed:
            self.seconds[number].append(seconds)
            self._turn += 1
            self._changed.notify_all()


class Runner(Callback):
    """One of those that take turns."""

    def __init__(self, turns: Turns, number: int) -> None:
        self._turns = turns
        self._number = number
        self._start = 0.0

    def on_train_batch_start(self, *_: object) -> None:
        self._turns.begin(self._number)
        self._start = time.thread_time()

    def on_train_batch_end(self, *_: object) -> None:
        self._turns.end(self._number, time.thread_time() - self._start)


def step_times(variants: list[list[Callback]]) -> np.ndarray:
    """Seconds of every step of trainings with the given callbacks, [variant, step]."""
    tokens = torch.randint(512, (4 * STEPS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    data = DataLoader(list(tokens), batch_size=4)
    turns = Turns(len(variants))

    def fit(number: int) -> None:
        model = transformer()
        assert 9e6 < sum(p.numel() for p in model.parameters()) < 11e6
        Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*variants[number], Runner(turns, number)],
        ).fit(model, data)

    with ThreadPoolExecutor(len(variants)) as pool:
        fits = []
        for number in range(len(variants)):
            fits.append(pool.submit(fit, number))
            turns.wait_for_start(number)
        for done in fits:
            done.result()
    return np.array(turns.seconds)[:, WARM_UP:]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore:.*val_dataloader.*")
def test_training_step(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """The aim is a ratio of 1.01; 1.05 leaves room for a busy machine. The plain training against itself is the error."""
    variants: dict[str, list[Callback]] = {
        "plain": [],
        "plain again": [],
        "hook": [MLUCallback(base(), residual="hook")],
        "fold": [MLUCallback(base(), residual="fold")],
    }
    times = benchmark.pedantic(step_times, ([*variants.values()],), rounds=1)
    with capsys.disabled():
        print(f"\nplain step: {1e3 * np.median(times[0]):.1f} ms of processor time")
        for name, ratios in zip(list(variants)[1:], times[1:] / times[0], strict=True):
            low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
            benchmark.extra_info[f"{name} / plain"] = {"median": middle, "quartiles": [low, high]}
            print(f"{name} / plain: {middle:.4f} (quartiles {low:.4f} to {high:.4f}, {ratios.size} steps)")
            assert middle < 1.05


@pytest.mark.parametrize("family", ["sgd", "adamw"])
def test_no_more_groups_than_distinct_factors(family: str) -> None:
    model = transformer(depth=3, embedding=64, heads=2)
    plan = Plan.from_model(model, base=transformer(depth=2, embedding=32, heads=4))
    attach_multipliers(model, plan)
    make = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[family]
    optimizer = make(model.parameters(), lr=1e-3, weight_decay=0.1)
    scale_optimizer(optimizer, model, plan)
    seen: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(len(optimizer.param_groups)))
    model(model.example_input_array).sum().backward()
    optimizer.step()
    distinct = {(s.lr, s.eps if family == "adamw" else 1.0, s.weight_decay) for s in plan.scales(family).values()}
    assert 1 < seen[0] <= len(distinct) < len(plan.parameters)


LLAMA_70B = """
import json, resource, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from mlu_lightning import discover

with torch.device("meta"):
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128256,
        )
    )
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before, start = peak(), time.perf_counter()
structure = discover(model, {"input_ids": torch.zeros(1, 16, dtype=torch.long)})
print(
    json.dumps(
        {
            "parameters": sum(p.numel() for p in model.parameters()),
            "depth": structure.depth,
            "unassigned": len(structure.unassigned),
            "seconds": time.perf_counter() - start,
            "megabytes": (peak() - before) / 1024,
        }
    )
)
"""


@pytest.mark.slow
def test_discovery_of_70_billion_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    """On meta tensors; the aim is 10 s and 1 GB."""
    done = subprocess.run([sys.executable, "-c", LLAMA_70B], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert 70e9 < found["parameters"] < 71e9
    assert (found["depth"], found["unassigned"]) == (160, 0)
    assert found["megabytes"] < 1000
    with capsys.disabled():
        print(f"\ndiscovery of 70B parameters: {found['seconds']:.2f} s, {found['megabytes']:.0f} MB")
