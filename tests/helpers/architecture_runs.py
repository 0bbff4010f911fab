"""Modules of the registry under a Trainer: their losses and data, a thin LightningModule around them, and their runs."""

from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from helpers.architectures import Architecture
from helpers.trainers import identical as identical
from helpers.trainers import loader, quiet
from mlu_lightning import Plan
from mlu_lightning.models import CausalTransformer, ResNet

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# depth, heads, embedding
SMALL, LARGE = (1, 2, 16), (2, 4, 32)
BATCHES, EPOCHS = 2, 2


def loss_of(module: nn.Module, batch: Any) -> Tensor:
    """What a module is trained for on a batch like its example: its own loss, or else a distance to a ramp."""
    if isinstance(module, ResNet):
        return F.mse_loss(module(batch[0]), batch[1])
    if isinstance(module, CausalTransformer):
        return F.cross_entropy(module(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    if isinstance(batch, dict):
        return module(**batch).loss
    output = module(*batch)
    return (output - torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)).square().mean()


def in_double(batch: Any) -> Any:
    return tree_map_only(Tensor, lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, batch)


def doubled(module: ModuleT) -> ModuleT:
    """A module in double precision; experts of transformers are one by one then, as all at once needs single precision."""
    for part in module.modules():
        if getattr(part, "_can_set_experts_implementation", bool)():
            part.set_experts_implementation("eager")
    return module.double()


def batches_like(example: Any, count: int = BATCHES) -> list[Any]:
    """Batches with other random numbers and ids; masks stay as they are."""
    generator = torch.Generator().manual_seed(1)

    def drawn(leaf: Tensor) -> Tensor:
        if leaf.is_floating_point():
            return torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator) if leaf.isfinite().all() else leaf
        if leaf.dtype is torch.bool or bool((leaf == 1).all()):
            return leaf
        return torch.randint(max(2, int(leaf.max()) + 1), leaf.shape, generator=generator)

    return [tree_map_only(Tensor, drawn, example) for _ in range(count)]


class Trained(LightningModule):  # any module with its loss and a schedule whose every step differs; keeps what it lost
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.losses: list[float] = []
        self.validated: list[float] = []

    def training_step(self, batch: Any) -> Tensor:
        return loss_of(self.module, batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))

    def validation_step(self, batch: Any) -> None:
        self.validated.append(float(loss_of(self.module, batch)))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        # eps is as large as gradients are: with a small one, Adam amplifies rounding errors where a gradient is zero
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, eps=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=BATCHES * EPOCHS + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def built(architecture: Architecture, shape: Any = LARGE, seed: int = 0, double: bool = False) -> Trained:
    """A module of a shape, in training mode, the same for the same seed."""
    torch.manual_seed(seed)
    module: Any = architecture.build(*shape)
    if hasattr(module, "loss_type") and module.loss_type is None:
        # what transformers takes then, with a warning that torch.compile stumbles over
        module.loss_type = "ForCausalLM"
    module = Trained(module).train()
    return doubled(module) if double else module


def fit(
    module: Any, batches: Any, *callbacks: Callback, epochs: int = EPOCHS, folder: Any = None, **more: Any
) -> Trainer:
    """Train, from the same random state every time; a checkpoint of every epoch goes to ``folder``."""
    saving = [] if folder is None else [ModelCheckpoint(folder, "{epoch}", save_top_k=-1)]
    torch.manual_seed(3)
    trainer = quiet(*callbacks, *saving, max_epochs=epochs, enable_checkpointing=bool(saving))
    trainer.fit(module, loader(batches), **more)
    return trainer


class Seeded(Callback):
    """Makes the random numbers of a step depend on its number alone: the Trainer does not restore random states."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        torch.manual_seed(trainer.global_step)


def attachable(plan: Plan) -> bool:
    """Whether hooks have a place for all of its multipliers; elsewhere they can be folded only."""
    return all(multiplier.site is not None for multiplier in plan.multipliers)
