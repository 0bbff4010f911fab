"""How far training one part of a module alone moves what the module makes."""

from typing import Any

import torch

from mlu_lightning import Plan, attach_multipliers, initialize, scale_optimizer

INPUTS = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
TARGETS = INPUTS[:, :1] * INPUTS[:, 1:2]


def distance_moved(module: Any, plan: Plan, trained: Any, optimizer: Any, read: Any, samples: int = 64) -> float:
    """Root mean square by which five steps change what ``read`` makes of the inputs."""
    initialize(module, plan)
    attach_multipliers(module, plan)
    stepping = optimizer(trained)
    scale_optimizer(stepping, module, plan)
    inputs, targets = INPUTS[:samples], TARGETS[:samples]
    before = read(inputs).detach()
    for _ in range(5):
        stepping.zero_grad()
        (module(inputs) - targets).square().mean().backward()
        stepping.step()
    return (read(inputs) - before).square().mean().sqrt().item()
