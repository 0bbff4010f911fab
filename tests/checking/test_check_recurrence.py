"""Recurrent branches move alike along depth, heads or channels, and embedding: the check passes for their plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from mlu_lightning import Shape, check

VOCABULARY, LENGTH = 16, 16


class Layers(nn.Module):
    """LSTMs, or linear attention with a decay for every head, in residual branches."""

    def __init__(self, depth: int, hidden: int, embedding: int, lstm: bool) -> None:
        super().__init__()
        self.embed, self.read = nn.Embedding(VOCABULARY, embedding), nn.Linear(embedding, VOCABULARY, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(embedding) for _ in range(depth + 1))
        sizes = (embedding, hidden) if lstm else (embedding, 4 * hidden)
        self.reads = nn.ModuleList(
            (nn.LSTM(*sizes, batch_first=True) if lstm else Decaying(*sizes)) for _ in range(depth)
        )
        self.writes = nn.ModuleList(nn.Linear(sizes[1], embedding, bias=False) for _ in range(depth))

    def forward(self, tokens: Tensor) -> Any:
        h = self.embed(tokens)
        for norm, read, write in zip(self.norms, self.reads, self.writes, strict=False):
            made = read(norm(h))
            h = h + write(made[0] if isinstance(made, tuple) else made)
        return self.read(self.norms[-1](h))


class Decaying(nn.Module):
    """state ← decay · state + key valueᵀ, of heads of 4 coordinates."""

    def __init__(self, embedding: int, width: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(embedding, width, bias=False) for _ in range(3))
        self.decay = nn.Linear(embedding, width // 4)

    def forward(self, x: Tensor) -> Any:
        q, k, v = (part(x).unflatten(-1, (-1, 4)) for part in self.parts)
        decay = torch.sigmoid(self.decay(x) + 1)
        state, made = torch.zeros_like(k[:, 0, ..., None] * v[:, 0, :, None]), []
        for t in range(x.shape[1]):
            state = decay[:, t, :, None, None] * state + k[:, t, ..., None] * v[:, t, :, None]
            made.append((q[:, t, ..., None] * state).sum(-2))
        return torch.stack(made, 1).flatten(2)


def hugging_face(name: str, depth: int, embedding: int, **numbers: Any) -> Any:
    config = getattr(transformers, f"{name}Config")
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "use_cache": False}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": embedding, "num_hidden_layers": depth}
    return getattr(transformers, f"{name}ForCausalLM")(config(**sizes, **tokens, **numbers))


def mamba(depth: int, hidden: int, embedding: int) -> Any:
    return hugging_face("Mamba", depth, embedding, state_size=4, time_step_rank=4, expand=hidden // embedding)


def mamba2(depth: int, hidden: int, embedding: int) -> Any:
    numbers = {"state_size": 4, "num_heads": hidden, "head_dim": 4, "n_groups": 1, "chunk_size": 8}
    return hugging_face("Mamba2", depth, embedding, expand=4 * hidden // embedding, **numbers)


BUILDS: dict[str, tuple[Callable[..., nn.Module], int]] = {  # with units at the base
    "lstm": (lambda **shape: Layers(lstm=True, **shape), 32),
    "linear attention": (lambda **shape: Layers(lstm=False, **shape), 8),
    "mamba": (mamba, 64),
    "mamba 2": (mamba2, 16),
}


class Model(LightningModule):
    def __init__(self, kind: str, depth: int, hidden: int, embedding: int) -> None:
        super().__init__()
        self.model = BUILDS[kind][0](depth=depth, hidden=hidden, embedding=embedding)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        made = self.model(batch[:, :-1])
        logits = made if isinstance(made, Tensor) else made.logits
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BUILDS)
def test_recurrences_pass_the_check(kind: str) -> None:
    draws = torch.Generator().manual_seed(0)
    batches = [(torch.randint(1, 3, (16, LENGTH + 1), generator=draws).cumsum(-1) % VOCABULARY) for _ in range(12)]
    report = check(
        lambda depth, hidden, embedding: Model(kind, depth, hidden, embedding),
        Shape(depth=2, hidden=BUILDS[kind][1], embedding=16),
        batches,
        axes=["depth", "hidden", "embedding"],
        factors=(1, 2, 4),
        seeds=3,
        steps=3,
    )
    assert report.verdict == "pass", f"{report.causes}\n{report}"
