"""Callbacks of Lightning next to MLUCallback, before and after it: the run is that of the table's numbers by hand."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import runs_by_hand
from helpers.optimizers_by_hand import Averaging
from helpers.runs_by_hand import BASE, ByHand, Net, Residual, Start, listed
from lightning.pytorch import Callback, Trainer
from lightning.pytorch import callbacks as others
from lightning.pytorch.loggers import CSVLogger

from mlu_lightning import MLUCallback
from mlu_lightning.application.state_mark import without_mark


def fit(module: Net, *callbacks: Callback, **settings: Any) -> Trainer:
    return runs_by_hand.fit(module, *callbacks, **{"max_epochs": 3} | settings)


@dataclass(frozen=True)
class Case:
    """A callback, given a folder, what else it leaves than losses, weights and rates, and one more that comes after it."""

    make: Callable[[Path], Callback]
    found: Callable[[Any], Any] = lambda callback: None
    settings: Callable[[Path], dict[str, Any]] = field(default=lambda folder: {"default_root_dir": folder})
    beside: Callable[[], Callback] | None = None


def average(callback: Any) -> dict[str, Any]:
    return without_mark(callback._average_model.state_dict())


def checkpoints(callback: others.ModelCheckpoint) -> dict[str, Any]:
    paths = sorted(Path(str(callback.dirpath)).glob("*.ckpt"))
    loaded = {path.name: torch.load(path, weights_only=True) for path in paths}
    best = Path(callback.best_model_path).name
    return {
        "best": best,
        **{name: (without_mark(saved["state_dict"]), saved["optimizer_states"]) for name, saved in loaded.items()},
    }


pruning = partial(others.ModelPruning, "l1_unstructured", amount=0.1)
ONLY = {"use_lottery_ticket_hypothesis": False}
finetuning = partial(others.BackboneFinetuning, backbone_initial_lr=0.004, verbose=False)
CASES = {
    "ema": Case(lambda folder: others.EMAWeightAveraging(decay=0.5), average),
    "ema-late": Case(lambda folder: others.EMAWeightAveraging(decay=0.5, update_starting_at_step=15), average),
    "weight-averaging": Case(lambda folder: others.WeightAveraging(), average),
    "swa": Case(lambda folder: others.StochasticWeightAveraging(0.01, 2, annealing_epochs=2), average),
    "lr-finder": Case(
        lambda folder: others.LearningRateFinder(num_training_steps=8, early_stop_threshold=None),
        lambda callback: (callback.optimal_lr.results, callback.optimal_lr.suggestion(0, 0)),
    ),
    "batch-size-finder": Case(
        lambda folder: others.BatchSizeFinder(steps_per_trial=2, init_val=2, max_trials=2),
        lambda callback: callback.optimal_batch_size,
    ),
    "accumulation": Case(lambda folder: others.GradientAccumulationScheduler({0: 1, 1: 3})),
    "lr-monitor": Case(
        lambda folder: others.LearningRateMonitor("step", log_weight_decay=True),
        lambda callback: [*callback.lrs.values(), *callback.last_weight_decay_values.values()],
        lambda folder: {"logger": CSVLogger(folder), "log_every_n_steps": 1},
    ),
    "checkpoint": Case(
        lambda folder: others.ModelCheckpoint(str(folder), monitor="val_loss", save_top_k=2),
        checkpoints,
        lambda folder: {"enable_checkpointing": True},
    ),
    "finetuning": Case(lambda folder: finetuning(1)),
    "pruning": Case(lambda folder: pruning()),
    "pruning-only": Case(lambda folder: pruning(**ONLY)),
    "pruning-each": Case(lambda folder: pruning(use_global_unstructured=False, **ONLY)),
    "finetuning-pruned": Case(lambda folder: finetuning(2), beside=lambda: pruning(**ONLY)),
}


def outcome(module: Net, trainer: Trainer, callback: Callback, case: Case) -> dict[str, Any]:
    (optimizer,) = trainer.optimizers
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {
        "losses": module.losses,
        "validated": module.validated,
        "weights": listed(without_mark(module.state_dict())),
        "groups": listed(groups),
        "state": listed(optimizer.state_dict()["state"]),
        "else": listed(case.found(callback)),
    }


def compare_with_numbers_by_hand(case: Case, first: bool, residual: Residual, folder: Path, make: Any = Net) -> Any:
    """Bit for bit, because ratios are powers of two; what was compared."""
    outcomes = []
    ours, start = MLUCallback(Net(BASE), residual=residual), Start()
    for module in (make(), ByHand(residual)):
        place = folder / type(module).__name__
        callback = case.make(place)
        callbacks = [callback] if case.beside is None else [callback, case.beside()]
        if isinstance(module, ByHand):
            module.load_state_dict(start.weights)
        else:
            callbacks = [*callbacks, ours, start] if first else [ours, start, *callbacks]
        trainer = fit(module, *callbacks, **case.settings(place))
        outcomes.append(outcome(module, trainer, callback, case))
    scaled, by_hand = outcomes
    for what, values in by_hand.items():
        assert scaled[what] == values, what
    assert len(by_hand["losses"]) > 8 and by_hand["validated"]
    return by_hand


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The finder of batch sizes collects garbage between its trials, which takes seconds in a process with much in it."""
    monkeypatch.setattr("lightning.pytorch.tuner.batch_size_scaling.garbage_collection_cuda", lambda: None)


ORDERS = [
    pytest.param(True, "hook", id="before-hook"),
    pytest.param(False, "fold", id="after-fold"),
    pytest.param(True, "fold", id="before-fold", marks=pytest.mark.slow),
    pytest.param(False, "hook", id="after-hook", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("first", "residual"), ORDERS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_run_is_that_of_numbers_by_hand(case: Case, first: bool, residual: Residual, tmp_path: Path) -> None:
    compare_with_numbers_by_hand(case, first, residual, tmp_path)


class WithSetup(Net):  # is prepared when its setup is done, after callbacks have copied it
    def setup(self, stage: str) -> None: ...


class InConfigureModel(Net):
    def build(self) -> None: ...

    def configure_model(self) -> None:
        if not hasattr(self, "embed"):
            super().build()


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("name", "make"), [("ema-late", WithSetup), ("ema-late", InConfigureModel), ("pruning", WithSetup)]
)
def test_copies_are_of_the_initialized_module(name: str, make: type[Net], first: bool, tmp_path: Path) -> None:
    compare_with_numbers_by_hand(CASES[name], first, "fold", tmp_path, make)


def test_learning_rates_that_are_logged_are_the_users(tmp_path: Path) -> None:
    rates, decay = compare_with_numbers_by_hand(CASES["lr-monitor"], False, "hook", tmp_path)["else"]
    assert rates == [0.02 * 0.5**epoch for epoch in range(3) for _ in range(6)] and decay == 0.1


@pytest.mark.parametrize(("first", "residual"), ORDERS)
@pytest.mark.parametrize("name", ["ema", "swa", "finetuning"])
def test_resumed_run_is_that_of_numbers_by_hand(name: str, first: bool, residual: Residual, tmp_path: Path) -> None:
    """And the whole run, except with fine-tuning, which does not go on as it was in Lightning itself."""
    case, start, outcomes = CASES[name], Start(), []
    for make in (Net, lambda: ByHand(residual)):
        folder = tmp_path / str(len(outcomes))
        for ckpt_path in (None, folder / "epoch=1.ckpt"):
            module, callback = make(), case.make(folder)
            callbacks = [callback]
            if isinstance(module, ByHand):
                module.load_state_dict(start.weights)
            else:
                ours = MLUCallback(Net(BASE), residual=residual)
                callbacks = [callback, ours] if first else [ours, callback]
                callbacks += [start] if ckpt_path is None else []
            saving = others.ModelCheckpoint(str(folder), "{epoch}", save_top_k=-1)
            settings = {"num_sanity_val_steps": 0, "enable_checkpointing": True}
            trainer = fit(module, *callbacks, saving, ckpt_path=ckpt_path, **settings)
            outcomes.append(outcome(module, trainer, callback, case))
    whole, resumed, _, by_hand = outcomes
    assert resumed == by_hand and resumed["losses"][0] == whole["losses"][12]
    if name != "finetuning":
        assert resumed == whole | {what: whole[what][-len(resumed[what]) :] for what in ("losses", "validated")}


class Averaged(Net):
    def configure_optimizers(self) -> Averaging:
        return Averaging(self.parameters(), lr=0.02)


class Fails(Callback):
    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 12:
            raise OverflowError("in the run")


@pytest.mark.parametrize("when", ["after the fit", "on an exception"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_what_an_optimizer_keeps_is_saved_when_the_fit_is_over(when: str, first: bool, tmp_path: Path) -> None:
    whole, part, resumed = Averaged(), Averaged(), Averaged()
    fit(whole, MLUCallback(Averaged(BASE), family="sgd"), num_sanity_val_steps=0)
    mlu = MLUCallback(Averaged(BASE), family="sgd")
    settings = {"num_sanity_val_steps": 0, "enable_checkpointing": True}
    if when == "after the fit":
        path = tmp_path / "after.ckpt"
        saving = others.ModelCheckpoint(str(tmp_path), every_n_epochs=9)
        fit(part, *([saving, mlu] if first else [mlu, saving]), max_epochs=2, **settings).save_checkpoint(path)
    else:
        saving = others.ModelCheckpoint(str(tmp_path), every_n_epochs=9, save_on_exception=True)
        with pytest.raises(OverflowError, match="in the run"):
            fit(part, Fails(), *([saving, mlu] if first else [mlu, saving]), **settings)
        (path,) = tmp_path.glob("*.ckpt")
    mlu = MLUCallback(Averaged(BASE), family="sgd")
    fit(resumed, mlu, ckpt_path=path, num_sanity_val_steps=0)
    assert len(part.losses) == 12 and part.losses + resumed.losses == whole.losses


def test_weights_drawn_anew_are_refused() -> None:
    module = Net()
    with pytest.raises(ValueError, match=r"resample_parameters=True.* Leave resample_parameters at False"):
        fit(module, MLUCallback(Net(BASE)), pruning(resample_parameters=True))
    assert all(map(torch.equal, module.parameters(), Net().parameters()))
