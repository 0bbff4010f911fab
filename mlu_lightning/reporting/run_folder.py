"""What a run has left in its folder: plans, checks, logged values and references, and how each of them is read."""

from __future__ import annotations

import csv
import math
import pickle
import struct
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten

import torch

from mlu_lightning.callbacks.mlu_callback import MLUCallback
from mlu_lightning.checking.report import CheckReport
from mlu_lightning.observation import Reference
from mlu_lightning.observation.reference_format import FORMAT
from mlu_lightning.planning import Plan

__all__ = ["UNREADABLE", "Curve", "RunRecord", "read_run", "reason"]

Curve = tuple[tuple[int, float], ...]
"""Logged values with their steps, ascending."""


@dataclass(frozen=True)
class RunRecord:
    """What was found in the folder of a run, by the path of the file; curves by the name of what was logged."""

    folder: Path
    plans: dict[str, Plan] = field(default_factory=dict)  # of checkpoints with one plan, the first is named
    checks: dict[str, CheckReport] = field(default_factory=dict)
    values: dict[str, Curve] = field(default_factory=dict)
    references: dict[str, Reference] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)  # why a file could not be read, or only in part


def read_run(folder: Path) -> RunRecord:
    """Collect what a run has left: logs of ``CSVLogger`` and ``TensorBoardLogger``, checkpoints, plans, checks, references.

    A log that contradicts those before it is of another run: it is left out, and named among the problems.

    Args:
        folder: folder of the run, such as ``lightning_logs/version_0``.

    Raises:
        ValueError: if there is no such folder, or nothing of a run in it.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     _ = Path(folder, "metrics.csv").write_text("step,train_loss\\n0,2.5\\n1,2.25\\n")
    ...     read_run(Path(folder)).values
    {'train_loss': ((0, 2.5), (1, 2.25))}
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}. Give that of a run, such as lightning_logs/version_0.")
    record = RunRecord(folder)
    logs: dict[str, _Values] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = _encodable(str(path.relative_to(folder)))
        read = _reader(path)
        if read is None:
            continue
        # a resumed run goes on in another file of TensorBoard's, and may repeat steps
        log = str(Path(name).parent) if read is _read_events else name
        try:
            read(path, name, record, logs.setdefault(log, defaultdict(dict)))
        except UNREADABLE as error:
            record.problems[name] = reason(error)
    merged = _merged(logs, record.problems)
    record.values.update({name: tuple(sorted(curve.items())) for name, curve in sorted(merged.items())})
    if record == RunRecord(folder):
        raise ValueError(
            f"Nothing of a run was found in {folder}: no metrics.csv, TensorBoard events, checkpoint, plan, check.json or "
            "reference. Give the folder of a run, such as lightning_logs/version_0."
        )
    return record


_BUILT_IN = (OSError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError, EOFError, RuntimeError)
UNREADABLE = (*_BUILT_IN, ImportError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile, csv.Error)
"""What is raised by reading damaged files, and by showing what was read."""


def reason(error: Exception) -> str:
    """Say what an error says, in one line of bounded length."""
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return shorten(_encodable(f"{kind}{error}"), 400, placeholder=" ...")


_Values = dict[str, dict[int, float]]
_Read = Callable[[Path, str, RunRecord, _Values], None]


def _encodable(text: str) -> str:
    """Names of files may hold bytes that are no text."""
    return text.encode("utf-8", "backslashreplace").decode()


def _merged(logs: Mapping[str, _Values], problems: dict[str, str]) -> _Values:
    """Values of all logs but those that contradict the ones before."""
    merged: _Values = defaultdict(dict)
    for log, values in logs.items():
        values.pop("epoch", None)  # which some loggers have beside the values
        other = next((name for name in values if not _agree(merged.get(name, {}), values[name])), None)
        if other is not None:
            problems[log] = (
                f"It is the log of another run than those before it, which have other values of {other}, so it is left "
                "out. Give the folder of one run."
            )
            continue
        for name, curve in values.items():
            merged[name] = curve | merged[name]
    return merged


def _agree(first: Mapping[int, float], second: Mapping[int, float]) -> bool:
    """Whether values at the same steps are the same in float32, as TensorBoard has them."""
    pairs = [(value, second[step]) for step, value in first.items() if step in second]
    close = (math.isclose(*pair, rel_tol=1e-6, abs_tol=1e-37) or all(map(math.isnan, pair)) for pair in pairs)
    return all(close)


def _reader(path: Path) -> _Read | None:
    if path.name.startswith("events.out.tfevents"):
        return _read_events
    by_name: dict[str, _Read] = {"metrics.csv": _read_csv, "check.json": _read_check}
    by_suffix: dict[str, _Read] = {".ckpt": _read_checkpoint, ".yaml": _read_plan, ".safetensors": _read_reference}
    return by_name.get(path.name, by_suffix.get(path.suffix))


def _read_csv(path: Path, name: str, record: RunRecord, values: _Values) -> None:
    wrong, step = [], None
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = int(row["step"])
            if abs(step) >= 2**63:
                raise ValueError(f"There is no step {row['step']}")
            for metric, text in row.items():
                if metric in (None, "step") or not text:
                    continue
                try:
                    values[metric][step] = float(text)
                except ValueError:
                    wrong.append(f"{metric} at step {step} is {text!r}")
    if wrong:
        raise ValueError(f"Not all of it are numbers: {', '.join(wrong)}")
    if step is None:
        raise ValueError(_EMPTY)


def _read_events(path: Path, name: str, record: RunRecord, values: _Values) -> None:
    try:
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    except ImportError as error:
        raise ImportError("TensorBoard's events are read with its package: pip install tensorboard") from error
    if not path.stat().st_size:
        raise ValueError(_EMPTY)
    events = EventAccumulator(str(path), {SCALARS: 0}).Reload()
    for metric in events.Tags()["scalars"]:
        for event in events.Scalars(metric):
            values[metric][event.step] = event.value
    # damage ends its reading without a word; every event has 16 bytes of length and checksums
    read, size = sum(len(event) + 16 for event in RawEventFileLoader(str(path)).Load()), path.stat().st_size
    if read < size:
        raise ValueError(
            f"Only {read:,} of its {size:,} bytes can be read: it is damaged, or its run was killed or goes on"
        )


_EMPTY = "Nothing is logged in it: its run was killed before that, or goes on"


def _read_check(path: Path, name: str, record: RunRecord, values: _Values) -> None:
    record.checks[name] = CheckReport.from_json(path.read_text(encoding="utf-8"))


def _read_checkpoint(path: Path, name: str, record: RunRecord, values: _Values) -> None:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # what torch says is how to read it nevertheless
        raise ValueError(
            "It is no checkpoint, is damaged, or holds objects, such as hyperparameters, whose reading could execute code, "
            "which is not done here. A plan that Plan.save writes beside it is read"
        ) from error
    callbacks = checkpoint.get("callbacks") if isinstance(checkpoint, dict) else None
    if not isinstance(callbacks, dict):
        raise ValueError("It is not a checkpoint of a Trainer: it has no callbacks")
    for key, state in callbacks.items():
        if str(key).startswith(MLUCallback.__name__) and isinstance(state, dict) and "plan" in state:
            plan = Plan.from_yaml(str(state["plan"]), name)
            if plan not in record.plans.values():
                record.plans[name] = plan


def _read_plan(path: Path, name: str, record: RunRecord, values: _Values) -> None:
    text = path.read_text(encoding="utf-8")
    if any(line.startswith("mlu_plan:") for line in text.splitlines()):  # others are hyperparameters and the like
        record.plans[name] = Plan.from_yaml(text, name)


def _read_reference(path: Path, name: str, record: RunRecord, values: _Values) -> None:
    with path.open("rb") as file:
        length = file.read(8)
        if len(length) < 8:
            raise ValueError("It is too short for a safetensors file")
        header = file.read(min(int.from_bytes(length, "little"), 10_000_000))
    if FORMAT.encode() in header:  # others are weights of a model
        record.references[name] = Reference.load(path)
