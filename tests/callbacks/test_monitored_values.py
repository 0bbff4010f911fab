"""What watches a run logs now and then, and callbacks and schedulers monitor it all the time, also after resuming."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.runs_by_hand import BASE, Net, fit
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import optim

from mlu_lightning import MLUCallback
from mlu_lightning.callbacks import EmbeddingDistance, FeatureUpdate, ReferenceRecorder

EPOCHS = 10  # of 6 steps; what watches them logs at 0, 1, 2, 4, 8, 16, 32 and 60


class Seen(Callback):  # keeps what there is to be monitored at the end of each epoch, and the learning rate
    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float], float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("mlu/")}
        self.seen.append((trainer.global_step, values, trainer.optimizers[0].param_groups[0]["lr"]))


class Plateaus(Net):  # with a learning rate that depends on what is logged
    monitor = ""

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([*self.parameters()])
        scheduler = optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.75, patience=0)
        # not at the end of an epoch, where Lightning saves before the scheduler has its step
        plan = {"scheduler": scheduler, "monitor": self.monitor, "interval": "step", "frequency": 5}
        return {"optimizer": optimizer, "lr_scheduler": plan}


WATCHERS: dict[str, tuple[str, Callable[[Path], Callback]]] = {
    "distance": ("mlu/distance/output", lambda path: EmbeddingDistance(path, ["gram", "output"])),
    "update": ("mlu/update/output", lambda path: FeatureUpdate()),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "reference.safetensors"
    fit(Net((4, 8, 32)), MLUCallback(Net(BASE)), ReferenceRecorder(path), max_epochs=EPOCHS)
    return path


@pytest.mark.parametrize("epoch", [2, 5])
@pytest.mark.parametrize("watcher", WATCHERS)
def test_resumed_run_is_monitored_as_the_whole(watcher: str, epoch: int, reference: Path, tmp_path: Path) -> None:
    monitor, watch = WATCHERS[watcher]

    def run(ckpt_path: Path | None = None) -> tuple[Any, ...]:
        module, seen, stopping = Plateaus(), Seen(), EarlyStopping(monitor, patience=6)
        module.monitor = monitor
        best = ModelCheckpoint(tmp_path / "best", "{epoch}", monitor=monitor, save_top_k=2)
        every = ModelCheckpoint(tmp_path / "every", "{epoch}", save_top_k=-1)
        callbacks = MLUCallback(Net(BASE)), watch(reference), seen, stopping, best, every
        settings = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0, "enable_checkpointing": True}
        fit(module, *callbacks, ckpt_path=ckpt_path, **settings)
        stopped = stopping.stopped_epoch, stopping.wait_count, stopping.best_score
        return module.losses, seen.seen, best.best_k_models, best.best_model_path, stopped

    losses, seen, *whole = run()
    shutil.rmtree(tmp_path / "best")  # where Lightning would give other names to checkpoints
    again, seen_again, *resumed = run(tmp_path / "every" / f"epoch={epoch}.ckpt")
    assert seen_again == seen[epoch + 1 :] != []
    assert seen[epoch + 1][1] == seen[epoch][1], "nothing is logged in the first epoch after the checkpoint"
    assert again == losses[6 * (epoch + 1) :] and len({rate for _, _, rate in seen}) > 1 and resumed == whole
    assert 0 < resumed[-1][0] < EPOCHS - 1, "it is stopped early"
