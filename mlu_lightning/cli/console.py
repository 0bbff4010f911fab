"""What the commands share: the terminal, progress, and the places of results."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["make_console", "make_folder", "place", "require", "say", "say_error", "show_progress", "writing"]

_RESULTS = 2**20  # bytes that a command writes, figures among them, at most


def require(needed: str, *packages: str) -> None:
    """Refuse to run without packages of the extra ``plots``."""
    if any(find_spec(package) is None for package in packages):
        raise ValueError(f"{needed} not installed: pip install 'mlu-lightning[plots]'.")


def make_console(width: int = 110) -> Console:
    """The standard output, of a width of its own where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else width)


def say(console: Console, text: str, soft_wrap: bool = False) -> None:
    """Print text as it is, whatever names from files are in it."""
    console.print(text, highlight=False, markup=False, soft_wrap=soft_wrap)


def say_error(text: str) -> None:
    """Print why a command ends without a result."""
    say(Console(stderr=True), f"mlu-lightning: {text}", soft_wrap=True)


def show_progress(console: Console) -> Progress:
    """A bar that says how many of its tasks are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def make_folder(path: str) -> Path:
    """Make the folder for results before anything is trained."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        wrong = f"The folder {path} cannot be made: {error.strerror}"
        raise ValueError(f"{wrong}. Give --out the path of a folder that can be written to.") from error
    return folder


def place(path: str) -> Path:
    """Make the folder for results, and see before anything is trained that there is room for them."""
    folder = make_folder(path)
    with writing(path), TemporaryFile(dir=folder) as file:
        file.write(bytes(_RESULTS))
    return folder


@contextmanager
def writing(out: str) -> Iterator[None]:
    """Say what became of results that cannot be written."""
    try:
        yield
    except OSError as error:
        wrong = f"Results cannot be written into {out}, and files there are as they were: {error.strerror}"
        raise ValueError(f"{wrong}. Give --out the path of a folder that can be written to.") from error
