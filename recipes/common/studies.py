"""What studies share: their command line, the processes in which they train, and the files that keep their results."""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, as_completed, wait
from dataclasses import asdict, astuple, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.progress import Progress, track

from mlu_lightning.utilities.workers import worker_pool

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
"""Arguments of a Trainer that reports nothing."""

CaseT = TypeVar("CaseT")
ResultT = TypeVar("ResultT")


def study_command(function: Callable[..., None], program: str) -> Callable[[Sequence[str] | None], None]:
    """Make a command of a study: its options are the study's arguments, of which ``quick`` is one."""

    def main(args: Sequence[str] | None = None) -> None:
        parser = ArgumentParser(prog=program)
        parser.add_function_arguments(function, skip={"quick"})
        parser.add_argument("--quick", action="store_true", help="try the machinery only: tiny networks, few steps")
        function(**parser.parse_args(None if args is None else list(args)).as_dict())

    return main


def study_commands(
    *functions: Callable[..., None], program: str, default: Callable[[list[str]], Any] | None = None
) -> Callable[[Sequence[str] | None], None]:
    """Make a command whose first argument names a study; without one, ``default`` is called with the arguments."""
    studies = {function.__name__: function for function in functions}

    def main(args: Sequence[str] | None = None) -> None:
        arguments = list(sys.argv[1:] if args is None else args)
        if arguments[:1] and arguments[0] in studies:
            study_command(studies[arguments[0]], f"{program} {arguments[0]}")(arguments[1:])
        elif default is None:
            sys.exit(f"Give one of: {', '.join(studies)}.")
        else:
            default(arguments)

    return main


def check_command(workers: int, seeds: int) -> None:
    """End the command if it cannot be run, before anything is trained."""
    if find_spec("matplotlib") is None:
        sys.exit("The study draws a figure, and matplotlib is not installed: pip install 'mlu-lightning[plots]'.")
    for name, number in (("workers", workers), ("seeds", seeds)):
        if number < 1:
            sys.exit(f"--{name} is {number}, and at least one is needed.")


def console(width: int = 110) -> Console:
    """Make a console as wide as the terminal, or of a fixed width where the output goes elsewhere."""
    return Console(width=None if sys.stdout.isatty() else width)


def deadline(minutes: float | None) -> float:
    """Time, on the monotonic clock, that is so many minutes from now."""
    return math.inf if minutes is None else time.monotonic() + 60 * minutes


def in_processes(
    function: Callable[[CaseT], ResultT], cases: Sequence[CaseT], workers: int, title: str, terminal: Console
) -> list[ResultT]:
    """Apply a function to cases, cheapest first in the argument, most expensive first in time; results are in order."""
    with worker_pool(workers, threads=1) as pool:
        pending = [pool.submit(function, case) for case in reversed(cases)]
        for future in track(as_completed(pending), title, len(pending), console=terminal):
            future.result()
    return [future.result() for future in reversed(pending)]


def save_points(points: Sequence[Any], path: Path) -> None:
    """Write instances of one dataclass as a table of comma-separated values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([field.name for field in fields(points[0])])
        table.writerows(astuple(point) for point in points)


def save_json(results: Sequence[Any], path: Path) -> None:
    """Write instances of dataclasses as a list in JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(result) for result in results], indent=1), encoding="utf-8")


@dataclass(frozen=True)
class ResultFile(Generic[ResultT]):
    """File to which a study adds its results one by one, each a line of JSON after that of the study's settings."""

    path: Path
    settings: Mapping[str, Any]
    decode: Callable[[dict[str, Any]], ResultT]
    encode: Callable[[Any], dict[str, Any]] = asdict

    def read(self) -> list[ResultT]:
        """Read the results, without a last line that was cut off, and end the command if they are another study's."""
        settings = json.loads(json.dumps(self.settings))
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1] or json.dumps(settings) + "\n"
        if whole != text:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(whole, encoding="utf-8")
        found, *results = (json.loads(line) for line in whole.splitlines())
        other = sorted(name for name in settings.keys() | found.keys() if settings.get(name) != found.get(name))
        if other:
            sys.exit(
                f"{self.path} has runs of a study with other settings ({', '.join(other)}), which cannot be put together "
                "with these. Give --output another folder, or remove that one."
            )
        return [self.decode(result) for result in results]

    def append(self, result: ResultT) -> None:
        """Add a result to a file that has been read."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.encode(result)) + "\n")

    def extend(
        self,
        results: list[ResultT],
        missing: Callable[[], Sequence[CaseT]],
        case: Callable[[CaseT], tuple[Any, ...]],
        function: Callable[..., ResultT],
        workers: int,
        end: float,
        terminal: Console,
    ) -> None:
        """Make the first of what is missing, given a function's arguments for it, until nothing is or the time is over."""
        running: dict[Future[ResultT], CaseT] = {}
        with worker_pool(workers, threads=1) as pool, Progress(console=terminal) as progress:
            bar = progress.add_task(f"runs in {self.path.parent}")
            while True:
                waiting = [one for one in missing() if one not in running.values()]
                progress.update(bar, completed=len(results), total=len(results) + len(waiting) + len(running))
                if waiting and len(running) < workers and time.monotonic() < end:
                    running[pool.submit(function, *case(waiting[0]))] = waiting[0]
                    continue
                if not running:
                    return
                done = wait(running, return_when=FIRST_COMPLETED).done
                for future in sorted(done, key=lambda future: future.exception() is not None):  # errors lose no result
                    del running[future]
                    results.append(future.result())
                    self.append(results[-1])
