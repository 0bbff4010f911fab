"""What training costs next to plain: with hooks, folded, with microsoft/mup and with unit-scaling.

Run with ``pytest tests/benchmarks/test_step_cost.py --benchmark-enable -m slow``. The largest size takes 11 GB.
"""

import gc
import multiprocessing
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.processes import run
from pytest_benchmark.fixture import BenchmarkFixture
from transformer_variants import OPTIMIZERS, SIZES, VARIANTS, Transformer, fit, start
from turns import Runner, Turns, take_turns

from mlu_lightning import Plan, attach_multipliers, scale_optimizer
from mlu_lightning.models import CausalTransformer

RUNS = {"1M": (4, 28), "10M": (3, 13), "100M": (2, 8)}  # runs with new modules, and steps of each
WARM_UP = 3
STARTED = [name for name, variant in VARIANTS.items() if find_spec(variant.package) and name != "plain again"]
PRESENT = [name for name in VARIANTS if name in (*STARTED, "plain again") and name != "unverified"]
PROCESSES, WIDTH = 3, 22
Show = Callable[..., None]

IMPORT = """
import time
import lightning.pytorch, torchmetrics, yaml, jsonargparse, rich, safetensors
before = time.process_time()
import mlu_lightning
print(time.process_time() - before)
"""


@pytest.fixture(scope="module")
def show(request: pytest.FixtureRequest) -> Iterator[Show]:
    """Prints a line of cells although output is captured; first, what machine this is."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def line(*cells: str) -> None:
        with capture.global_and_fixture_disabled():
            print("".join(f"{cell:<{WIDTH}}" for cell in cells).rstrip(), flush=True)

    processor = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = processor.group(1) if processor else platform.processor()
    line(f"\n{name}, one of {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}")
    missing = [*VARIANTS.keys() - {*PRESENT, *STARTED}] or "none"
    line(f"load at the beginning {os.getloadavg()[0]:.1f}; not installed: {missing}")
    yield line
    line(f"load at the end {os.getloadavg()[0]:.1f}")


@pytest.fixture(scope="module")
def steps_table(show: Show) -> Show:
    show("\nstep", "plain, ms", *(f"{name} / plain" for name in PRESENT[1:]))
    return show


@pytest.fixture(scope="module")
def starts_table(show: Show) -> Show:
    show("\nfirst step after, s", *STARTED)
    return show


def spread(values: np.ndarray, digits: int = 3) -> str:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def measure(size: str, kind: str) -> np.ndarray:
    runs, steps = RUNS[size]
    times = []
    for _ in range(runs):
        gc.collect()  # trainers and modules refer to each other
        turns = Turns(len(PRESENT))

        def train(number: int, turns: Turns = turns) -> None:
            fit(VARIANTS[PRESENT[number]], SIZES[size], kind, steps, Runner(turns, number))

        times.append(take_turns(turns, train)[:, WARM_UP:])
    return np.concatenate(times, axis=1)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_what_they_are_called(size: str) -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(SIZES[size], "SGD").parameters())
    assert parameters == pytest.approx(1e6 * float(size[:-1]), rel=0.1)


@pytest.mark.parametrize("family", ["sgd", "adamw"])
def test_no_more_groups_than_distinct_factors(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CausalTransformer(256, 64, depth=3, embedding=64, heads=2)
    plan = Plan.from_model(model, base=CausalTransformer(256, 64, depth=2, embedding=32, heads=4))
    attach_multipliers(model, plan)
    make: Any = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[family]
    optimizer = make(model.parameters(), lr=1e-3, weight_decay=0.1)
    scale_optimizer(optimizer, model, plan)
    seen: list[Any] = []
    read = make._init_group  # called for every group of an update

    def counted(self: Any, group: Any, *args: Any) -> Any:
        seen.append(group)
        return read(self, group, *args)

    monkeypatch.setattr(make, "_init_group", counted)
    model(model.example_input_array).sum().backward()
    optimizer.step()
    distinct = {(s.lr, s.eps if family == "adamw" else 1.0, s.weight_decay) for s in plan.scales(family).values()}
    assert 1 < len(seen) <= len(distinct) < len(plan.parameters)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*num_workers.*", "ignore:.*val_dataloader.*")
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("size", SIZES)
def test_step(benchmark: BenchmarkFixture, steps_table: Show, size: str, kind: str) -> None:
    """The aim is a ratio of 1.01; a quarter of all steps below 1.05 leaves room for a busy machine.

    The plain training next to itself is the error.
    """
    times = benchmark.pedantic(measure, (size, kind), rounds=1)
    ratios = times / times[0]
    steps_table(f"{size}, {kind}", spread(1e3 * times[0], 1), *(spread(row) for row in ratios[1:]))
    benchmark.extra_info.update(zip(PRESENT, np.quantile(ratios, (0.25, 0.5, 0.75), axis=1).T.tolist(), strict=True))
    for name in ("hook", "fold"):
        assert np.quantile(ratios[PRESENT.index(name)], 0.25) < 1.05


@pytest.fixture(scope="module")
def processes() -> Iterator[Pool]:
    """Starts a process for every task, which has imported everything.

    There, large tensors have pages of their own, or else the peak memory of one and the same training differs by 10 %.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["transformer_variants"])
        with context.Pool(1, maxtasksperchild=1) as pool:
            yield pool


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_start_and_peak_memory(processes: Pool, starts_table: Show, size: str) -> None:
    """Build, plan, initialize, up to the first step; and the most memory in three steps."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in STARTED}
    for _ in range(PROCESSES):
        for name in STARTED:
            found[name].append(processes.apply(start, (name, size, "AdamW fused")))
    seconds, looking, megabytes = (
        {name: np.array([each[key] for each in found[name]]) for name in STARTED}
        for key in ("seconds", "looking", "megabytes")
    )
    starts_table(size, *(spread(seconds[name], 2) for name in STARTED))
    planning = seconds["unverified"] - seconds["plain"]
    verification = seconds["fold"] - seconds["unverified"] + looking["fold"]
    starts_table(
        "  of fold",
        f"planning {spread(planning)}, verification {spread(verification)}, in the first steps "
        f"{spread(looking['fold'])}",
    )
    starts_table("  peak memory, MB", *(spread(megabytes[name], 0) for name in STARTED))
    for name in ("hook", "fold"):
        assert np.median(megabytes[name]) < 30 + 1.02 * np.median(megabytes["plain"])


@pytest.mark.slow
def test_import(show: Show) -> None:
    seconds = [run(IMPORT) for _ in range(PROCESSES)]
    show(f"\nimport of mlu_lightning after Lightning, s: {spread(np.array(seconds))}")
