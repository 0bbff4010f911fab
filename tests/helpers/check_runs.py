"""Checks of small Transformers on sequences that can be learned, for tests that run them."""

from typing import Any

import torch
from torch import Tensor

from mlu_lightning import CheckReport, Shape, check
from mlu_lightning.models import CausalTransformer

VOCABULARY, CONTEXT = 16, 8
BASE = Shape(depth=1, hidden=2, embedding=16)


def tokens(count: int = 12, samples: int = 16) -> list[Tensor]:
    """Sequences in which each token is one or two more than the last, so that there is something to learn."""
    draws = torch.Generator().manual_seed(0)
    steps = torch.randint(1, 3, (count, samples, CONTEXT + 1), generator=draws)
    return list(steps.cumsum(-1) % VOCABULARY)


def transformer(depth: int, hidden: int, embedding: int, **settings: Any) -> CausalTransformer:
    settings = {"lr": 2**-6, "weight_decay": 0.1} | settings
    return CausalTransformer(VOCABULARY, CONTEXT, depth, embedding, hidden, 8, mlp_hidden=32 * hidden, **settings)


def few(**settings: Any) -> CheckReport:
    arguments: dict[str, Any] = {"factors": (1, 2, 4), "seeds": 3, "steps": 3} | settings
    build = arguments.pop("build", transformer)
    return check(build, arguments.pop("base", BASE), arguments.pop("data", tokens()), **arguments)
