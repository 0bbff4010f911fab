"""Collect what a run has left in its folder: plans, checks, logged values and references."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten

from mlu_lightning.checking.report import CheckReport
from mlu_lightning.observation import Reference
from mlu_lightning.observation.reference_format import FORMAT
from mlu_lightning.planning import Plan
from mlu_lightning.reporting.file_readers import READABLE, is_log_or_checkpoint
from mlu_lightning.reporting.reading_process import contents
from mlu_lightning.utilities.plain_text import printable

Curve = tuple[tuple[int, float], ...]  # logged values with their steps, ascending


@dataclass(frozen=True)
class RunRecord:
    """What was found in the folder of a run, by the path of the file; curves by the name of what was logged."""

    folder: Path
    plans: dict[str, Plan] = field(default_factory=dict)  # of files with one plan, the first is named
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
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}. Give that of a run, such as lightning_logs/version_0.")
    record = RunRecord(folder)
    logs: dict[str, _Values] = {}
    names = _names(folder, record.problems)
    for path, name in names.items():
        read = _reader(path)
        try:
            if read is not None:
                read(path, name, record)
        except UNREADABLE as error:
            record.problems[name] = reason(error)
    for path, content in contents([path for path in names if is_log_or_checkpoint(path)]):
        name = names[path]
        if "problem" in content:
            record.problems[name] = _shown(content["problem"])
        # a resumed run goes on in another file of TensorBoard's, and may repeat steps
        log = name if path.suffix == ".csv" else str(Path(name).parent)
        for metric, curve in content.get("values", {}).items():
            logs.setdefault(log, defaultdict(dict))[metric].update(curve)
        for text in content.get("plans", ()):
            try:
                _add_plan(text, name, record)
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


UNREADABLE = (*READABLE, MemoryError)  # what is raised by reading damaged files, and by showing what was read

_LARGEST_TEXT = 16 * 2**20


def reason(error: Exception) -> str:
    """Say what an error says, in one line of bounded length."""
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return _shown(f"{kind}{error}")


_Values = dict[str, dict[int, float]]
_Read = Callable[[Path, str, RunRecord], None]


def _shown(text: str) -> str:
    return shorten(printable(text), 400, placeholder=" ...")


def _names(folder: Path, problems: dict[str, str]) -> dict[Path, str]:
    """Names of all files in the folder; links out of it are not followed."""
    names, root = {}, folder.resolve()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = printable(str(path.relative_to(folder)))
        if path.resolve().is_relative_to(root):
            names[path] = name
        elif _reader(path) is not None or is_log_or_checkpoint(path):
            problems[name] = "It is a link out of the folder, and is not followed"
    return names


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
    by_suffix: dict[str, _Read] = {".yaml": _read_plan, ".safetensors": _read_reference}
    return _read_check if path.name == "check.json" else by_suffix.get(path.suffix)


def _read_check(path: Path, name: str, record: RunRecord) -> None:
    record.checks[name] = CheckReport.from_json(_text(path))


def _read_plan(path: Path, name: str, record: RunRecord) -> None:
    text = _text(path)
    if any(line.startswith("mlu_plan:") for line in text.splitlines()):  # others are hyperparameters and the like
        _add_plan(text, name, record)


def _add_plan(text: str, name: str, record: RunRecord) -> None:
    plan = Plan.from_yaml(text, name)
    if plan not in record.plans.values():
        record.plans[name] = plan


def _text(path: Path) -> str:
    if path.stat().st_size > _LARGEST_TEXT:
        raise ValueError(f"It has more than {_LARGEST_TEXT >> 20} MiB, which no plan or check has")
    return path.read_text(encoding="utf-8")


def _read_reference(path: Path, name: str, record: RunRecord) -> None:
    with path.open("rb") as file:
        length = file.read(8)
        if len(length) < 8:
            raise ValueError("It is too short for a safetensors file")
        header = file.read(min(int.from_bytes(length, "little"), 10_000_000))
    if FORMAT.encode() in header:  # others are weights of a model
        record.references[name] = Reference.load(path)
