"""Studies without new processes, each of which would import everything again."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def pool(*args: object) -> ThreadPoolExecutor:
        # OpenMP counts the cores of each thread by itself, and sums on several are not the same twice
        return ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))

    monkeypatch.setattr("mlu_lightning.utilities.workers.ProcessPoolExecutor", pool)
