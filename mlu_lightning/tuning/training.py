"""One training of a search: the configured training with tuned factors, and its monitored metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.seed import isolate_rng

from mlu_lightning.callbacks.mlu_callback import MLUCallback
from mlu_lightning.checking.preparation import (
    Batches,
    first_batches,
    make_trainer,
    prepare,
    quiet,
    silent_trainer,
    transfer,
)
from mlu_lightning.planning import Plan
from mlu_lightning.planning.arguments import ABSOLUTE
from mlu_lightning.planning.tuned import Tuned

VALIDATIONS = 4  # validations of a training of which only the number of steps is known

Report = Callable[[int, float], bool]
"""Takes a percentage of the steps and the metric there, and says whether the training is to end."""


class UnknownMetric(ValueError):
    """What is monitored is not logged."""


@dataclass(frozen=True)
class Outcome:
    """What became of a training."""

    value: float  # of the metric at the end, or where it was stopped; NaN if it was NaN before
    percent: int  # of the steps that were made


@dataclass(frozen=True)
class Training:
    """What is trained, with any factors and seed."""

    make: Callable[[], tuple[LightningModule, Sequence[Callback]]]  # an :class:`MLUCallback` among the callbacks
    base: Callable[[], LightningModule]
    data: Any = None  # as :func:`mlu_lightning.tune` takes it
    metric: str = "val_loss"
    trainer: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the Trainer

    @classmethod
    def of(
        cls,
        build: Callable[[], LightningModule],
        base: Callable[[], LightningModule],
        callbacks: Callable[[LightningModule], Sequence[Callback]] | None = None,
        **more: Any,
    ) -> Training:
        """Describe a training whose callbacks are made from a module of the base, by default an MLUCallback alone."""
        return cls(_Parts(build, base, callbacks), base, **more)

    def plan(self) -> Plan:
        """Plan the module without tuned factors, or refuse callbacks without an untuned MLUCallback with a base."""
        module, callbacks = self.make()
        plugin = next((item for item in callbacks if isinstance(item, MLUCallback)), None)
        if plugin is None:
            raise ValueError(
                "There is no MLUCallback in this training, and tuned factors are part of its plan. Add one, with the base: "
                "MLUCallback(base=...)."
            )
        if plugin.arguments.base in (None, ABSOLUTE):
            raise ValueError(
                "The MLUCallback has no base, at which the factors would be tuned. Give it base=..., a module of the small "
                "shape (in YAML, a class_path with its init_args)."
            )
        if plugin.arguments.tuned:
            raise ValueError("The MLUCallback has tuned factors already. Leave them out, to search for them anew.")
        of_a_step = {name: self.trainer[name] for name in ("accelerator",) if name in self.trainer}
        with isolate_rng(), quiet():
            planning, data = make_trainer([], 1, of_a_step), self.data
            module, base = prepare(module, planning), prepare(self.base(), planning)
            batches = first_batches(data[0] if isinstance(data, tuple) else data, module, 1, 0)
            example = transfer(batches[0], data if isinstance(data, LightningDataModule) else module)
            return Plan.from_model(module, example, **{**vars(plugin.arguments), "base": base})

    def run(self, plan: Plan, tuned: Tuned, seed: int, report: Report = lambda percent, value: False) -> Outcome:
        """Train with factors and a seed; raise ``UnknownMetric`` if there is none, ``KeyboardInterrupt`` after Ctrl-C."""
        with isolate_rng(), quiet():
            seed_everything(seed, verbose=False)
            module, callbacks = self.make()
            watch = _Watch(self.metric, report)
            tuned_plan = replace(plan, tuned=tuned)
            planned = [item.with_plan(tuned_plan) if isinstance(item, MLUCallback) else item for item in callbacks]
            trainer = self._trainer([*planned, watch])
            try:
                trainer.fit(module, **self._loaders())
                if not watch.stopped and trainer.enable_validation and watch.validated < trainer.global_step:
                    trainer.validate(module, **self._loaders(("val_dataloaders", "dataloaders")), verbose=False)
            except SystemExit as error:
                raise KeyboardInterrupt from error
            if not watch.stopped:
                watch.end(trainer)
            return Outcome(watch.value, watch.percent)

    def _trainer(self, callbacks: list[Callback]) -> Trainer:
        settings = {**self.trainer}
        defaults = (("val_check_interval", (None, 1.0)), ("check_val_every_n_epoch", (None, 1)))
        by_default = all(settings.get(name) in values for name, values in defaults)
        if by_default and settings.get("max_steps", -1) > 0:
            batches = settings["max_steps"] * settings.get("accumulate_grad_batches", 1)
            settings |= {"val_check_interval": max(1, batches // VALIDATIONS), "check_val_every_n_epoch": None}
        return silent_trainer(callbacks, settings)

    def _loaders(self, names: tuple[str, str] = ("train_dataloaders", "val_dataloaders")) -> dict[str, Any]:
        if self.data is None:
            return {}
        if isinstance(self.data, LightningDataModule):
            return {"datamodule": self.data}
        parts = self.data if isinstance(self.data, tuple) else (self.data,)
        loaders = [Batches(part) if isinstance(part, list) else part for part in parts]
        if names[0] != "train_dataloaders":
            return {names[1]: loaders[1]} if len(loaders) > 1 else {}
        return dict(zip(names, loaders, strict=False))


@dataclass(frozen=True)
class _Parts:
    build: Callable[[], LightningModule]
    base: Callable[[], LightningModule]
    callbacks: Callable[[LightningModule], Sequence[Callback]] | None

    def __call__(self) -> tuple[LightningModule, Sequence[Callback]]:
        module, base = self.build(), self.base()
        return module, [MLUCallback(base)] if self.callbacks is None else self.callbacks(base)


class _Watch(Callback):
    """Reports the metric at every validation, or four times if there is none, and ends the training where it is told to."""

    def __init__(self, metric: str, report: Report) -> None:
        super().__init__()
        self._metric, self._report = metric, report
        self.value, self.percent, self.validated, self.stopped = math.nan, 0, -1, False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.validated = trainer.global_step
            self._look(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.enable_validation and _percent(trainer) * VALIDATIONS // 100 > self.percent * VALIDATIONS // 100:
            self._look(trainer)

    def end(self, trainer: Trainer) -> None:
        metrics = trainer.callback_metrics
        if self._metric not in metrics:
            raise UnknownMetric(
                f"The module logs no {self._metric!r}, which is to be tuned. It logs {', '.join(metrics) or 'nothing'}: "
                "name one of them with metric (--metric), or log it in validation_step: self.log('val_loss', loss)."
            )
        self.value, self.percent = float(metrics[self._metric]), 100

    def _look(self, trainer: Trainer) -> None:
        percent = _percent(trainer)
        if self._metric not in trainer.callback_metrics or percent >= 100 or percent <= self.percent:
            return
        self.value, self.percent = float(trainer.callback_metrics[self._metric]), percent
        if math.isnan(self.value) or self._report(percent, self.value):
            self.stopped = trainer.should_stop = True


def _percent(trainer: Trainer) -> int:
    steps = trainer.estimated_stepping_batches
    return int(100 * trainer.global_step / steps) if math.isfinite(steps) and steps > 0 else 0
