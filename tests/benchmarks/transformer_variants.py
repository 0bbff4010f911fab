"""One Transformer at several sizes: plain, with this package's callback, with microsoft/mup and with unit-scaling.

The structure, the data and the optimizer are the same; what differs is what a parameterization puts into them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from helpers.processes import peak_megabytes
from helpers.trainers import quiet
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mlu_lightning import MLUCallback
from mlu_lightning.application.first_steps import FirstSteps
from mlu_lightning.callbacks import mlu_callback
from mlu_lightning.models import CausalTransformer, _rotate

__all__ = ["OPTIMIZERS", "SIZES", "VARIANTS", "VOCABULARY", "Size", "Transformer", "Variant", "base", "fit", "start"]

VOCABULARY = 256


@dataclass(frozen=True)
class Size:
    """Shape of a Transformer and of a batch, which is smaller the larger the Transformer."""

    depth: int  # attention branches, and as many of perceptrons
    embedding: int
    samples: int
    context: int = 64
    head_dim: int = 16


SIZES = {"1M": Size(5, 128, 4), "10M": Size(13, 256, 2), "100M": Size(14, 768, 1)}
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"momentum": 0.9}),
    "AdamW foreach": ("AdamW", {"foreach": True}),
    "AdamW fused": ("AdamW", {"fused": True}),
}
"""Name of the class, and arguments."""


class Transformer(CausalTransformer):  # the plain one, with any of the optimizers
    def __init__(self, size: Size, kind: str) -> None:
        heads = size.embedding // size.head_dim
        super().__init__(VOCABULARY, size.context, size.depth, size.embedding, heads, size.head_dim)
        self.kind = kind

    def configure_optimizers(self) -> torch.optim.Optimizer:
        name, arguments = OPTIMIZERS[self.kind]
        return getattr(self.optimizers_of(), name)(self.parameters(), lr=1e-4, **arguments)

    def optimizers_of(self) -> Any:
        return torch.optim


def mup_transformer(size: Size, kind: str) -> Transformer:
    """The Transformer as mup's README says: ``MuReadout``, base shapes by name, and mup's optimizers."""
    import mup

    class MuTransformer(Transformer):
        def __init__(self, size: Size, kind: str) -> None:
            super().__init__(size, kind)
            self.readout = mup.MuReadout(size.embedding, VOCABULARY, bias=False)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            name, arguments = OPTIMIZERS[self.kind]
            return getattr(mup, f"Mu{name}")(self.parameters(), lr=1e-4, **arguments)

    # depths have to be the same: parameters are matched by name
    base, wider = (MuTransformer(replace(size, embedding=4 * size.head_dim * factor), kind) for factor in (1, 2))
    return mup.set_base_shapes(MuTransformer(size, kind), base, delta=wider)


def unit_scaling_transformer(size: Size, kind: str) -> Transformer:
    """The Transformer of unit-scaling's modules and functions, with its optimizers."""
    import unit_scaling as uu
    import unit_scaling.functional as U

    class Attention(nn.Module):
        def __init__(self, embedding: int) -> None:
            super().__init__()
            self.norm = uu.RMSNorm(embedding, elementwise_affine=True)
            self.query, self.key, self.value, self.out = (uu.Linear(embedding, embedding) for _ in range(4))

        def forward(self, stream: Tensor) -> Tensor:
            stream = self.norm(stream)
            projections = (project(stream) for project in (self.query, self.key, self.value))
            query, key, value = (part.unflatten(-1, (-1, size.head_dim)).transpose(1, 2) for part in projections)
            query, key = _rotate(query, size.context), _rotate(key, size.context)
            attended = U.scaled_dot_product_attention(query, key, value, is_causal=True)
            return self.out(attended.transpose(1, 2).flatten(2))

    class MLP(nn.Module):
        def __init__(self, embedding: int) -> None:
            super().__init__()
            self.norm = uu.RMSNorm(embedding, elementwise_affine=True)
            self.read, self.write = uu.Linear(embedding, 4 * embedding), uu.Linear(4 * embedding, embedding)

        def forward(self, stream: Tensor) -> Tensor:
            return self.write(U.gelu(self.read(self.norm(stream))))

    class UnitTransformer(Transformer):
        def __init__(self, size: Size, kind: str) -> None:
            super().__init__(replace(size, depth=0), kind)
            self.tokens = uu.Embedding(VOCABULARY, size.embedding)
            kinds = (Attention, MLP) * size.depth
            self.branches = uu.DepthModuleList(kind(size.embedding) for kind in kinds)
            self.norm = uu.RMSNorm(size.embedding, elementwise_affine=True)
            self.readout = uu.LinearReadout(size.embedding, VOCABULARY)
            self.tau = uu.transformer_residual_scaling_rule()

        def forward(self, tokens: Tensor) -> Tensor:
            stream = self.tokens(tokens)
            for index, branch in enumerate(self.branches):
                stream = U.residual_apply(branch, stream, self.tau(index, len(self.branches)))
            return self.readout(self.norm(stream))

        def training_step(self, batch: Tensor) -> Tensor:
            loss = U.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            self.log("train_loss", loss, prog_bar=True)
            return loss

        def optimizers_of(self) -> Any:
            return uu.optim

    return UnitTransformer(size, kind)


def base(size: Size) -> Transformer:
    return Transformer(replace(size, depth=2, embedding=4 * size.head_dim), "SGD")


@dataclass(frozen=True)
class Variant:  # a parameterization of the Transformer, by callbacks or by modules of its own
    build: Callable[[Size, str], Transformer] = Transformer
    residual: Literal["hook", "fold"] | None = None  # where this package's callback puts multipliers, if it is there
    verify: bool = True
    package: str = "mlu_lightning"

    def callbacks(self, size: Size) -> list[Callback]:
        return [MLUCallback(lambda: base(size), residual=self.residual, verify=self.verify)] if self.residual else []


VARIANTS = {
    "plain": Variant(),
    "plain again": Variant(),
    "hook": Variant(residual="hook"),
    "fold": Variant(residual="fold"),
    "unverified": Variant(residual="fold", verify=False),
    "mup": Variant(build=mup_transformer, package="mup"),
    "unit-scaling": Variant(build=unit_scaling_transformer, package="unit_scaling"),
}


def fit(variant: Variant, size: Size, kind: str, steps: int, watch: Callback) -> None:
    module = variant.build(size, kind)
    draws = torch.Generator().manual_seed(0)
    tokens: Any = torch.randint(VOCABULARY, (steps * size.samples, size.context + 1), generator=draws)
    quiet(*variant.callbacks(size), watch, max_steps=steps).fit(module, DataLoader(tokens, batch_size=size.samples))


class _Start(Callback):  # notes the processor time at which the first step begins
    def on_train_batch_start(self, *args: Any) -> None:
        if args[-1] == 0:  # index of the batch
            self.seconds = time.process_time()


def start(variant: str, size: str, kind: str) -> dict[str, float]:
    """Seconds of processor time until the first of three steps, those that looking at these takes, and peak memory.

    In a process of its own, because it is the first call of everything that counts.
    """
    torch.set_num_threads(1)
    looks: list[float] = []
    for name in ("before_backward", "after_backward", "before_update", "after_update", "look", "look_before_batch"):
        setattr(FirstSteps, name, _timed(getattr(FirstSteps, name), looks))
    passes: list[float] = []  # which are compared in the last hook before the step, after that of a callback
    vars(mlu_callback)["verify_function"] = _timed(mlu_callback.verify_function, passes)
    before, watch = time.process_time(), _Start()
    fit(VARIANTS[variant], SIZES[size], kind, 3, watch)
    return {"seconds": watch.seconds - before + sum(passes), "looking": sum(looks), "megabytes": peak_megabytes()}


def _timed(method: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        before = time.process_time()
        found = method(*args, **kwargs)
        seconds.append(time.process_time() - before)
        return found

    return timed
