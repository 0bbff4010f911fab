"""Two residual networks to start from: the paper's ResNet and a small causal Transformer.

Both are ordinary LightningModules at the ordinary parameterization of torch, which know nothing of the MLU table. Every
residual branch is a module of its own whose *output is the branch*; the addition to the stream is in the parent.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


class ResNet(LightningModule):
    """The residual network of the paper: an embedding, ``depth`` perceptron blocks and a readout, without biases.

    h_0 = W_E x,  h_{l+1} = h_l + V_l σ(U_l h_l),  f = W_U h_L (theory.md, section 2, without its scales, which a plan
    puts in). Batches are pairs of inputs ``[samples, inputs]`` and targets ``[samples, outputs]``; the loss is the
    mean squared error; the optimizer is SGD.

    Args:
        depth: Number of residual blocks, L.
        hidden: Hidden units of a block, M.
        embedding: Dimension of the residual stream, D.
        inputs: Dimension of the data.
        outputs: Dimension of the targets.
        activation: Name of a function in ``torch.nn.functional`` or ``torch``; ``"positive"`` is the identity.
        train_embedding: Whether the embedding and the readout are trained; if not, only the blocks are.
        lr: Learning rate.
        momentum: Momentum of SGD.
        weight_decay: Decay that SGD adds to the gradient.

    Raises:
        ValueError: If ``activation`` names no function that maps a tensor to one of the same shape.

    >>> model = ResNet(depth=3, hidden=8, embedding=4, inputs=2, outputs=1)
    >>> model(torch.zeros(5, 2)).shape
    torch.Size([5, 1])
    >>> sorted(name for name, _ in model.blocks[0].named_parameters())
    ['read.weight', 'write.weight']
    """

    def __init__(
        self,
        depth: int,
        hidden: int,
        embedding: int,
        inputs: int,
        outputs: int,
        activation: str = "tanh",
        train_embedding: bool = True,
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.embed = nn.Linear(inputs, embedding, bias=False).requires_grad_(train_embedding)
        self.blocks = nn.ModuleList(ResidualBlock(hidden, embedding, activation) for _ in range(depth))
        self.readout = nn.Linear(embedding, outputs, bias=False).requires_grad_(train_embedding)
        self.example_input_array = torch.zeros(1, inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs ``[samples, inputs]`` to outputs ``[samples, outputs]``."""
        stream = self.embed(x)
        for block in self.blocks:
            stream = stream + block(stream)
        output: Tensor = self.readout(stream)
        return output

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean squared error of a batch, logged as ``train_loss``."""
        return self._loss(batch, "train_loss")

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean squared error of a batch, logged as ``val_loss``."""
        return self._loss(batch, "val_loss")

    def configure_optimizers(self) -> torch.optim.SGD:
        """SGD over all parameters."""
        return torch.optim.SGD(self.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay)

    def _loss(self, batch: tuple[Tensor, Tensor], name: str) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self(x), y)
        self.log(name, loss, prog_bar=True)
        return loss


class CausalTransformer(LightningModule):
    """A small pre-norm language model: token table, attention branches with rotary positions, MLPs, untied readout.

    Heads keep a fixed dimension, so that hidden width (heads, MLP units) and embedding dimension are chosen apart from
    each other; ``heads * head_dim`` need not be ``embedding`` (theory.md, section 3, "Attention with a bounded
    key-query dimension"). Batches are token ids ``[samples, length + 1]``: every token but the last predicts the next
    one. The loss is the mean cross-entropy in nats per token; the optimizer is AdamW.

    Args:
        vocabulary: Number of different tokens.
        context: Length of the sequences it is made for; the slowest rotary angle turns by one radian over it.
        depth: Number of attention branches and of MLP branches; L = 2 * depth, or depth without MLP branches.
        embedding: Dimension of the residual stream, D.
        heads: Attention heads, M of an attention branch.
        head_dim: Dimension of one head's queries, keys and values, an even number.
        mlp_hidden: Units of an MLP branch, its M; by default 4 * heads * head_dim. With 0 there are no MLP branches.
        lr: Learning rate, at its peak if there is a schedule.
        betas: Decay rates of AdamW's moments.
        eps: AdamW's eps.
        weight_decay: AdamW's decoupled decay, or what SGD adds to the gradient.
        schedule_steps: Steps of a linear warm-up over the first tenth and a linear decay to zero; by default constant.
        norm_gains: Whether norms have gains; the infinite model (theory.md, section 5) has none.
        optimizer: ``"adamw"`` or ``"sgd"``.
        momentum: Momentum of SGD.

    Raises:
        ValueError: If ``head_dim`` is odd, or ``optimizer`` is unknown.

    >>> model = CausalTransformer(vocabulary=100, context=16, depth=2, embedding=32, heads=2)
    >>> model(torch.zeros(3, 16, dtype=torch.long)).shape
    torch.Size([3, 16, 100])
    >>> [type(branch).__name__ for branch in model.branches]
    ['Attention', 'MLP', 'Attention', 'MLP']
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        depth: int,
        embedding: int,
        heads: int,
        head_dim: int = 16,
        mlp_hidden: int | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        schedule_steps: int | None = None,
        norm_gains: bool = True,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        momentum: float = 0.0,
    ) -> None:
        super().__init__()
        if optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer={optimizer!r} is none of: 'adamw', 'sgd'.")
        self.save_hyperparameters()
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.optimizer, self.momentum, self.schedule_steps = optimizer, momentum, schedule_steps
        units = 4 * heads * head_dim if mlp_hidden is None else mlp_hidden
        self.tokens = nn.Embedding(vocabulary, embedding)
        self.branches = nn.ModuleList(
            branch
            for _ in range(depth)
            for branch in (
                Attention(embedding, heads, head_dim, context, norm_gains),
                *([MLP(embedding, units, norm_gains)] if units else []),
            )
        )
        self.norm = nn.RMSNorm(embedding, elementwise_affine=norm_gains)
        self.readout = nn.Linear(embedding, vocabulary, bias=False)
        self.example_input_array = torch.zeros(1, context, dtype=torch.long)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids ``[samples, length]`` to logits of the next token ``[samples, length, vocabulary]``."""
        stream: Tensor = self.tokens(tokens)
        for branch in self.branches:
            stream = stream + branch(stream)
        logits: Tensor = self.readout(self.norm(stream))
        return logits

    def training_step(self, batch: Tensor) -> Tensor:
        """Cross-entropy of a batch, logged as ``train_loss``."""
        return self._loss(batch, "train_loss")

    def validation_step(self, batch: Tensor) -> Tensor:
        """Cross-entropy of a batch, logged as ``val_loss``."""
        return self._loss(batch, "val_loss")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW or SGD over all parameters, with the schedule if ``schedule_steps`` is given."""
        optimizer: torch.optim.Optimizer
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(self.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), self.lr, self.betas, self.eps, self.weight_decay)
        if self.schedule_steps is None:
            return optimizer
        schedule = LambdaLR(optimizer, _warmup_and_decay(self.schedule_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _loss(self, batch: Tensor, name: str) -> Tensor:
        logits = self(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.log(name, loss, prog_bar=True)
        return loss


class ResidualBlock(nn.Module):
    """A perceptron with one hidden layer, V σ(U h): the branch that :class:`ResNet` adds to its stream."""

    def __init__(self, hidden: int, embedding: int, activation: str = "tanh") -> None:
        super().__init__()
        self.activation = _activation(activation)
        self.read = nn.Linear(embedding, hidden, bias=False)
        self.write = nn.Linear(hidden, embedding, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        """Map the stream to the branch, both ``[..., embedding]``."""
        branch: Tensor = self.write(self.activation(self.read(stream)))
        return branch


class Attention(nn.Module):
    """Norm and causal self-attention: a branch of :class:`CausalTransformer`; logits are scaled by 1/sqrt(head_dim)."""

    def __init__(self, embedding: int, heads: int, head_dim: int, context: int, norm_gain: bool = True) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(
                f"head_dim={head_dim} is odd, but rotary positions turn pairs of coordinates: choose an even head_dim."
            )
        self.heads, self.context = heads, context
        self.norm = nn.RMSNorm(embedding, elementwise_affine=norm_gain)
        self.query = nn.Linear(embedding, heads * head_dim, bias=False)
        self.key = nn.Linear(embedding, heads * head_dim, bias=False)
        self.value = nn.Linear(embedding, heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, embedding, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        """Map the stream to the branch, both ``[samples, length, embedding]``."""
        stream = self.norm(stream)
        query, key, value = (
            project(stream).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        query, key = _rotate(query, self.context), _rotate(key, self.context)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        branch: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return branch


class MLP(nn.Module):
    """Norm and perceptron with one hidden layer of GELUs: a branch of :class:`CausalTransformer`."""

    def __init__(self, embedding: int, hidden: int, norm_gain: bool = True) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(embedding, elementwise_affine=norm_gain)
        self.read = nn.Linear(embedding, hidden, bias=False)
        self.write = nn.Linear(hidden, embedding, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        """Map the stream to the branch, both ``[samples, length, embedding]``."""
        branch: Tensor = self.write(F.gelu(self.read(self.norm(stream))))
        return branch


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    function: Callable[[Tensor], Tensor] | None = getattr(F, name, None) or getattr(torch, name, None)
    units, output = torch.zeros(2, 4), None
    if callable(function):
        with suppress(TypeError, ValueError, RuntimeError):
            output = function(units)
    if function is None or not isinstance(output, Tensor) or output.shape != units.shape:
        raise ValueError(
            f"activation={name!r} is not the name of a function in torch.nn.functional or torch that maps one tensor "
            "to a tensor of the same shape; give a name such as 'tanh', 'relu', 'gelu' or 'positive' (the identity)."
        )
    return function


def _rotate(heads: Tensor, context: int) -> Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864) of queries or keys ``[samples, heads, length, head_dim]``."""
    length, head_dim = heads.shape[-2:]
    frequencies = float(context) ** -torch.linspace(0, 1, head_dim // 2, device=heads.device)
    angles = torch.outer(torch.arange(length, device=heads.device), frequencies)
    cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    real, imaginary = heads.chunk(2, dim=-1)
    return torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin), dim=-1)


def _warmup_and_decay(steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at a step: linear to 1 over a tenth of the steps, then linear to 0 at the last."""
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, max(0.0, (steps - step) / (steps - warmup + 1)))

    return factor
