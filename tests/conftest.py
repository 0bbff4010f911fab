"""One core for every test: sums over experts are not the same twice on several, and small networks are faster on one."""

import torch


def pytest_configure() -> None:
    torch.set_num_threads(1)
