"""One core for every test: sums over experts are not the same twice on several, and small networks are faster on one."""

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    # before each with its fixtures, because Lightning's strategies set the number of threads, too
    torch.set_num_threads(1)
