"""A small language model of which each fault is one line: constants, functions of weights, branches and draws."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization

TOKENS = (torch.arange(24).reshape(3, 8) * 7 % 11,)
BASE, GROWN = (2, 16, 32), (8, 64, 128)  # depth, embedding, hidden: all of them times four
Shape = tuple[int, int, int]


class Signs(nn.Module):
    """Weights of which the signs alone count, divided so that a random sum has size one."""

    def forward(self, weight: Tensor) -> Tensor:
        return (weight.sign() / weight.shape[1] ** 0.5 - weight).detach() + weight


class Kernel(torch.autograd.Function):
    """An operation that autograd does not look into, as kernels of one's own are; it divides by the embedding."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


class Block(nn.Module):
    def __init__(self, embedding: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embedding)
        self.read, self.write = nn.Linear(embedding, hidden), nn.Linear(hidden, embedding)

    def forward(self, stream: Tensor) -> Tensor:
        return self.write(F.gelu(self.read(self.norm(stream))))


class Language(nn.Module):
    """Tokens, pre-norm blocks and a readout, with the fault of a name."""

    def __init__(self, shape: Shape, fault: str = "") -> None:
        super().__init__()
        depth, embedding, hidden = self.shape = shape
        self.fault = fault
        with torch.random.fork_rng():
            torch.manual_seed(depth)
            self.tokens = nn.Embedding(11, embedding)
            self.blocks = nn.ModuleList(Block(embedding, hidden) for _ in range(depth))
            self.norm, self.head = nn.LayerNorm(embedding), nn.Linear(embedding, 11, bias=False)
        if fault.startswith("tied"):
            self.head.weight = self.tokens.weight
        if fault.startswith("bare"):
            for block in self.blocks:
                block.norm = nn.Identity()
        if fault == "signs":
            for block in self.blocks:
                register_parametrization(block.write, "weight", Signs(), unsafe=True)
        self.register_buffer("scale", torch.full((embedding,), embedding**0.5))

    def forward(self, tokens: Tensor) -> Tensor:
        depth, embedding, _ = self.shape
        h = self.tokens(tokens)
        if self.fault.endswith("sqrt(D) on embeddings") or (self.fault.endswith("in training") and self.training):
            h = h * embedding**0.5
        if self.fault == "a buffer on embeddings":
            h = h * self.scale
        for block in (*self.blocks, *self.blocks) if self.fault == "applied twice" else self.blocks:
            if self.fault == "mixing without parameters":
                h = h + torch.roll(F.layer_norm(h, h.shape[-1:]), 1, dims=1)
            branch = block(h)
            if self.fault == "1/L on branches":
                branch = branch / depth
            if self.fault == "1/L in a kernel":
                branch = Kernel.apply(branch, 1 / depth)
            h = branch if self.fault == "not added" else h + branch
        h = self.norm(h)
        if self.fault == "tied, D^-1/2 before the readout":
            h = h * embedding**-0.5
        logits = self.head(h)
        if self.fault == "a buffer on logits":
            logits = logits * self.scale.mean() ** -torch.ones(11)
        return logits * embedding**-0.5 if self.fault == "D^-1/2 on logits" else logits


class Trained(LightningModule):
    """The model in training, as ``check`` builds it; late, its last matrices are drawn again when the fit has begun."""

    def __init__(self, depth: int, hidden: int, embedding: int, fault: str = "") -> None:
        super().__init__()
        self.net, self.fault = Language((depth, embedding, hidden), fault), fault

    def training_step(self, batch: tuple[Tensor, ...]) -> Tensor:
        logits = self.net(batch[0][:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())

    def on_fit_start(self) -> None:
        if self.fault == "drawn late":
            for block in self.net.blocks:
                nn.init.normal_(block.write.weight, std=0.2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-6, weight_decay=0.1)
