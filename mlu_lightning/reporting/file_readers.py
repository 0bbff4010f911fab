"""Read logs and checkpoints in a process of its own, which runs this file alone and can be stopped at any time.

A file that was made to, or is damaged, can keep a reader busy forever, take all memory or raise anything; then it costs its
process. That is started with this file as its script: it imports next to nothing of the package, to be there at once.
"""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import struct
import sys
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

from mlu_lightning.utilities.stand_in import StandIn


class Content(TypedDict, total=False):
    """What is in a file: values by metric and step, plans as YAML, and what is wrong with it."""

    values: dict[str, dict[int, float]]
    plans: list[str]
    problem: str


READABLE = (OSError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError, EOFError, RuntimeError)
"""What is raised by reading most damaged files; the rest ends the process."""

_MOST_NAMES = 10_000
_MOST_VALUES = 5_000_000
_LARGEST_PICKLE = 64 * 2**20
_OLD_MAGIC = 0x1950A86A20F9469CFC6C
_MEMORY = 2 * 2**30
_EMPTY = "Nothing is logged in it: its run was killed before that, or goes on"


def is_log_or_checkpoint(path: Path) -> bool:
    """Tell whether a file is one of those that are read here, by its name."""
    return path.name == "metrics.csv" or path.name.startswith("events.out.tfevents") or path.suffix == ".ckpt"


def _read(path: Path) -> Content:
    if path.suffix == ".ckpt":
        return _read_checkpoint(path)
    return _read_csv(path) if path.name == "metrics.csv" else _read_events(path)


def _read_csv(path: Path) -> Content:
    values: dict[str, dict[int, float]] = defaultdict(dict)
    wrong: list[str] = []
    step, count = None, 0
    with path.open("rb") as raw:
        raw.seek(-min(path.stat().st_size, 1), os.SEEK_END)
        cut = raw.read() != b"\n"
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file)) if path.stat().st_size < 2**28 else _too_large()
    for row in rows[:-1] if cut else rows:
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
            count = _counted(values, count + 1)
    found: Content = {"values": values}
    if wrong:
        found["problem"] = f"Not all of it are numbers: {', '.join(wrong)}"
    elif cut and rows:
        found["problem"] = "Its last line has no end, so it may be cut inside of a number, and was left out"
    elif step is None:
        found["problem"] = _EMPTY
    return found


def _read_events(path: Path) -> Content:
    try:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    except ImportError as error:
        raise ValueError("TensorBoard's events are read with its package: pip install tensorboard") from error
    if not path.stat().st_size:
        return {"problem": _EMPTY}
    try:
        events = EventAccumulator(str(path), {SCALARS: 0}).Reload()
    except DecodeError as error:
        raise ValueError("Its events are damaged, or none of TensorBoard's") from error
    values: dict[str, dict[int, float]] = {}
    count = 0
    for metric in events.Tags()["scalars"]:
        values[metric] = {event.step: event.value for event in events.Scalars(metric)}
        count = _counted(values, count + len(values[metric]))
    # damage ends its reading without a word; every event has 16 bytes of length and checksums
    read, size = sum(len(event) + 16 for event in RawEventFileLoader(str(path)).Load()), path.stat().st_size
    if read == size:
        return {"values": values}
    problem = f"Only {read:,} of its {size:,} bytes can be read: it is damaged, or its run was killed or goes on"
    return {"values": values, "problem": problem}


def _read_checkpoint(path: Path) -> Content:
    """The plans alone: tensors and objects, such as hyperparameters, are not made, so that nothing in it can be executed."""
    try:
        with path.open("rb") as file:
            checkpoint = _unzipped(file) if zipfile.is_zipfile(file) else _old_checkpoint(file)
    except (pickle.UnpicklingError, zipfile.BadZipFile, struct.error) as error:
        raise ValueError("It is no checkpoint, or is damaged") from error
    callbacks = checkpoint.get("callbacks") if isinstance(checkpoint, dict) else None
    if not isinstance(callbacks, dict):
        raise ValueError("It is not a checkpoint of a Trainer: it has no callbacks")
    named = ((key, state) for key, state in callbacks.items() if isinstance(key, str) and isinstance(state, dict))
    plans = [state["plan"] for key, state in named if key.startswith("MLUCallback") and "plan" in state]
    if not all(isinstance(plan, str) for plan in plans):
        raise ValueError("Its plan is no text, so it was not written by MLUCallback")
    return {"plans": plans}


def _unzipped(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        entry = next((info for info in archive.infolist() if info.filename.endswith("/data.pkl")), None)
        if entry is None:
            raise ValueError("It is no checkpoint: it has no data.pkl")
        if entry.file_size > _LARGEST_PICKLE:
            raise ValueError(f"It has more than {_LARGEST_PICKLE >> 20} MiB beside its tensors")
        return _Unpickler(io.BytesIO(archive.read(entry))).load()


def _old_checkpoint(file: BinaryIO) -> Any:
    """As torch wrote it before 1.6: a number, a version and a system come first, each a pickle."""
    file.seek(0)
    number, _, _, checkpoint = (_Unpickler(file).load() for _ in range(4))
    if number != _OLD_MAGIC:
        raise pickle.UnpicklingError
    return checkpoint


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return StandIn

    def persistent_load(self, pid: Any) -> Any:
        return None


def _counted(values: dict[str, Any], count: int) -> int:
    """Refuse more values than a page can be made of."""
    if count > _MOST_VALUES or len(values) > _MOST_NAMES:
        raise ValueError(f"It has more than {_MOST_VALUES:,} values, or {_MOST_NAMES:,} names")
    return count


def _too_large() -> Any:
    raise ValueError("It has more than 256 MiB")


def _limit_memory(path: Path) -> None:
    """Let the process take no more than a file's size on the disk and 2 GiB beyond what it has."""
    if sys.platform == "linux":
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[5])
        on_disk = path.stat().st_blocks * 512
        limit = pages * resource.getpagesize() + on_disk + _MEMORY
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def _serve() -> None:
    """Read the files that are named by lines of the input, and write a line for each."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what libraries print is no answer
        for line in sys.stdin:
            path = Path(json.loads(line))
            _limit_memory(path)
            try:
                content = _read(path)
            except (*READABLE, struct.error, pickle.UnpicklingError, zipfile.BadZipFile, csv.Error) as error:
                kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
                content = {"problem": f"{kind}{error}"}
            answers.write(json.dumps(content) + "\n")
            answers.flush()


if __name__ == "__main__":
    del sys.path[0]  # this folder, whose names are those of a package
    _serve()
