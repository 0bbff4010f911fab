"""Studies without new processes, each of which would import everything again."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from recipes.common import studies


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def pool(*args: object) -> ThreadPoolExecutor:
        # OpenMP counts the cores of each thread by itself, and sums on several are not the same twice
        return ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))

    monkeypatch.setattr(studies, "ProcessPoolExecutor", pool)
