"""What a run has left in its folder: plans, checks, logged values and references."""

from __future__ import annotations

import csv
import json
import pickle
import struct
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mlu_lightning.callbacks.parameterization import MLUCallback
from mlu_lightning.checking.report import CheckReport
from mlu_lightning.plan import Plan
from mlu_lightning.reference import Reference
from mlu_lightning.reference_contents import FORMAT

__all__ = ["Curve", "RunRecord", "read_run"]

Curve = tuple[tuple[int, float], ...]
"""Logged values with their steps, ascending."""


@dataclass(frozen=True)
class RunRecord:
    """What was found in the folder of a run.

    Args:
        folder: of the run.
        plans: by path of the file or checkpoint that has it; checkpoints of one run have one plan, and the first is named.
        checks: by path.
        values: curves by name, from all logs.
        references: by path.
        problems: why a file could not be read, by path.

    >>> RunRecord(Path("lightning_logs/version_0")).is_empty
    True
    """

    folder: Path
    plans: dict[str, Plan] = field(default_factory=dict)
    checks: dict[str, CheckReport] = field(default_factory=dict)
    values: dict[str, Curve] = field(default_factory=dict)
    references: dict[str, Reference] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether nothing of a run was found."""
        return not (self.plans or self.checks or self.values or self.references or self.problems)


def read_run(folder: Path) -> RunRecord:
    """Collect what a run has left: what ``CSVLogger``, ``TensorBoardLogger`` and W&B write, checkpoints and reports.

    Args:
        folder: of the run, such as ``lightning_logs/version_0`` or ``wandb/offline-run-...``.

    Raises:
        ValueError: if there is no such folder, or nothing of a run in it.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}. Give that of a run, such as lightning_logs/version_0.")
    record = RunRecord(folder)
    values: dict[str, dict[int, float]] = defaultdict(dict)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        read = _reader(path)
        if read is None:
            continue
        try:
            read(path, name, record, values)
        except _UNREADABLE as error:
            record.problems[name] = f"{type(error).__name__}: {error}"
    record.values.update({name: tuple(sorted(curve.items())) for name, curve in sorted(values.items())})
    if record.is_empty:
        raise ValueError(
            f"Nothing of a run was found in {folder}: no metrics.csv, TensorBoard events or W&B file, no checkpoint, plan, "
            "check.json or reference. Give the folder of a run, such as lightning_logs/version_0."
        )
    return record


_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    EOFError,
    RuntimeError,
    struct.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    csv.Error,
)
"""What readers of damaged files raise."""
_Values = dict[str, dict[int, float]]
_Read = Callable[[Path, str, RunRecord, _Values], None]


def _reader(path: Path) -> _Read | None:
    if path.name == "metrics.csv":
        return _read_csv
    if path.name.startswith("events.out.tfevents"):
        return _read_events
    if path.name == "check.json":
        return _read_check
    return {".wandb": _read_wandb, ".ckpt": _read_checkpoint, ".yaml": _read_plan, ".safetensors": _read_reference}.get(
        path.suffix
    )


def _read_csv(path: Path, name: str, record: RunRecord, values: _Values) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for metric, text in row.items():
                if metric not in (None, "step", "epoch") and text:
                    values[metric][int(row["step"])] = float(text)


def _read_events(path: Path, name: str, record: RunRecord, values: _Values) -> None:
    try:
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
    except ImportError as error:
        raise ImportError("TensorBoard's events are read with its package: pip install tensorboard") from error
    events = EventAccumulator(str(path), {SCALARS: 0}).Reload()
    for metric in events.Tags()["scalars"]:
        for event in events.Scalars(metric):
            values[metric][event.step] = event.value


def _read_wandb(path: Path, name: str, record: RunRecord, values: _Values) -> None:
    for row in _wandb_rows(path):
        step = row.get("trainer/global_step", row.get("_step"))
        for metric, value in row.items():
            if isinstance(value, (int, float)) and not metric.startswith("_") and isinstance(step, int):
                values[metric][step] = float(value)
    values.pop("trainer/global_step", None)
    values.pop("epoch", None)


def _wandb_rows(path: Path) -> Iterator[dict[str, Any]]:
    """What was logged with ``wandb.log``, from W&B's file: a LevelDB log of protocol buffers, in blocks of 32 KiB."""
    try:
        from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made when it is imported
    except ImportError as error:
        raise ImportError("W&B's files are read with its package: pip install wandb") from error
    content, at, part = path.read_bytes(), 7, b""
    if content[:4] != b":W&B":
        raise ValueError("it does not begin as files of W&B do")
    while at + 7 <= len(content):
        if (rest := 2**15 - at % 2**15) < 7:  # where no header fits
            at += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found = Record.FromString(part)
            part = b""
            if found.HasField("history"):
                yield {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in found.history.item
                }


def _read_check(path: Path, name: str, record: RunRecord, values: _Values) -> None:
    record.checks[name] = CheckReport.from_json(path.read_text(encoding="utf-8"))


def _read_checkpoint(path: Path, name: str, record: RunRecord, values: _Values) -> None:
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    for key, state in checkpoint["callbacks"].items():
        if key.startswith(MLUCallback.__name__) and "plan" in state:
            plan = Plan.from_yaml(state["plan"], name)
            if plan not in record.plans.values():
                record.plans[name] = plan


def _read_plan(path: Path, name: str, record: RunRecord, values: _Values) -> None:
    text = path.read_text(encoding="utf-8")
    if any(line.startswith("mlu_plan:") for line in text.splitlines()):  # others are hyperparameters and the like
        record.plans[name] = Plan.from_yaml(text, name)


def _read_reference(path: Path, name: str, record: RunRecord, values: _Values) -> None:
    if _has_header(path):
        record.references[name] = Reference.load(path)


def _has_header(path: Path) -> bool:
    """Whether a safetensors file is a reference, and not the weights of a model."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return FORMAT.encode() in file.read(min(length, 10_000_000))
