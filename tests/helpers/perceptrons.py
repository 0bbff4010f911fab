"""A residual network that has every role of a perceptron's parameters."""

import re

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mlu_lightning import Role

INPUTS, OUTPUTS = 3, 2
ROLES = {
    "embed.weight": Role.EMBEDDING,
    "embed.bias": Role.EMBEDDING,
    "branches.norm.weight": Role.BRANCH_NORM,
    "branches.norm.bias": Role.BRANCH_NORM,
    "branches.read.weight": Role.BRANCH_IN,
    "branches.read.bias": Role.BRANCH_IN_BIAS,
    "branches.write.weight": Role.BRANCH_OUT,
    "branches.write.bias": Role.BRANCH_OUT_BIAS,
    "norm.weight": Role.STREAM_NORM,
    "norm.bias": Role.STREAM_NORM,
    "readout.weight": Role.READOUT,
    "readout.bias": Role.READOUT_BIAS,
}


def role_of(name: str) -> Role:
    return ROLES[re.sub(r"\.\d+\.", ".", name)]


class Branch(nn.Module):
    """Norm and perceptron."""

    def __init__(self, hidden: int, embedding: int, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embedding)
        self.read, self.write = linear(embedding, hidden), linear(hidden, embedding)

    def forward(self, stream: Tensor) -> Tensor:
        return self.write(torch.tanh(self.read(self.norm(stream))))


class Perceptron(LightningModule):
    """The same weights at every call, with norms and biases."""

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
