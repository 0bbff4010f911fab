"""What the commands share: the terminal, progress bars, and where results go."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from mlu_lightning.checking.configuration import Configured

_RESULTS = 2**20  # bytes that a command writes, figures among them, at most


def require(needed: str, *packages: str) -> None:
    """Refuse to run without packages of the extra ``plots``."""
    if any(find_spec(package) is None for package in packages):
        raise ValueError(f"{needed} not installed: pip install 'mlu-lightning[plots]'.")


def find_modules_here() -> None:
    """Import from the folder in which the command is run, too, as a script in it does."""
    sys.path.insert(0, str(Path.cwd()))


def read_axes(
    config: str, named: Mapping[str, str | None], model: str | None, data: str | None
) -> tuple[Configured, dict[str, list[str]]]:
    """Read a configuration, with the arguments of its model that make up the axes of its shape, as far as they are named."""
    from mlu_lightning.checking.configuration import read_config

    find_modules_here()
    keys = {axis: list_of(names) if names else [] for axis, names in named.items() if names != "auto"}
    return read_config(config, {axis: keys.get(axis, []) for axis in named}, model, data), keys


def list_of(text: str) -> list[str]:
    """Read an option's list, with commas between its items, with brackets around it or without."""
    return [item.strip() for item in text.strip("[] ").split(",")]


def make_console(width: int = 110) -> Console:
    """The standard output, of the terminal's width or that of ``COLUMNS``, and of another where it is neither."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else width)


def say(console: Console, text: str, soft_wrap: bool = False) -> None:
    """Print text as it is, whatever names from files are in it."""
    console.print(text, highlight=False, markup=False, soft_wrap=soft_wrap)


def say_error(text: str) -> None:
    """Print why a command ends without a result."""
    say(Console(stderr=True), f"mlu-lightning: {text}", soft_wrap=True)


@contextmanager
def show_progress(console: Console, what: str) -> Iterator[Callable[..., None]]:
    """Show how many of all tasks are done: in a bar, or, where nobody looks at a terminal, in a line for each tenth.

    Until it is told, and where it is not, the bar only shows that there is work. It is told the number that are done,
    that of all, and, where it changes, what is done.
    """
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=None)

            def move(done: int, total: int, what: str | None = None) -> None:
                bar.update(task, description=what, completed=done, total=total)

            yield move
        return
    tenth = 0

    def note(done: int, total: int, now: str = what) -> None:
        nonlocal tenth
        before, tenth = tenth, 10 * done // max(total, 1)
        if tenth != before:
            say(console, f"{now}: {done} of {total}")

    yield note


def make_folder(path: str) -> Path:
    """Make the folder for results before anything is trained."""
    folder = Path(path)
    with refused(f"The folder {path} cannot be made", "a folder that can be written to"):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def place_file(path: str, what: str) -> Path:
    """Make the folder of a file that is going to be written."""
    if not Path(path).name:
        raise ValueError(f"--out {path!r} names no file. Give it the path of {what}.")
    return make_folder(str(Path(path).parent)) / Path(path).name


def place(path: str) -> Path:
    """Make the folder for results, and see before anything is trained that there is room for them."""
    folder = make_folder(path)
    with writing(path), TemporaryFile(dir=folder) as file:
        file.write(bytes(_RESULTS))
    return folder


def writing(out: str) -> AbstractContextManager[None]:
    """Say what became of results that cannot be written."""
    what = f"Results cannot be written into {out}, and files there are as they were"
    return refused(what, "a folder that can be written to")


@contextmanager
def refused(what: str, instead: str) -> Iterator[None]:
    """Say what cannot be written, why, and what to give in place of the path."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{what}: {error.strerror}. Give --out the path of {instead}.") from error
