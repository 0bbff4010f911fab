"""Processes that work for another one end with it, however it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.processes import environment

from mlu_lightning.utilities.workers import worker_pool


def work(seconds: float = 600) -> int:
    time.sleep(seconds)
    return os.getpid()


def note(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    work()


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(ready: object, seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while not ready() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.02)
    return bool(ready())  # type: ignore[operator]


COMMAND = """
import signal, sys
from test_workers import note
from mlu_lightning.utilities.workers import worker_pool
signal.signal(signal.SIGINT, signal.default_int_handler)  # which who runs these tests may ignore
with worker_pool(2) as pool:
    [future.result() for future in [pool.submit(note, sys.argv[1]) for _ in range(4)]]
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(number: signal.Signals, tmp_path: Path) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), environment()["PYTHONPATH"]])
    command = [sys.executable, "-c", COMMAND, str(tmp_path)]
    parent = subprocess.Popen(command, env=environment(PYTHONPATH=paths), stderr=subprocess.DEVNULL)
    assert until(lambda: len([*tmp_path.iterdir()]) == 2)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    assert all(map(is_alive, workers))
    parent.send_signal(number)
    assert parent.wait(60) != 0
    assert until(lambda: not any(map(is_alive, workers)), 20)


def test_an_error_does_not_wait_for_what_runs() -> None:
    begun = time.monotonic()
    with pytest.raises(ZeroDivisionError), worker_pool(2) as pool:
        future = pool.submit(work)
        pool.submit(work, 0).result()
        raise ZeroDivisionError
    assert time.monotonic() - begun < 60 and future.exception() is not None
    with worker_pool(1) as pool:
        assert pool.submit(work, 0).result() != os.getpid()
