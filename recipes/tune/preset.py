"""Does one set of factors help Transformers that it was not found on? One search over three, and others that test it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import stdev
from typing import Any

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from rich.table import Table
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from mlu_lightning import tune
from mlu_lightning.models import CausalTransformer
from mlu_lightning.planning.tuned import Tuned
from mlu_lightning.tuning import Tuning
from mlu_lightning.tuning.found import Estimate, paired
from mlu_lightning.tuning.space import DEFAULT_ROLES
from mlu_lightning.tuning.training import Training
from mlu_lightning.tuning.tune import times
from mlu_lightning.utilities.fitted_tables import number_table
from recipes.common.text import Text
from recipes.tune.runs import Run
from recipes.tune.small_bases import CONTEXT, Comparison, TiedGPT

NAMES = ("package", "nanogpt", "llama", "gpt_neox", "bert", "qwen3", "vit", "nanogpt 0.02")
SIZE = 32
PRESET: Tuned = {}
"""Factors that ``preset`` has found."""
OWN_WIDTH = SIZE**-0.5  # std of all weights, but for the package's Transformer, which has PyTorch's


def network(name: str) -> nn.Module:
    """Build a Transformer of 2 blocks, 2 heads of 16, 128 MLP units and D = 32."""
    from transformers import AutoConfig, AutoModelForCausalLM, ViTForImageClassification

    if name == "package":
        return CausalTransformer(256, CONTEXT, 2, SIZE, 2, 16, 128)
    if name.startswith("nanogpt"):
        std = 0.02 if name == "nanogpt 0.02" else OWN_WIDTH
        return TiedGPT(std=std, depth=2, heads=2, mlp_hidden=128, embedding=SIZE, lr=1.0, steps=1, warmup=1)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    sizes = {"hidden_size": SIZE, "num_hidden_layers": 2, "intermediate_size": 128, "initializer_range": OWN_WIDTH}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if name == "vit":
        image = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
        return ViTForImageClassification(AutoConfig.for_model("vit", **sizes, **heads, **dropout, **image))
    text = {"vocab_size": 256, "max_position_embeddings": CONTEXT, "pad_token_id": None, "is_decoder": name == "bert"}
    config = AutoConfig.for_model(name, **sizes, **heads, **dropout, **text)
    return AutoModelForCausalLM.from_config(config)


class Networks(LightningModule):
    """Networks that are trained side by side on the same batches, each at its learning rate, with its loss in a unit."""

    def __init__(self, names: Sequence[str], rates: Sequence[float], units: Sequence[float], steps: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList(map(network, names))
        self.rates, self.units, self.steps = rates, units, steps

    def training_step(self, batch: Any) -> Tensor:
        """The sum of all losses, whose gradients are those of each alone."""
        loss: Tensor = sum(_loss(each, batch) for each in self.networks)
        return loss

    def validation_step(self, batch: Any) -> None:
        """Log the mean of all losses, each in its unit."""
        losses = [_loss(each, batch) / unit for each, unit in zip(self.networks, self.units, strict=True)]
        self.log("val_loss", sum(losses) / len(losses))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a warm-up and a cosine."""
        groups = [{"params": each.parameters(), "lr": lr} for each, lr in zip(self.networks, self.rates, strict=True)]
        optimizer = AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        warmup = max(1, self.steps // 10)
        schedule = LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / self.steps))),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(frozen=True)
class One:
    """One of the models, and its factors."""

    name: str
    steps: int
    tuned: Tuned = field(default_factory=dict)
    tuned_at: str = "base"

    def training(self, factor: int, exponent: float, seed: int) -> Training:
        """Describe a training."""
        data: Any = Text(CONTEXT, self.steps, 16, seed, 8)
        if self.name == "vit":
            from recipes.aspect.digits import Digits

            data = Digits(self.steps, 32, seed)
        build = partial(Networks, [self.name], [2.0**exponent], [1.0], self.steps)
        trainer = {"accelerator": "cpu", "max_steps": self.steps, "val_check_interval": self.steps}
        return Training.of(build, build, data=data, trainer=trainer)


@dataclass(frozen=True)
class Presets:
    """Models of which some are to tell what is good for the others."""

    found_on: tuple[str, ...]
    names: tuple[str, ...] = NAMES
    steps: int = 128
    seeds: int = 5
    exponents: tuple[int, ...] = (-8, -7, -6, -5, -4, -3)

    def compared(self, tuned: Tuned) -> Comparison:
        """All models, each with those of the factors of which it has the role."""
        models = {name: One(name, self.steps, self._fitting(name, tuned)) for name in self.names}
        return Comparison(models, {"base": 1}, self.exponents, self.seeds)

    def search(self, folder: Path, alone: Sequence[Run], trials: int, minutes: float | None) -> Tuning:
        """Search factors with which the mean of losses, each in units of its noise, is least."""
        compared = self.compared({})
        units = [stdev(compared.losses(alone, name)[0]) for name in self.found_on]
        rates = [2.0 ** compared.best(alone, name) for name in self.found_on]
        return tune(
            partial(Networks, self.found_on, rates, units, self.steps),
            Text(CONTEXT, self.steps, 16, 0, 8),
            trials=trials,
            minutes=minutes,
            roles=(*DEFAULT_ROLES, "readout.multiplier"),  # of which a tied readout has nothing else
            trainer={"accelerator": "cpu", "max_steps": self.steps},
            out=folder,
        )

    def table(self, alone: Sequence[Run], preset: Sequence[Run]) -> Table:
        """Losses without and with the factors, each at its best learning rate, and the gain in pairs of seeds."""
        table, compared = number_table("model", "lr alone", "lr", "preset", "lr", "gain"), self.compared({})
        for name in self.names:
            losses = [of[0] for runs in (alone, preset) if (of := compared.losses(runs, name))]
            if len(losses) == 2:
                means = [f"{each.value:.3f} ± {each.error:.3f}" for each in map(Estimate.over, losses)]
                rates = [f"2^{compared.best(runs, name):g}" for runs in (alone, preset)]
                table.add_row(name, means[0], rates[0], means[1], rates[1], str(paired(*losses, "min")))
        return table

    def _fitting(self, name: str, tuned: Tuned) -> Tuned:
        plan = One(name, self.steps).training(1, 0, 0).plan() if tuned else None
        roles = {role.value for role in plan.roles.values()} if plan else set()
        own = {k: {w: f for w, f in of.items() if k in roles or w == "multiplier"} for k, of in tuned.items()}
        return {key: of for key, of in own.items() if of}


def relative(tuned: Tuned) -> Tuned:
    """Factors beside a learning rate that is everybody's own, which is that of branch_in."""
    own = times(tuned, {key: {"lr": 1 / tuned.get("branch_in", {}).get("lr", 1.0)} for key in tuned})
    rounded = {key: {what: float(f"{factor:.3g}") for what, factor in of.items()} for key, of in own.items()}
    changed = {key: {what: factor for what, factor in of.items() if factor != 1.0} for key, of in rounded.items()}
    return {key: of for key, of in changed.items() if of}


def _loss(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch if isinstance(batch, list) else (batch[:, :-1], batch[:, 1:].flatten())
    found = model(inputs.unflatten(1, (1, 8, 8)) if inputs.is_floating_point() else inputs)
    return F.cross_entropy(getattr(found, "logits", found).flatten(0, -2), targets)
