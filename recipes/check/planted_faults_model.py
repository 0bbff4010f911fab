"""A Transformer in which every role of the table occurs, for faults to be planted in."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

Norms = Literal["before", "both", "after"]
"""Where branches have norms: before them; at both ends; or on the stream after each addition (post-norm)."""
CLASSES = 32  # of tokens, which the second head tells apart


class Everything(LightningModule):
    """A Transformer with gains on queries and keys, three-layer perceptrons with biases, a router, and two heads.

    One head is a matrix on the stream with a norm, and a readout with a bias; the other narrows the stream to 16 units.
    Heads of attention have dimension 8, and for each there are 32 units of each layer of a perceptron.
    """

    def __init__(
        self,
        vocabulary: int,
        depth: int,
        heads: int,
        embedding: int,
        norms: Norms,
        optimizer: str = "adamw",
        **adamw: float,
    ) -> None:
        super().__init__()
        self.optimizer, self.settings = optimizer, adamw
        self.tokens = nn.Embedding(vocabulary, embedding)
        self.blocks = nn.ModuleList(_Block(heads, embedding, norms) for _ in range(depth))
        self.transform = nn.Linear(embedding, embedding)
        self.norm = nn.LayerNorm(embedding)
        self.readout = nn.Linear(embedding, vocabulary)
        self.narrow = nn.Linear(embedding, 16)
        self.classes = nn.Linear(16, CLASSES)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Map token ids ``[samples, length]`` to logits of the next token, and of which class it is in."""
        stream: Tensor = self.tokens(tokens)
        for block in self.blocks:
            stream = block(stream)
        logits = self.readout(self.norm(torch.tanh(self.transform(stream))))
        return logits, self.classes(torch.sigmoid(self.narrow(stream)))

    def training_step(self, batch: Tensor) -> Tensor:
        """Cross-entropy of the next token, and of its class, which is the rest that it leaves."""
        logits, classes = self(batch[:, :-1])
        after = batch[:, 1:].flatten()
        return F.cross_entropy(logits.flatten(0, 1), after) + F.cross_entropy(classes.flatten(0, 1), after % CLASSES)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The chosen optimizer over all parameters."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), self.settings["lr"], weight_decay=self.settings["weight_decay"])
        return torch.optim.AdamW(self.parameters(), betas=(0.9, 0.95), **self.settings)


class _Block(nn.Module):
    """Attention, a perceptron of three layers, and four experts of which a router makes an average."""

    def __init__(self, heads: int, embedding: int, norms: Norms) -> None:
        super().__init__()
        self.norms = norms
        branches = (
            _Attention(heads, embedding),
            _perceptron(embedding, 32 * heads, 32 * heads, embedding),
            _Experts(16 * heads, embedding),
        )
        self.branches = nn.ModuleList(branches)
        self.before = nn.ModuleList(nn.LayerNorm(embedding) for _ in self.branches if norms != "after")
        self.after = nn.ModuleList(nn.LayerNorm(embedding) for _ in self.branches if norms != "before")

    def forward(self, stream: Tensor) -> Tensor:
        for i, branch in enumerate(self.branches):
            given = stream if self.norms == "after" else self.before[i](stream)
            added = self.after[i](branch(given)) if self.norms == "both" else branch(given)
            stream = self.after[i](stream + added) if self.norms == "after" else stream + added
        return stream


class _Attention(nn.Module):
    def __init__(self, heads: int, embedding: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(embedding, 8 * heads) for _ in range(3))
        self.query_norm, self.key_norm = nn.RMSNorm(8), nn.RMSNorm(8)
        self.out = nn.Linear(8 * heads, embedding)

    def forward(self, given: Tensor) -> Tensor:
        query, key, value = (
            project(given).unflatten(-1, (self.heads, 8)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(self.query_norm(query), self.key_norm(key), value, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(2))


class _Experts(nn.Module):
    def __init__(self, hidden: int, embedding: int) -> None:
        super().__init__()
        self.router = nn.Linear(embedding, 4)
        self.experts = nn.ModuleList(_perceptron(embedding, hidden, embedding) for _ in range(4))

    def forward(self, given: Tensor) -> Tensor:
        weights = self.router(given).softmax(-1)
        parts = [weights[..., i, None] * expert(given) for i, expert in enumerate(self.experts)]
        return torch.stack(parts).sum(0)


def _perceptron(*sizes: int) -> nn.Sequential:
    layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
    return nn.Sequential(*(part for layer in layers[:-1] for part in (layer, nn.GELU())), layers[-1])
