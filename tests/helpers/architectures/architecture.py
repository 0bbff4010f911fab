"""What the registry says about one architecture."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

VOCABULARY = 50
TOKENS = torch.arange(16).reshape(2, 8)
LANGUAGE = {"input_ids": TOKENS, "labels": TOKENS}

Build = Callable[[int, int, int], nn.Module]
Branches = tuple[tuple[str, str, int], ...]
"""Pattern of the name, kind, and hidden width per head, of each branch of a block."""


@dataclass(frozen=True)
class Architecture:
    """One architecture at any shape; parameters are named by patterns."""

    build: Build  # with a number of blocks, of heads of dimension 8, and of coordinates
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


def roles(text: str) -> dict[str, str]:
    """Roles by pattern, from lines ``role: pattern ...``; ``weight|bias`` is a layer, whose bias has ``role_bias``."""
    found = {}
    for line in text.strip().splitlines():
        role, _, patterns = line.strip().partition(": ")
        for pattern in patterns.split():
            name, both, _ = pattern.partition("|bias")
            found |= {name: role} | ({name.removesuffix("weight") + "bias": f"{role}_bias"} if both else {})
    return found


def hugging_face(model: type, config: type, units: int, heads_of: int = 8, **numbers: Any) -> Build:
    """A model of transformers with so many MLP units per head; numbers that depend on heads are functions of them."""

    def build(depth: int, heads: int, embedding: int) -> nn.Module:
        assert "head_dim" in numbers or embedding == heads_of * heads, f"{config.__name__} has no head_dim of its own"
        given = {name: value(heads) if callable(value) else value for name, value in numbers.items()}
        sizes = {"num_hidden_layers": depth, "num_attention_heads": heads, "hidden_size": embedding}
        return model(config(**sizes, intermediate_size=units * heads, **given))

    return build
