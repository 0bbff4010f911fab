"""Somebody else's training: the PatchTST forecaster of GluonTS, with one callback more.

Model, loss, optimizer, gradient clipping, sampling and Trainer are those of GluonTS, which knows nothing of MLU, and the
series are from its generator. All that is added is ``trainer_kwargs={"callbacks": [MLUCallback(...)]}``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gluonts.dataset.artificial import ComplexSeasonalTimeSeries
from gluonts.dataset.common import ListDataset
from gluonts.torch.model.estimator import TrainOutput
from gluonts.torch.model.patch_tst import PatchTSTEstimator
from lightning.pytorch import Callback, seed_everything
from torch import Tensor

from mlu_lightning import MLUCallback
from mlu_lightning.quickstart.results import loss_table, save_figure, verdicts
from mlu_lightning.quickstart.study import BASE, Run, Study, TransformerShape
from recipes.common.studies import QUIET, check_command, console, in_processes, save_points, study_command

SHAPES = {
    BASE: TransformerShape(depth=2, heads=2, mlp_hidden=64, embedding=16),
    "8 × depth": TransformerShape(depth=16, heads=2, mlp_hidden=64, embedding=16),
    "8 × MLP width": TransformerShape(depth=2, heads=2, mlp_hidden=512, embedding=16),
    "8 × embedding": TransformerShape(depth=2, heads=16, mlp_hidden=64, embedding=128),
}
"""Shapes by name. In PyTorch's encoder heads are parts of the embedding, so that they grow with it; they stay 8 wide."""
POSITIONS = {"model.positional_encoding.weight": "embedding"}
"""Role of the sinusoidal positions, a frozen parameter that autograd never sees."""
HORIZON, EPOCHS = 16, 4


@dataclass(frozen=True)
class Training:
    """One training."""

    shape: str
    mlu: bool
    exponent: int  # of the learning rate, a power of two
    seed: int  # of weights, windows and dropout
    batches: int  # of each of the 4 epochs
    loss: float = math.nan  # on validation after the last epoch, nats per time step; NaN if the training broke off


def run(output: str = "forecasting", workers: int = 2, seeds: int = 2, quick: bool = False) -> None:
    """Train all shapes at all learning rates, with the callback and without, and report the best learning rates.

    Args:
        output: folder of the losses and the figure.
        workers: number of trainings at a time, each on one core.
        seeds: trainings of every kind, over whose losses the mean is taken.
    """
    check_command(workers, seeds)
    exponents, batches = ((-7,), 1) if quick else ((-11, -10, -9, -8, -7, -6, -5), 50)
    cases = [
        Training(shape, callback, exponent, seed, batches)
        for shape in SHAPES
        for callback in ((False,) if shape == BASE else (True, False))
        for exponent in exponents
        for seed in range(seeds)
    ]
    terminal, folder = console(120), Path(output)
    trainings = in_processes(train, cases, workers, "trainings", terminal)
    save_points(trainings, folder / "trainings.csv")
    study = Study(SHAPES, exponents, steps=EPOCHS * batches)
    runs = _means(trainings, seeds)
    terminal.print(
        "Validation loss (nats per time step) by learning rate; * marks the least of a row.", highlight=False
    )
    terminal.print(loss_table(study, runs))
    for verdict in verdicts(study, runs):
        terminal.print(verdict, highlight=False)
    save_figure(study, runs, folder / "forecasting.png", "validation loss (nats per time step)")
    terminal.print(f"Wrote {folder / 'forecasting.png'}.", highlight=False, soft_wrap=True)


def train(case: Training) -> Training:
    """Train a forecaster, and return the training with its loss."""
    warnings.simplefilter("ignore")
    callbacks = [mlu()] if case.mlu else []
    seed_everything(case.seed, verbose=False)
    trainer = training(SHAPES[case.shape], 2.0**case.exponent, case.batches, callbacks).trainer
    # GluonTS goes back to the best weights when a training breaks off, and does not say so
    return case if trainer.interrupted else replace(case, loss=float(trainer.callback_metrics["val_loss"]))


def training(shape: TransformerShape, lr: float, batches: int, callbacks: Sequence[Callback] = ()) -> TrainOutput:
    """Train a forecaster as any user of GluonTS would."""
    with TemporaryDirectory() as folder:
        options = {"max_epochs": EPOCHS, "callbacks": list(callbacks), "default_root_dir": folder, "accelerator": "cpu"}
        trained: TrainOutput = estimator(shape, lr, batches, **options, **QUIET).train_model(*series())
    return trained


def mlu() -> MLUCallback:
    """Make the callback, with the base at which the learning rate is known to be good.

    The example is given because training data are a stream that goes on where it was left: without it there is a warning,
    and the training begins a few batches later. A predictor is saved as its weights, which hold their multipliers.
    """
    base = estimator(SHAPES[BASE], lr=0.0, batches=1).create_lightning_module()
    return MLUCallback(base, overrides=POSITIONS, example=first_batch())


def first_batch() -> dict[str, Tensor]:
    """Take a batch from a stream of its own."""
    small = estimator(SHAPES[BASE], lr=0.0, batches=1)
    data = small.create_transformation().apply(series()[0], is_train=True)
    (batch,) = small.create_training_data_loader(data, small.create_lightning_module())
    return dict(batch)


def estimator(shape: TransformerShape, lr: float, batches: int, **trainer: Any) -> PatchTSTEstimator:
    """Make PatchTST with norms in front of branches, as the theory has them."""
    return PatchTSTEstimator(
        prediction_length=HORIZON,
        context_length=64,
        patch_len=8,
        d_model=shape.embedding,
        nhead=shape.heads,
        dim_feedforward=shape.mlp_hidden,
        num_encoder_layers=shape.depth,
        norm_first=True,
        scaling="std",
        lr=lr,
        num_batches_per_epoch=batches,
        trainer_kwargs=trainer,
    )


@cache
def series() -> tuple[ListDataset, ListDataset]:
    """Seasonal series with noise and levels of their own: for training, and with 16 more steps for validation."""
    made = ComplexSeasonalTimeSeries(num_series=200, prediction_length=HORIZON, length_low=200, length_high=400)
    return ListDataset(made.train, freq="D"), ListDataset(made.test, freq="D")


def _means(trainings: Sequence[Training], seeds: int) -> list[Run]:
    """Mean losses over seeds, which come one after the other."""
    groups = [trainings[first : first + seeds] for first in range(0, len(trainings), seeds)]
    return [
        Run(group[0].shape, group[0].mlu, group[0].exponent, math.fsum(one.loss for one in group) / seeds)
        for group in groups
    ]


main = study_command(run, "python -m recipes.forecasting.run")

if __name__ == "__main__":
    main()
