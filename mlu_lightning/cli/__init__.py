"""The command line: ``mlu-lightning quickstart | check | tune | plan | report | shape``.

Each command is a function of its own file, whose arguments and docstring are its options and their help; ``parser`` lists
them. What a command works with is imported when it runs, so that help is printed at once.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType

__all__ = ["main"]

_INTERRUPTED = 130  # as shells report a command that Ctrl-C ended


def main(args: list[str] | None = None) -> None:
    """Run a command of ``mlu-lightning``, with the arguments of the process if none are given."""
    with _interruptible():
        from mlu_lightning.cli.parser import run

        run(list(sys.argv[1:] if args is None else args))


@contextmanager
def _interruptible() -> Iterator[None]:
    """Exit with 130 after Ctrl-C, whatever became of it: a Trainer makes an exit with 1 of it, a pool a broken one."""
    interrupts: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    # ignored interrupts, as under nohup, stay ignored, and only the main thread has any
    own = signal.getsignal(signal.SIGINT) is signal.default_int_handler and current_thread() is main_thread()
    if own:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except BaseException as error:
        if interrupts or isinstance(error, KeyboardInterrupt):
            sys.exit(_INTERRUPTED)
        raise
    else:
        if interrupts:  # which a Trainer may take for the end of a training
            sys.exit(_INTERRUPTED)
    finally:
        if own:
            signal.signal(signal.SIGINT, signal.default_int_handler)
