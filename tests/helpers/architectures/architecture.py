"""What the registry says about one architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

VOCABULARY = 50
TOKENS = torch.arange(16).reshape(2, 8)
LANGUAGE = {"input_ids": TOKENS, "labels": TOKENS}

Branches = tuple[tuple[str, str, int], ...]
"""Pattern of the name, kind, and hidden width per head, of each branch of a block."""


@dataclass(frozen=True)
class Architecture:
    """One architecture at any shape; parameters are named by patterns."""

    build: Callable[[int, int, int], nn.Module]  # with a number of blocks, of heads of dimension 8, and of coordinates
    example: Any
    roles: dict[str, str]  # with the variant, if it has one; every parameter matches exactly one
    branches: Branches  # of a block; where stages differ, of a block of each
    readout: str  # name of its matrix
    encoder: Branches = ()  # of a block of a second stream, which the first one reads
    active: dict[str, int] = field(default_factory=dict)  # experts over which a mixture averages, 1 for all others
    tokens: tuple[str, ...] = ()  # what acts on tokens, whose number stays, instead of coordinates
    ends: tuple[str, ...] = ()  # norms that end branches, and whose gains and biases hold the branch's multiplier
    axis: int = -1  # of the stream's coordinates
    parallel: bool = False  # whether the branches of a block share an addition
    tied: bool = False  # whether the readout is the embedding
    unfoldable: bool = False  # whether branches end in something that no parameter multiplies
    warns: str = ""  # part of the warning if it is outside of the theory
