"""What training costs on an accelerator: bf16, fused AdamW, 350M parameters, eager and compiled.

Run with ``python tests/benchmarks/accelerator.py``; it takes less than six minutes on one H100 or H200, and 50 GB of its
memory. Packages that are not installed are left out.
"""

import gc
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from helpers.trainers import quiet
from jsonargparse import auto_cli
from lightning.pytorch import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformer_variants import VARIANTS, VOCABULARY, Size, Transformer, base

from mlu_lightning import FeatureUpdate, Plan, attach_multipliers, fold, initialize, scale_optimizer

KIND = "AdamW fused"
PRESENT = [name for name, variant in VARIANTS.items() if find_spec(variant.package) and variant.verify]
LARGE = Size(9, 1792, 8, context=1024, head_dim=64)  # 347M parameters, 8,192 tokens a step


def main(
    size: Size = LARGE,
    device: str = "cuda",
    rounds: int = 20,
    steps: int = 3,
    compiled: bool = True,
    out: Path | None = None,
) -> None:
    """Measure starts of fits, memory, and steps of all parameterizations in turns.

    Args:
        size: Shape of the Transformer and of a batch.
        device: Device to train on.
        rounds: Times that each parameterization has its turn.
        steps: Steps of a turn.
        compiled: Whether steps are measured with compiled branches, too.
        out: File for what is printed, if there is to be one.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    console = Console(record=True, width=110, highlight=False)
    where = torch.cuda.get_device_name() if device == "cuda" else device
    parameters = sum(p.numel() for p in Transformer(size, KIND).parameters())
    console.print(f"{where}, torch {torch.__version__}, {parameters / 1e6:.0f}M parameters, {size}")
    starts = Table("fit", "first step after, s", "peak memory, MB", title=f"start and three steps, bf16-mixed, {KIND}")
    for name in PRESENT[:1] + [name for name in PRESENT if name != "plain again"]:  # the first warms the device up
        starts.add_row(name, *start(name, size, device))
    for name in ("plain", "hook"):
        starts.add_row(f"{name}, FeatureUpdate", *start(name, size, device, FeatureUpdate(steps=1)))
    console.print(starts)
    for way in ("eager", "compiled")[: 1 + compiled]:
        first, times = measure(size, device, rounds, steps, way == "compiled")
        ratios = times / times[0]
        table = Table("", "first step, s", "ms", "/ plain", title=f"{way} steps, bf16, {KIND}")
        for row, name in enumerate(PRESENT):
            table.add_row(name, f"{first[row]:.1f}", spread(1e3 * times[row], 2), spread(ratios[row], 4))
        console.print(table)
    if out is not None:
        out.write_text(console.export_text())


def spread(values: np.ndarray, digits: int) -> str:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


class _Start(Callback):  # notes when the first step begins
    seconds = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        if args[-1] == 0:  # index of the batch
            self.seconds = time.perf_counter()


def start(name: str, size: Size, device: str, *callbacks: Callback) -> tuple[str, str]:
    """Seconds until the first step of a fit begins, and its peak memory in three steps."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    watch, before, variant = _Start(), time.perf_counter(), VARIANTS[name]
    settings = {"accelerator": "gpu" if device == "cuda" else device, "devices": 1, "precision": "bf16-mixed"}
    trainer = quiet(*variant.callbacks(size), *callbacks, watch, max_steps=3, **settings)
    trainer.fit(variant.build(size, KIND), DataLoader(_tokens(size, 4), batch_size=size.samples))
    peak = f"{torch.cuda.max_memory_allocated() / 2**20:.0f}" if device == "cuda" else "-"
    return f"{watch.seconds - before:.2f}", peak


def measure(size: Size, device: str, rounds: int, steps: int, compiled: bool) -> tuple[list[float], np.ndarray]:
    """Seconds of the first step, [variant], and of a step in each of the turns, [variant, round]."""
    synchronize: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None

    def seconds(run: _Run, count: int) -> float:
        synchronize()
        before = time.perf_counter()
        for _ in range(count):
            run.step()
        synchronize()
        return (time.perf_counter() - before) / count

    runs = [_Run.of(name, size, device, compiled) for name in PRESENT]
    first = [seconds(run, 1) for run in runs]
    for run in runs:
        seconds(run, steps)
    order, times = random.Random(0), np.zeros((len(runs), rounds))
    for turn in range(rounds):
        for number in order.sample(range(len(runs)), len(runs)):
            times[number, turn] = seconds(runs[number], steps)
    return first, times


@dataclass(frozen=True)
class _Run:
    module: Transformer
    optimizer: torch.optim.Optimizer
    batch: Tensor

    @classmethod
    def of(cls, name: str, size: Size, device: str, compiled: bool) -> "_Run":
        variant = VARIANTS[name]
        module = variant.build(size, KIND)
        plan = _plan(module, size) if variant.residual else None
        if plan is not None:
            initialize(module, plan)
            _put(variant.residual, module, plan)
        module.to(device)
        optimizer: Any = module.configure_optimizers()
        if plan is not None:
            scale_optimizer(optimizer, module, plan)
        if compiled:  # branches are alike, so that one is compiled for all of a kind
            for branch in module.branches:
                branch.compile()
        return cls(module, optimizer, _tokens(size, 1).to(device))

    def step(self) -> None:
        with torch.autocast(self.batch.device.type, torch.bfloat16):
            logits = self.module(self.batch[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), self.batch[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _plan(module: Transformer, size: Size) -> Plan:
    return Plan.from_model(module, _tokens(size, 1)[:1], base=base(size))


def _put(residual: Literal["hook", "fold"] | None, module: Transformer, plan: Plan) -> None:
    if residual == "fold":
        fold(module, plan)
    else:
        attach_multipliers(module, plan)


def _tokens(size: Size, batches: int) -> Any:
    draws = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (batches * size.samples, size.context + 1), generator=draws)


if __name__ == "__main__":
    auto_cli(main)
