"""The runs of the quickstart: whether the best learning rate stays where it is when the shape grows.

Small Transformers are trained on text at a few learning rates: at a base shape, and with eight times its depth, hidden
width and embedding dimension, each alone, with the base's hyperparameters and :class:`mlu_lightning.MLUCallback`, or not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from pydoc_data.topics import topics
from stat import S_ISREG
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mlu_lightning.callbacks import MLUCallback
from mlu_lightning.models import CausalTransformer
from mlu_lightning.utilities.whole_files import write_whole
from mlu_lightning.utilities.workers import worker_pool

BASE = "base"  # name of the shape at which the hyperparameters are tuned
_LONGEST = 2**28  # bytes of a text, of which a process takes about twenty times the memory
_LOOKED_AT = 2**24  # bytes of a text, to see whether there is something to learn; prose has a third of them compressed


@dataclass(frozen=True)
class TransformerShape:
    """Shape of a :class:`mlu_lightning.models.CausalTransformer` with heads of dimension 16; depth counts blocks."""

    depth: int
    heads: int
    mlp_hidden: int
    embedding: int


SHAPES: dict[str, TransformerShape] = {
    BASE: TransformerShape(depth=2, heads=2, mlp_hidden=128, embedding=32),
    "8 × depth": TransformerShape(depth=16, heads=2, mlp_hidden=128, embedding=32),
    "8 × hidden width": TransformerShape(depth=2, heads=16, mlp_hidden=1024, embedding=32),
    "8 × embedding": TransformerShape(depth=2, heads=2, mlp_hidden=128, embedding=256),
}


@dataclass(frozen=True)
class Study:
    """What is trained."""

    shapes: dict[str, TransformerShape] = field(default_factory=lambda: dict(SHAPES))  # by name; the first is the base
    exponents: tuple[int, ...] = (-10, -9, -8, -7, -6, -5, -4)  # logarithms of the learning rates, base 2
    steps: int = 220
    samples: int = 16  # in a batch
    context: int = 32  # bytes in a sample
    seed: int = 0  # of initial weights and batches

    def __post_init__(self) -> None:
        """Check what the command line gives."""
        if self.steps < 1:
            raise ValueError(f"There are no runs of {self.steps} steps. Give --steps 1 or more; 220 is the default.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"The seed {self.seed} is none. Give --seed a number from 0 to {2**32 - 1}.")


@dataclass(frozen=True)
class Run:
    """A training run of a shape at the learning rate 2^exponent."""

    shape: str
    mlu: bool  # whether it has the callback; at the base shape that makes no difference
    exponent: int
    loss: float = math.nan  # in validation, in nats per byte; NaN if the run diverged


@dataclass(frozen=True)
class Windows(Dataset[Tensor]):
    """Samples of consecutive tokens, given where they start; the last token of each is only predicted."""

    tokens: Tensor
    starts: Tensor
    length: int

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        start = int(self.starts[index])
        return self.tokens[start : start + self.length]


def load_text(path: str | None = None) -> bytes:
    """Read the text to train on: a file, or the documentation in Python's standard library (``pydoc_data.topics``)."""
    if path is None:
        return "\n".join(topics[name] for name in sorted(topics)).encode()
    try:
        status = Path(path).stat()
        if not S_ISREG(status.st_mode):
            raise _unfit(path, "is no file, but a folder, a device or a pipe", "the path of a file")
        if (size := status.st_size) > _LONGEST:
            raise _unfit(path, f"has {size:,} bytes, and at most {_LONGEST:,} are read", "a part of it (head -c)")
        text = Path(path).read_bytes()
    except OSError as error:
        raise _unfit(path, f"cannot be read: {error.strerror}", "the path of a file") from error
    if (size := len(text)) < 10_000:
        raise _unfit(path, f"has {size} bytes, and there is nothing to learn from less than 10 000", "a longer file")
    start = text[:_LOOKED_AT]
    if (size := len(zlib.compress(start))) < max(500, len(start) // 100):
        why = f"says the same again and again: {len(start):,} bytes of it can be written in {size:,}"
        raise _unfit(path, why, "a file in which something can be learned")
    return text


def _unfit(path: str, why: str, instead: str) -> ValueError:
    return ValueError(f"The text {path} {why}. Give --text {instead}.")


def run_study(
    study: Study, text: bytes, report: Callable[[Run], None] = lambda run: None, known: Sequence[Run] = ()
) -> list[Run]:
    """Train every shape at every learning rate, two runs at a time where there are two cores.

    ``report`` is called with each run when it is done; those that are ``known`` are not trained again. The runs are returned
    in the order of shapes, parameterizations and learning rates; those of the base stand for both parameterizations.
    """
    runs = list(_runs(study))
    done = {replace(run, loss=math.nan): run for run in known}
    missing = [run for run in runs if run not in done]
    costs = {name: s.depth * s.embedding * (s.mlp_hidden + 32 * s.heads) for name, s in study.shapes.items()}
    longest_first = sorted(missing, key=lambda run: -costs[run.shape])  # so that both cores end together
    workers = min(2, os.cpu_count() or 1)
    with worker_pool(workers, threads=1) as pool:
        pending = {pool.submit(_train, study, text, run): run for run in longest_first}
        for future in as_completed(pending):
            done[pending[future]] = future.result()
            report(future.result())
    return [done[run] for run in runs]


def best_exponent(runs: list[Run], shape: str, mlu: bool) -> float:
    """Exponent of the learning rate with the least loss, by a parabola unless it is at an end or a run diverged."""
    curve = sorted(curve_of(runs, shape, mlu))
    losses = [loss if math.isfinite(loss) else math.inf for _, loss in curve]
    best = losses.index(min(losses))
    exponent = curve[best][0]
    if best in (0, len(curve) - 1) or not math.isfinite(losses[best - 1] + losses[best + 1]):
        return float(exponent)
    left, middle, right = losses[best - 1 : best + 2]
    spacing = (curve[best + 1][0] - curve[best - 1][0]) / 2
    return exponent + spacing * (left - right) / (2 * (left - 2 * middle + right))


def curve_of(runs: list[Run], shape: str, mlu: bool) -> list[tuple[int, float]]:
    """Exponents and losses of one shape; the base's runs are those of both parameterizations."""
    return [(run.exponent, run.loss) for run in runs if run.shape == shape and (run.mlu == mlu or shape == BASE)]


def save_runs(study: Study, text: bytes, runs: Sequence[Run], path: Path) -> None:
    """Write a study of a text and its runs as JSON, in which the loss of a run that diverged is null."""
    rows = [asdict(run) | {"loss": run.loss if math.isfinite(run.loss) else None} for run in runs]
    write_whole({path: json.dumps(_settings(study, text) | {"runs": rows}, indent=1, allow_nan=False).encode()})


def read_runs(study: Study, text: bytes, path: Path) -> list[Run]:
    """Read the runs of a study of a text that :func:`save_runs` wrote, none if there is no file, or refuse others."""
    if not path.exists():
        return []
    advice = "Give --out another folder, or remove the file."
    try:
        found = json.loads(path.read_bytes())
        runs = [Run(**row | {"loss": math.nan if row["loss"] is None else row["loss"]}) for row in found.pop("runs")]
        known = [replace(run, loss=math.nan) for run in runs]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as runs of a quickstart: {error!r:.200}. {advice}") from error
    settings = json.loads(json.dumps(_settings(study, text)))
    wrong = [name for name in settings if found.get(name) != settings[name]]
    if wrong or not {*known} <= {*_runs(study)}:
        raise ValueError(f"{path} has the runs of another {' and '.join(wrong) or 'study'}. {advice}")
    return runs


def _settings(study: Study, text: bytes) -> dict[str, Any]:
    return {"study": asdict(study), "text": hashlib.sha256(text).hexdigest()}


def _runs(study: Study) -> Iterator[Run]:
    for shape in study.shapes:
        for mlu in (False,) if shape == BASE else (True, False):
            for exponent in study.exponents:
                yield Run(shape, mlu, exponent)


def _train(study: Study, text: bytes, run: Run) -> Run:
    training, validation, vocabulary = _tokens(text)

    def build(name: str) -> CausalTransformer:
        shape, rate = asdict(study.shapes[name]), 2.0**run.exponent
        return CausalTransformer(vocabulary, study.context, **shape, lr=rate, schedule_steps=study.steps)

    seed_everything(study.seed, verbose=False)
    model = build(run.shape)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=study.steps,
        callbacks=[MLUCallback(base=build(BASE))] if run.mlu else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    draws = torch.Generator().manual_seed(study.seed)
    starts = torch.randint(len(training) - study.context, (study.steps * study.samples,), generator=draws)
    trainer.fit(model, DataLoader(Windows(training, starts, study.context + 1), batch_size=study.samples))
    spaced = torch.linspace(0, len(validation) - study.context - 1, 256).long()
    loader = DataLoader(Windows(validation, spaced, study.context + 1), batch_size=64)
    (metrics,) = trainer.validate(model, loader, verbose=False)
    return replace(run, loss=metrics["val_loss"])


def _tokens(text: bytes) -> tuple[Tensor, Tensor, int]:
    """Training tokens, the last tenth for validation, and the size of the vocabulary."""
    values = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    vocabulary, tokens = torch.unique(values, return_inverse=True)
    cut = len(tokens) * 9 // 10
    return tokens[:cut], tokens[cut:], len(vocabulary)
