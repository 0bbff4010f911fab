"""A training of a few milliseconds to be tuned, which can fail, and the studies of it."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule

from mlu_lightning import MLUCallback
from mlu_lightning.models import ResNet
from mlu_lightning.tuning import Tuning, tune

INPUTS = torch.randn(8, 6, 3, generator=torch.Generator().manual_seed(0))
BATCHES = [(x, torch.stack((x[:, 0] * x[:, 1], x[:, 2]), 1)) for x in INPUTS]
DATA = (BATCHES, BATCHES[:2])
TRAINER = {"max_steps": 8, "accelerator": "cpu"}


class Small(ResNet):  # its learning rate is far too small
    def __init__(self, depth: int = 1, hidden: int = 4, embedding: int = 4, lr: float = 2**-8) -> None:
        super().__init__(depth, hidden, embedding, inputs=3, outputs=2, lr=lr)


class Spoiled(Small):  # a metric that is NaN with whatever factors but none
    def validation_step(self, batch: Any) -> torch.Tensor:
        loss = super().validation_step(batch)
        changed = self.trainer.callbacks[0].plan.tuned  # type: ignore[attr-defined]
        self.log("spoiled", loss if not changed else loss * float("nan"))
        self.log("never", loss * float("nan"))
        return loss


class Raises(Callback):  # a user's callback that fails when a file says so
    def __init__(self, error: type[BaseException], counter: Path, after: int) -> None:
        self.error, self.counter, self.after = error, counter, after

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        before = int(self.counter.read_text()) if self.counter.exists() else 0
        self.counter.write_text(str(before + 1))
        if before >= self.after:
            raise self.error("out of luck")


class Failing:
    """Callbacks that fail after so many trainings."""

    def __init__(self, error: type[BaseException], counter: Path, after: int) -> None:
        self.made = error, counter, after

    def __call__(self, base: LightningModule) -> list[Callback]:
        return [MLUCallback(base), Raises(*self.made)]


def tuned(folder: Path, **changes: Any) -> Tuning:
    settings: dict[str, Any] = {"trials": 4, "seeds": 1, "trainer": TRAINER, "out": folder, "roles": ["embedding"]}
    return tune(changes.pop("build", Small), changes.pop("data", DATA), **settings | changes)
