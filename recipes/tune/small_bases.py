"""Small models that are compared: what is trained, Transformers side by side, and learning rates of their own.

The first is a tied GPT, of which one thing at a time is changed: its weights are drawn at 0.02, its readout is its token
table, and it has learned positions, as nanoGPT has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mlu_lightning import MLUCallback
from mlu_lightning.models import CausalTransformer
from mlu_lightning.tuning.found import Estimate
from mlu_lightning.tuning.training import Training
from mlu_lightning.utilities.fitted_tables import number_table
from recipes.common.studies import ResultFile
from recipes.common.text import Text
from recipes.tune.runs import STUDIES, Run, curve_of

CONTEXT = 32


class TiedGPT(CausalTransformer):
    """A Transformer with learned positions and weights from N(0, std²), whose readout is its token table if ``tied``."""

    def __init__(self, tied: bool, std: float, **sizes: int) -> None:
        super().__init__(256, CONTEXT, **sizes)
        self.positions = nn.Embedding(CONTEXT, sizes["embedding"])
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
        if tied:
            self.readout.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids ``[samples, length]`` to logits of the next token ``[samples, length, vocabulary]``."""
        stream: Tensor = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for branch in self.branches:
            stream = stream + branch(stream)
        logits: Tensor = self.readout(self.norm(stream))
        return logits


@dataclass(frozen=True)
class Change:
    """What is trained, from a base with D = 32, 2 heads and 128 MLP units, and with which factors."""

    model: str = "nanogpt"
    steps: int = 128
    tied: bool = True
    std: float = 0.02
    tuned: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    parameterization: str = "mlu"
    tuned_at: str = "base"  # shape at which the learning rate is chosen

    def network(self, factor: int) -> nn.Module:
        """Build the base, or a model so many times as wide."""
        if self.model in ("package", "nanogpt"):
            sizes = {"depth": 2, "heads": 2 * factor, "mlp_hidden": 128 * factor, "embedding": 32 * factor}
            own = self.model == "package"
            return CausalTransformer(256, CONTEXT, **sizes) if own else TiedGPT(self.tied, self.std, **sizes)
        from transformers import AutoConfig, AutoModelForCausalLM, ViTForImageClassification

        heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2 * factor)
        sizes = {"hidden_size": 32 * factor, "intermediate_size": 128 * factor, "initializer_range": self.std}
        own, others = (dict(STUDIES["configurations"].get(name, {})) for name in (self.model, "all"))
        if self.model == "vit":
            return ViTForImageClassification(AutoConfig.for_model("vit", **heads, **sizes, **others, **own))
        others |= STUDIES["configurations"]["text"]
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(self.model, **heads, **sizes, **others, **own))

    def data(self, seed: int) -> Any:
        """Make the data, in an order of their own for each seed."""
        if self.model != "vit":
            return Text(CONTEXT, self.steps, 16, seed, 8)
        from recipes.aspect.digits import Digits

        return Digits(self.steps, 32, seed)

    def training(self, factor: int, exponent: float, seed: int) -> Training:
        """Describe a training of the base, or of a model so many times as wide."""
        make, base = (partial(Networks, [self], [2.0**exponent], factor=width) for width in (factor, 1))
        trainer = {"accelerator": "cpu", "max_steps": self.steps, "val_check_interval": self.steps}
        callbacks = partial(_callbacks, parameterization=self.parameterization)
        return Training.of(make, base, callbacks, data=self.data(seed), trainer=trainer)


class Networks(LightningModule):
    """Networks that are trained side by side on the same batches, each at its learning rate, with its loss in a unit."""

    def __init__(
        self, models: Sequence[Change], rates: Sequence[float], units: Sequence[float] | None = None, factor: int = 1
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(model.network(factor) for model in models)
        self.rates, self.units, self.steps = rates, units or [1.0] * len(models), models[0].steps

    def training_step(self, batch: Any) -> Tensor:
        """The sum of all losses, whose gradients are those of each alone."""
        loss: Tensor = sum(_loss(each, batch) for each in self.networks)
        return loss

    def validation_step(self, batch: Any) -> None:
        """Log the mean of all losses, each in its unit."""
        losses = [_loss(each, batch) / unit for each, unit in zip(self.networks, self.units, strict=True)]
        self.log("val_loss", sum(losses) / len(losses))

    def configure_optimizers(self) -> Any:
        """AdamW with a warm-up and a cosine."""
        groups = [{"params": each.parameters(), "lr": lr} for each, lr in zip(self.networks, self.rates, strict=True)]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        return [optimizer], [{"scheduler": LambdaLR(optimizer, self._rate), "interval": "step"}]

    def _rate(self, step: int) -> float:
        warmup = max(1, self.steps // 10)
        share = (step + 1 - warmup) / (self.steps - warmup)
        return min(1.0, (step + 1) / warmup) if step < warmup else 0.55 + 0.45 * math.cos(math.pi * min(share, 1.0))


BASES, PRESETS = ({name: Change(**of) for name, of in STUDIES[what].items()} for what in ("bases", "presets"))


@dataclass(frozen=True)
class Comparison:
    """What is compared, each at a learning rate of its own, which the first seed chooses at one shape."""

    changes: Mapping[str, Change]
    shapes: Mapping[str, int] = field(default_factory=lambda: {"base": 1, "4 × widths": 4})
    exponents: Sequence[int] = (-7, -6, -5, -4)
    seeds: int = 3

    def make(self, path: Path, workers: int, end: float, terminal: Console) -> list[Run]:
        """Train what is missing, until the time is over; methods of runs are the changes."""
        file = ResultFile(path, asdict(Change()), lambda line: Run(**line))
        runs = file.read()

        def case(run: Run) -> tuple[Any, ...]:
            return self.changes[run.method], self.shapes[run.shape], run

        file.extend(runs, lambda: [*self.missing(runs)], case, _train, workers, end, terminal)
        return runs

    def missing(self, runs: Sequence[Run]) -> Iterator[Run]:
        """All learning rates with the first seed at one shape, and then all shapes at the best one with all seeds."""
        made = {(run.shape, run.method, run.exponent, run.seed) for run in runs}
        for name, change in self.changes.items():
            wanted = [Run(change.tuned_at, name, exponent, 0) for exponent in self.exponents]
            if all((change.tuned_at, name, exponent, 0) in made for exponent in self.exponents):
                best = self.best(runs, name)
                wanted = [Run(shape, name, best, seed) for shape in self.shapes for seed in range(self.seeds)]
            yield from (run for run in wanted if (run.shape, run.method, run.exponent, run.seed) not in made)

    def best(self, runs: Sequence[Run], name: str) -> float:
        """Exponent of the learning rate of least loss."""
        curve = curve_of([*runs], self.changes[name].tuned_at, name)
        return min(curve, key=lambda exponent: curve[exponent])

    def losses(self, runs: Sequence[Run], name: str) -> list[list[float]]:
        """Losses of all seeds at the best learning rate, by shape; none before all were made."""
        if any(run.method == name for run in self.missing(runs)):
            return []
        best = self.best(runs, name)
        return [[curve_of([*runs], shape, name, seed)[best] for seed in range(self.seeds)] for shape in self.shapes]

    def table(self, runs: Sequence[Run]) -> Table:
        """Losses at all shapes, and by how much the larger one's is lower in pairs of seeds."""
        table = number_table("change", "lr", *self.shapes, "gain of width")
        for name in self.changes:
            if losses := self.losses(runs, name):
                gains = [small - large for small, large in zip(*losses, strict=True)]
                cells = (Estimate.over(values).text(3) for values in (*losses, gains))
                table.add_row(name, f"2^{self.best(runs, name):g}", *cells)
        return table


def _train(change: Change, factor: int, run: Run) -> Run:
    start = time.process_time()
    training = change.training(factor, run.exponent, run.seed)
    loss = training.run(training.plan(), {key: dict(of) for key, of in change.tuned.items()}, run.seed).value
    return replace(run, loss=loss, seconds=round(time.process_time() - start, 2))


def _callbacks(base: LightningModule, parameterization: Any) -> list[MLUCallback]:
    return [MLUCallback(base, parameterization=parameterization)]


def _loss(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch if isinstance(batch, list) else (batch[:, :-1], batch[:, 1:].flatten())
    found = model(inputs.unflatten(1, (1, 8, 8)) if inputs.is_floating_point() else inputs)
    return F.cross_entropy(getattr(found, "logits", found).flatten(0, -2), targets)
