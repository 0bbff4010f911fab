"""One core and the same random numbers for every test, and an environment that it does not hand on.

Sums over experts are not the same twice on several cores, and small networks are faster on one. Lightning's strategies leave
the rank and the port of their process in the environment, and a test that starts processes would wait for others of that
run.
"""

import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    # before each with its fixtures, because Lightning's strategies set the number of threads, too
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """The environment as it was, after every test; strategies ask it for the number of threads."""
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        yield


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """A compiler that has seen nothing yet."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
