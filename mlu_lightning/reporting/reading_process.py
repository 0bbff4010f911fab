"""A process that reads files within limits of time and memory, restarted when a file has ended it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from threading import Timer
from typing import IO, Any

from mlu_lightning.reporting import file_readers
from mlu_lightning.reporting.file_readers import Content

_SECONDS = 60.0
_BYTES_IN_A_SECOND = 20e6


def contents(paths: Sequence[Path]) -> Iterator[tuple[Path, Content]]:
    """Read files one after the other; what one of them does to its reader costs that file alone."""
    process: _Reader | None = None
    try:
        for path in paths:
            process = process or _Reader()
            content = process.read(path)
            if content is None:
                content, process = {"problem": process.last_words()}, None
            yield path, content
    finally:
        if process is not None:
            process.close()


class _Reader:
    def __init__(self) -> None:
        self.errors: IO[bytes] = TemporaryFile()  # noqa: SIM115  # as long as the process
        package = Path(file_readers.__file__).parents[2]
        self.process = subprocess.Popen(
            [sys.executable, file_readers.__file__],
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )
        self.too_slow = False

    def read(self, path: Path) -> Content | None:
        """What is in a file, or None if the process has ended over it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        timer = Timer(_SECONDS + path.stat().st_size / _BYTES_IN_A_SECOND, self._stop)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(str(path)).encode() + b"\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        finally:
            timer.cancel()
        if not answer.endswith(b"\n"):
            self.close()
            return None
        content: Content = json.loads(answer, object_hook=_with_steps)
        return content

    def last_words(self) -> str:
        if self.too_slow:
            return "Reading it takes too long, so it was left out"
        self.errors.seek(0)
        lines = self.errors.read().decode("utf-8", "backslashreplace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "Its reading has ended without a word")

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.process.communicate()

    def _stop(self) -> None:
        self.too_slow = True
        self.process.kill()


def _with_steps(found: dict[str, Any]) -> dict[Any, Any]:
    """JSON has texts for keys; those of a curve are steps, and no metric has a step for a name."""
    return {int(key) if isinstance(value, float) else key: value for key, value in found.items()}
