"""The command line: ``mlu-lightning quickstart | check | tune | plan | report | shape``.

Each command is a function of its own file, whose arguments and docstring are its options and their help; ``parser`` lists
them. What a command works with is imported when it runs, so that help is printed at once.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from threading import current_thread, main_thread
from types import FrameType

__all__ = ["main"]

_INTERRUPTED = 130  # as shells report a command that Ctrl-C ended


def main(args: list[str] | None = None) -> None:
    """Run a command of ``mlu-lightning``, with the arguments of the process if none are given.

    Ctrl-C ends it with 130, whatever becomes of the interrupt: a Trainer makes an exit with 1 of it, a pool a broken one,
    what tidies up prints it and goes on, and where Python takes itself apart, it is killed by it.
    """
    interrupts: list[int] = []
    running, code = True, 1

    def interrupt(number: int, frame: FrameType | None) -> None:
        if interrupts and not running:
            os._exit(_INTERRUPTED)
        interrupts.append(number)
        if running:
            raise KeyboardInterrupt

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_INTERRUPTED if interrupts else code)

    # ignored interrupts, as under nohup, stay ignored, and only the main thread has any
    own = signal.getsignal(signal.SIGINT) is signal.default_int_handler and current_thread() is main_thread()
    try:
        if own:
            signal.signal(signal.SIGINT, interrupt)
        if own and args is None:
            atexit.register(leave)  # the first that is registered is the last that is called
        from mlu_lightning.cli.parser import run

        run(list(sys.argv[1:] if args is None else args))
        code = 0
    except BaseException as error:
        running = False  # before all else, so that no other interrupt gets between
        if interrupts or isinstance(error, KeyboardInterrupt):
            code = _INTERRUPTED
            sys.exit(code)
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    finally:
        running = False
        if own and args is not None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupts:  # which a Trainer may take for the end of a training
        sys.exit(_INTERRUPTED)
