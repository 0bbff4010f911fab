"""Worker processes that end with the process that started them, however it ends."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from threading import Thread


@contextmanager
def worker_pool(workers: int, threads: int | None = None) -> Iterator[ProcessPoolExecutor]:
    """Start processes, silent ones with so many threads if they train; an error in the ``with`` block ends them at once.

    They watch a pipe that nobody writes to: it closes when this process ends, by whatever signal.
    """
    context = multiprocessing.get_context("spawn")
    end, lifeline = context.Pipe(duplex=False)
    with end, lifeline, ProcessPoolExecutor(workers, context, _start, (end, threads)) as pool:
        try:
            yield pool
        except BaseException:
            lifeline.close()  # else all would go on to the end of what they do
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start(end: Connection, threads: int | None) -> None:
    """Let Ctrl-C end a worker quietly, and the end of its parent at once; hide what Lightning says about devices."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    Thread(target=_end_with, args=(end,), daemon=True).start()
    if threads is not None:
        import torch  # slow

        torch.set_num_threads(threads)
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.simplefilter("ignore")


def _end_with(end: Connection) -> None:
    with suppress(EOFError, OSError):
        end.recv_bytes()
    os._exit(1)
