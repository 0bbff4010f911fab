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
    """One architecture at any shape.

    Args:
        build: module with a number of blocks, heads of dimension 8 and an embedding dimension.
        example: input of its rehearsal.
        roles: role, with its variant if it has one, by pattern of parameter names; every parameter matches exactly one.
        branches: of a block; where stages differ, of a block of each.
        readout: name of the readout's matrix.
        encoder: branches of a block of a second stream, which the first one reads; empty if there is none.
        active: number of experts over which a mixture averages, by pattern of parameter names; 1 for all others.
        tokens: patterns of names of matrices and biases that act on tokens, whose number stays, instead of coordinates.
        ends: patterns of names of norms that end branches, and whose gains and biases hold the branch's multiplier.
        axis: of the stream's coordinates.
        parallel: whether the branches of a block share an addition.
        tied: whether the readout is the embedding.
        unfoldable: whether branches end in something that no parameter multiplies.
        warns: part of the warning if it is outside of the theory, empty if it is not.
    """

    build: Callable[[int, int, int], nn.Module]
    example: Any
    roles: dict[str, str]
    branches: Branches
    readout: str
    encoder: Branches = ()
    active: dict[str, int] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    axis: int = -1
    parallel: bool = False
    tied: bool = False
    unfoldable: bool = False
    warns: str = ""
