"""A small residual network, a batch of its own, and what a probe can read of modules."""

from typing import Any

import torch
from torch import Tensor, nn

from mlu_lightning.discovery.discover import discover
from mlu_lightning.observation import locate

SHAPE = {"depth": 2, "hidden": 7, "embedding": 6, "inputs": 4, "outputs": 2}


def pairs() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 4), torch.randn(5, 2)


def locations_in(module: nn.Module, batch: Any, depths: Any = (0, 1)) -> Any:
    structure = discover(module, batch)
    return locate(structure.taps, [stream.depth for stream in structure.streams], depths)
