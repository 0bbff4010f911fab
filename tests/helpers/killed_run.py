"""Runs that can be killed some steps and seconds after they began, and go on from the last checkpoint in their folder."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, optim
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from helpers.trainers import quiet
from mlu_lightning import MLUCallback, ReferenceRecorder
from mlu_lightning.models import ResNet

STEPS = 24
SHAPE = {"depth": 4, "hidden": 32, "embedding": 16, "inputs": 3, "outputs": 2}
BASE = SHAPE | {"depth": 2, "hidden": 8, "embedding": 4}


def warm_then_cosine(optimizer: optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5), SCHEDULES["cosine"](optimizer, STEPS - 5)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[5])


OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "sgd": lambda groups: optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda groups: optim.AdamW(groups, lr=0.01, weight_decay=0.1),
    "fused": lambda groups: optim.AdamW(groups, lr=0.01, weight_decay=0.1, fused=True),
    "radam": lambda groups: optim.RAdam(groups, lr=0.01, weight_decay=0.1),
    "adafactor": lambda groups: optim.Adafactor(groups, lr=0.01, weight_decay=0.1),
}
SCHEDULES: dict[str, Callable[..., Any]] = {
    "none": lambda opt: None,
    "one-cycle": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.02, total_steps=STEPS + 1),
    "cosine": lambda opt, steps=STEPS: lr_scheduler.CosineAnnealingLR(opt, steps, eta_min=0.001),
    "warm-restarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 7, eta_min=0.001),
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "lambda-list": lambda opt: lr_scheduler.LambdaLR(opt, [lambda s: 1 / (1 + s), lambda s: 0.9**s]),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5, min_lr=0.001),
    "cyclic": lambda opt: lr_scheduler.CyclicLR(opt, 0.001, 0.02, 3, cycle_momentum=False),
    "sequential": warm_then_cosine,
    "linear": lambda opt: lr_scheduler.LinearLR(opt, 0.1, total_iters=9),
}


class Noisy(ResNet):
    """Draws its data in every step: the Trainer restores neither random states nor the place in the data."""

    def __init__(self, optimizer: str, schedule: str, losses: str) -> None:
        super().__init__(**SHAPE)
        self.names, self.losses = (optimizer, schedule), Path(losses)

    def training_step(self, batch: Any) -> Tensor:
        torch.manual_seed(self.global_step)
        loss = super().training_step((torch.randn(8, 3), torch.randn(8, 2)))
        self.loss = float(loss.detach())
        return loss

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(*([self.loss] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with self.losses.open("a") as file:
            file.write(f"{self.global_step} {self.loss.hex()}\n")

    def configure_optimizers(self) -> Any:
        optimizer, schedule = self.names
        first, second = [*self.embed.parameters()], [*self.blocks.parameters(), *self.readout.parameters()]
        made = OPTIMIZERS[optimizer]([{"params": first}, {"params": second}])
        scheduler = SCHEDULES[schedule](made)
        if scheduler is None:
            return made
        # the Trainer lets the others have their step before it writes a checkpoint, and those that wait for metrics after
        config = {"scheduler": scheduler, "interval": "step", "reduce_on_plateau": False}
        return {"optimizer": made, "lr_scheduler": config}


class Killed(Callback):  # lets another process kill this one, some seconds after some steps
    def __init__(self, steps: int, seconds: float) -> None:
        self.steps, self.seconds = steps, seconds

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.steps -= 1
        if self.steps == 0 and os.fork() == 0:
            time.sleep(self.seconds)
            os.kill(os.getppid(), signal.SIGKILL)
            os._exit(0)
        if trainer.global_step == STEPS:
            time.sleep(60)  # it will come


def newest(folder: Path) -> Path | None:
    found = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem))
    return found[-1] if found else None


def run(folder: Path, optimizer: str, schedule: str, residual: Any, kill: tuple[int, float] | None) -> None:
    """Train to the end, and keep what came out."""
    checkpoint, recording = newest(folder), folder / "run.safetensors"
    torch.manual_seed(0)
    module, base = Noisy(optimizer, schedule, str(folder / "losses")), ResNet(**BASE)
    probe = (torch.ones(4, 3), torch.ones(4, 2))
    saving = ModelCheckpoint(str(folder), "{step}", save_top_k=-1, every_n_train_steps=2, auto_insert_metric_name=False)
    callbacks = [MLUCallback(base, residual=residual, example=probe), ReferenceRecorder(recording, probe, steps=1)]
    callbacks += [saving] if kill is None else [Killed(*kill), saving]
    trainer = quiet(*callbacks, max_steps=STEPS, enable_checkpointing=True)
    trainer.fit(module, DataLoader(range(STEPS)), ckpt_path=checkpoint)
    schedulers = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    end = {"weights": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict(), "scheduler": schedulers}
    torch.save(end, folder / "end.pt")
