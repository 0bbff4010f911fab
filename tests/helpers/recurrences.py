"""Models with recurrences in time inside of branches, by depth, units and embedding, and their training on tokens."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, LENGTH = 16, 16


class Layers(nn.Module):
    """Layers in residual branches, each with a matrix that writes what it makes."""

    def __init__(self, layer: Callable[[int, int], nn.Module], depth: int, hidden: int, embedding: int) -> None:
        super().__init__()
        self.embed, self.read = nn.Embedding(VOCABULARY, embedding), nn.Linear(embedding, VOCABULARY, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(embedding) for _ in range(depth + 1))
        self.reads = nn.ModuleList(layer(embedding, hidden) for _ in range(depth))
        width: Any = getattr(self.reads[0], "width", hidden)
        self.writes = nn.ModuleList(nn.Linear(width, embedding, bias=False) for _ in range(depth))

    def forward(self, tokens: Tensor) -> Any:
        h = self.embed(tokens)
        for norm, read, write in zip(self.norms, self.reads, self.writes, strict=False):
            made = read(norm(h))
            h = h + write(made[0] if isinstance(made, tuple) else made)
        return self.read(self.norms[-1](h))


class Heads(nn.Module):
    """Queries, keys and values of heads of 4 coordinates, and one number for each head."""

    def __init__(self, embedding: int, heads: int) -> None:
        super().__init__()
        self.width = 4 * heads
        self.parts = nn.ModuleList(nn.Linear(embedding, self.width, bias=False) for _ in range(3))
        self.gate = nn.Linear(embedding, heads)

    def step(self, state: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """state ← gate · state + key valueᵀ, as gated linear attention has it."""
        return gate * state + k[..., None] * v[..., None, :]

    def forward(self, x: Tensor) -> Any:
        q, k, v = (part(x).unflatten(-1, (-1, 4)) for part in self.parts)
        gate = torch.sigmoid(self.gate(x) + 1)[..., None, None]
        state, made = torch.zeros_like(k[:, 0, ..., None] * v[:, 0, :, None]), []
        for t in range(x.shape[1]):
            state = self.step(state, k[:, t], v[:, t], gate[:, t])
            made.append((q[:, t, ..., None] * state).sum(-2))
        return torch.stack(made, 1).flatten(2)


class Delta(Heads):
    def step(self, state: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """state ← state + gate · key (value − stateᵀ key)ᵀ, as DeltaNet has it."""
        k = F.normalize(k, dim=-1)
        return state + gate * k[..., None] * (v - (k[..., None] * state).sum(-2))[..., None, :]


def hugging_face(name: str, **numbers: Any) -> Any:
    """A small language model of transformers."""
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": False}
    config = getattr(transformers, f"{name}Config")(**{"vocab_size": VOCABULARY, **tokens, **numbers})
    return getattr(transformers, f"{name}ForCausalLM")(config)


def _of(name: str, numbers: Callable[[int, int], dict[str, Any]]) -> Callable[..., nn.Module]:
    """One whose other numbers depend on units and embedding."""
    return lambda depth, hidden, embedding: hugging_face(
        name, num_hidden_layers=depth, hidden_size=embedding, **numbers(hidden, embedding)
    )


_SSD = {"state_size": 4, "head_dim": 4, "n_groups": 1, "chunk_size": 8}
RECURRENCES: dict[str, tuple[Callable[..., nn.Module], int]] = {  # with units at the base
    "lstm": (partial(Layers, partial(nn.LSTM, batch_first=True)), 32),
    "gru": (partial(Layers, partial(nn.GRU, batch_first=True)), 32),
    "linear attention": (partial(Layers, Heads), 8),
    "deltanet": (partial(Layers, Delta), 8),
    "mamba": (_of("Mamba", lambda m, d: {"state_size": 4, "time_step_rank": 4, "expand": m // d}), 64),
    "mamba 2": (_of("Mamba2", lambda m, d: _SSD | {"num_heads": m, "expand": 4 * m // d}), 16),
}


class Model(LightningModule):
    def __init__(self, kind: str, depth: int, hidden: int, embedding: int) -> None:
        super().__init__()
        self.model = RECURRENCES[kind][0](depth=depth, hidden=hidden, embedding=embedding)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        made = self.model(batch[:, :-1])
        logits = made if isinstance(made, Tensor) else made.logits
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def batches(number: int = 12) -> list[Tensor]:
    draws = torch.Generator().manual_seed(0)
    return [torch.randint(1, 3, (16, LENGTH + 1), generator=draws).cumsum(-1) % VOCABULARY for _ in range(number)]
