"""One core, where sums are the same twice, and the same random numbers for every test, and an environment of its own.

Lightning's strategies leave rank and port of their process in it, and processes that a test starts would wait for others.
"""

import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from helpers.bare import Bare


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    # before each with its fixtures, because Lightning's strategies set the number of threads, too
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        yield


@pytest.fixture(scope="session")
def bare() -> Iterator[Bare]:
    made = Bare()
    yield made
    made.close()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()
