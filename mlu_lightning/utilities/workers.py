"""Processes that work for this one, and end with it, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from threading import Thread


@contextmanager
def worker_pool(workers: int, start: Callable[[], None]) -> Iterator[ProcessPoolExecutor]:
    """Start processes, each of which calls ``start`` first; an error in the ``with`` block ends them at once.

    They watch a pipe that nobody writes to: it closes when this process ends, by whatever signal.
    """
    context = multiprocessing.get_context("spawn")
    end, lifeline = context.Pipe(duplex=False)
    with end, lifeline, ProcessPoolExecutor(workers, context, _start, (end, start)) as pool:
        try:
            yield pool
        except BaseException:
            lifeline.close()  # else all would go on to the end of what they do
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start(end: Connection, start: Callable[[], None]) -> None:
    """Let Ctrl-C end a worker quietly, and the end of its parent at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    Thread(target=_end_with, args=(end,), daemon=True).start()
    start()


def _end_with(end: Connection) -> None:
    with suppress(EOFError, OSError):
        end.recv_bytes()
    os._exit(1)
