"""A residual network that has every role of a perceptron's parameters."""

import re

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mlu_lightning import Role

INPUTS, OUTPUTS = 3, 2
_LAYERS = {
    "embed": (Role.EMBEDDING, Role.EMBEDDING),
    "branches.norm": (Role.BRANCH_NORM, Role.BRANCH_NORM),
    "branches.read": (Role.BRANCH_IN, Role.BRANCH_IN_BIAS),
    "branches.write": (Role.BRANCH_OUT, Role.BRANCH_OUT_BIAS),
    "norm": (Role.STREAM_NORM, Role.STREAM_NORM),
    "readout": (Role.READOUT, Role.READOUT_BIAS),
}  # of their weights and biases


def role_of(name: str) -> Role:
    layer, _, part = re.sub(r"\.\d+\.", ".", name).rpartition(".")
    return _LAYERS[layer][part == "bias"]


class Branch(nn.Module):  # norm and perceptron
    def __init__(self, hidden: int, embedding: int, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embedding)
        self.read, self.write = linear(embedding, hidden), linear(hidden, embedding)

    def forward(self, stream: Tensor) -> Tensor:
        return self.write(torch.tanh(self.read(self.norm(stream))))


class Perceptron(LightningModule):  # the same weights at every call, with norms and biases
    def __init__(self, depth: int, hidden: int, embedding: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(INPUTS, embedding)
        self.branches = nn.ModuleList(Branch(hidden, embedding) for _ in range(depth))
        self.norm = nn.LayerNorm(embedding)
        self.readout = nn.Linear(embedding, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embed(x)
        for branch in self.branches:
            stream = stream + branch(stream)
        return self.readout(self.norm(stream))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])
