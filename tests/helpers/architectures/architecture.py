"""What the registry says about one architecture."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

VOCABULARY = 50
TOKENS = torch.arange(16).reshape(2, 8)
LANGUAGE = {"input_ids": TOKENS, "labels": TOKENS}

Build = Callable[[int, int, int], nn.Module]
Branches = tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class Architecture:  # one architecture at any shape; parameters are named by patterns
    build: Build  # with a number of blocks, of heads of dimension 8, and of coordinates
    example: Any
    readout: str  # name of its matrix
    roles: dict[str, str] = field(default_factory=dict)  # with the variant; every parameter matches exactly one
    branches: Branches = ()  # of a block, or of one of each stage: pattern of the name, kind, hidden width per head
    encoder: Branches = ()  # of a block of a second stream, which the first one reads
    active: dict[str, int] = field(default_factory=dict)  # experts over which a mixture averages, 1 for all others
    tokens: tuple[str, ...] = ()  # what acts on tokens, whose number stays, instead of coordinates
    ends: tuple[str, ...] = ()  # norms that end branches, and whose gains and biases hold the branch's multiplier
    axis: int = -1  # of the stream's coordinates
    parallel: bool = False  # whether the branches of a block share an addition
    tied: bool = False  # whether the readout is the embedding
    unfoldable: bool = False  # whether branches end in something that no parameter multiplies
    again: str = ""  # pattern of what all blocks read
    powers: tuple[float, float] = (0.0, 0.0)  # of D, by which the model itself multiplies embeddings and logits
    warns: str = ""  # part of the warning if it is outside of the theory

    def reads(self, text: str) -> "Architecture":
        """With lines ``role: pattern ...`` and ``branches: pattern kind width`` besides what it has.

        The pattern of a layer ends in ``weight|bias``: its weight has the role, and its bias ``role_bias``.
        """
        roles, branches = {**self.roles}, {"branches": self.branches, "encoder": self.encoder}
        for line in text.strip().splitlines():
            key, _, patterns = line.strip().partition(": ")
            if key in branches:
                name, kind, width = patterns.split()
                branches[key] += ((name, kind, int(width)),)
                continue
            for pattern in patterns.split():
                name, both, _ = pattern.partition("|bias")
                roles |= {name: key} | ({name.removesuffix("weight") + "bias": f"{key}_bias"} if both else {})
        return replace(self, roles=roles, **branches)


def hugging_face(model: type, config: type, units: int, heads_of: int = 8, **numbers: Any) -> Build:
    """A model of transformers with so many MLP units per head; numbers that depend on heads are functions of them."""

    def build(depth: int, heads: int, embedding: int) -> nn.Module:
        assert "head_dim" in numbers or embedding == heads_of * heads, f"{config.__name__} has no head_dim of its own"
        given = {name: value(heads) if callable(value) else value for name, value in numbers.items()}
        sizes = {"num_hidden_layers": depth, "num_attention_heads": heads, "hidden_size": embedding}
        return model(config(**sizes, intermediate_size=units * heads, **given))

    return build
