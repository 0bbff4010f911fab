"""Measure one run of a check: train a module in its Trainer, and see what moves and what moves it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from mlu_lightning.application import folded_parameters
from mlu_lightning.callbacks.mlu_callback import MLUCallback
from mlu_lightning.checking.local_effects import find_readers, local_effects, rms, value_effects
from mlu_lightning.checking.preparation import Batches, make_trainer
from mlu_lightning.checking.quantities import Kind, Quantity, expected_size
from mlu_lightning.checking.shrinkage import restored, shrinkage
from mlu_lightning.observation import (
    FeatureName,
    Location,
    LocationName,
    Observation,
    OutputName,
    StreamName,
    locate,
    locate_features,
    observe,
    rms_change,
)
from mlu_lightning.observation.dataflow import ADDED
from mlu_lightning.observation.expectations import Expectations
from mlu_lightning.observation.passes import Followed, follow
from mlu_lightning.planning import Plan
from mlu_lightning.table import Ratios, Role, Variant, row_name
from mlu_lightning.utilities.names import name_pattern, planned_parameters


@dataclass(frozen=True)
class Measurement:
    """A quantity of one run over its expected size, at every depth: constant in the limit of large networks."""

    quantity: Quantity
    values: tuple[float, ...]
    depths: tuple[float, ...] = ()  # relative ones of the values, if these depend on it
    may_be_still: bool = False  # whether it may be right not to move, as for a stream that begins with the data


@dataclass(frozen=True)
class Measured:
    """Everything that was measured in one run."""

    measurements: tuple[Measurement, ...]
    stream_sizes: Mapping[str, float]  # root mean square of each stream at its end, before the first step
    followed: Followed | None = None  # what its first pass did with parameters


def measure(
    module: LightningModule,
    plan: Plan,
    callbacks: Sequence[Callback],
    batches: Sequence[Any],
    probe: Any,
    steps: int,
    trainer: Mapping[str, Any],
    datamodule: LightningDataModule | None = None,
    followed: Followed | None = None,
) -> Measured:
    """Train a freshly built module on batches, and measure it before the first step, before the last and after it.

    ``training_step`` is run in evaluation mode on ``probe``. A pass that was ``followed`` at this shape with other
    weights is reused where parameters are used as they are.
    """
    for callback in callbacks:
        if isinstance(callback, MLUCallback):
            callback.verify = False  # what is wrong is to be measured
    watch = _Watch(plan, probe, steps, followed)
    fitting = make_trainer([*callbacks, watch], steps, trainer)
    if datamodule is None:
        fitting.fit(module, Batches(batches))
    else:
        vars(datamodule)["train_dataloader"] = lambda: Batches(batches)
        try:
            fitting.fit(module, datamodule=datamodule)
        finally:
            del vars(datamodule)["train_dataloader"]
    if fitting.global_step < steps:
        raise ValueError(
            f"A run made {fitting.global_step} of {steps} steps. Leave out what stops it, a callback or an argument of the "
            "Trainer such as fast_dev_run."
        )
    return watch.measured()


class _Watch(Callback):
    """Measures a module while it is trained."""

    def __init__(self, plan: Plan, probe: Any, steps: int, followed: Followed | None) -> None:
        super().__init__()
        self._plan = plan
        learned = (item for item in plan.parameters.items() if item[1].role is not Role.FROZEN)
        self._rows = {name: parameter.row for name, parameter in learned}
        self._probe = probe
        self._followed = followed if followed is not None and followed.is_plain else None
        self._steps = steps
        self._readers = {reader.parameter: reader for reader in find_readers(plan)}
        features = locate_features(plan.features, plan.branches)
        self._locations = locate(plan.taps, [stream.depth for stream in plan.streams], (0, 1)) + features
        self._feature_depths = {
            location.name: tap.position / plan.streams[plan.branches[tap.number].stream].depth
            for location, tap in zip(features, plan.features, strict=True)
        }
        self._found: dict[Quantity, list[float]] = defaultdict(list)
        self._depths: dict[Quantity, list[float]] = defaultdict(list)
        self._start: dict[str, Tensor] = {}
        self._before: Observation = {}
        self._decayed = False
        self._reached: set[str] = set()  # parameters that had a gradient

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = {name: parameter.detach().clone() for name, parameter in planned_parameters(pl_module).items()}
        self._before = self._observe(pl_module)
        self._add_start(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._decayed or trainer.global_step < self._steps - 1:
            return
        self._decayed = True  # schedules may end at a learning rate of zero, so not after the last step
        named = planned_parameters(pl_module).items()
        parameters = {name: parameter for name, parameter in named if parameter.requires_grad}
        for name, part in shrinkage(trainer.optimizers, parameters).items():
            self._add(Kind.DECAY, name, part)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        for name, parameter in planned_parameters(pl_module).items():
            if name not in self._reached and parameter.grad is not None and parameter.grad.any():
                self._reached.add(name)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._add_updates(pl_module)
        after = self._observe(pl_module)
        for name, values in after.items():
            quantity = _quantity_at(name)
            self._found[quantity].append(rms_change(self._before[name], values))
            if name in self._feature_depths:
                self._depths[quantity].append(self._feature_depths[name])
        ends: dict[LocationName, Kind] = {name: Kind.EFFECT_ON_OUTPUT for name in after if isinstance(name, OutputName)}
        ends |= {name: Kind.EFFECT_ON_STREAM for name in after if _is_end(name)}
        for row in dict.fromkeys(self._rows.values()):
            without = self._observe_without(row, pl_module, [place for place in self._locations if place.name in ends])
            for name, effect in ends.items():
                moves = rms_change(without[name], after[name])
                if moves > 0:  # what comes after a stream has no effect on it
                    self._found[Quantity(effect, row, row)].append(moves)

    def measured(self) -> Measured:
        starts = {_quantity_at(name) for name in self._before if isinstance(name, StreamName) and name.depth == 0}
        measurements = tuple(
            Measurement(quantity, tuple(values), tuple(self._depths.get(quantity, ())), quantity in starts)
            for quantity, values in self._found.items()
        )
        ends = {str(name): rms(values) for name, values in self._before.items() if _is_end(name)}
        return Measured(measurements, ends, self._followed)

    def _observe(self, module: LightningModule, locations: Sequence[Location] | None = None) -> Observation:
        """Observe the module, whose step may change parameters, such as those of a teacher that follows."""
        locations = self._locations if locations is None else locations
        return observe(module, self._probe, locations, "training_step", restore_parameters=True)

    def _observe_without(self, row: str, module: LightningModule, locations: Sequence[Location]) -> Observation:
        """Observe the module with the parameters of one row of the table as they were at the start."""
        parameters = planned_parameters(module)
        of_row = {name: parameter for name, parameter in parameters.items() if self._rows.get(name) == row}
        with restored(of_row):
            with torch.no_grad():
                for name, parameter in of_row.items():
                    parameter.copy_(self._start[name])
            return self._observe(module, locations)

    def _add_start(self, module: LightningModule) -> None:
        """Add what every use of a parameter maps or adds, constants on its way included, and branches without a plan."""
        expectations, folded = Expectations(self._plan), folded_parameters(module)
        self._followed = found = self._followed or follow(module, self._probe, self._plan.roles)
        for (names, how), uses in found.uses.items():
            name, ends = expectations.parameter(names, how), {end for use in uses for end in use.constants}
            if name is None:
                continue
            entry, last = self._plan.parameters[name], expectations.is_last(name, ends)
            row, ratios = (entry.role, entry.variant), entry.ratios
            grown = rms(self._start[name]) / found.sizes[name] if found.sizes[name] else 1.0
            if how == "matrix" and expectations.is_tied_readout(name):
                row, ratios = (Role.READOUT, None), Ratios(inputs=entry.fans[1] / entry.base_fans[1])
            each = math.sqrt(ratios.active) if how == "matrix" else 1.0  # of the experts that make a sum
            for use in uses:
                for end, constant in use.constants.items():
                    size = use.size * grown * math.sqrt(use.inputs) * constant * each
                    if 0 < size < math.inf and (not last or end in ADDED):  # what is zero has no size to scale
                        expected = expected_size(Kind.START, *row, ratios, last or name in folded)
                        self._found[Quantity(Kind.START, name_pattern(name), row_name(*row))].append(size / expected)
        missed = [added for added in found.additions if added.on_stream and expectations.added(added.names) is None]
        number = Counter(added.patterns for added in missed)
        for added in missed:
            quantity = Quantity(Kind.START, f"a branch of {', '.join(sorted(added.patterns)[:2]) or 'no parameters'}")
            self._found[quantity].append(added.constant * number[added.patterns])

    def _add_updates(self, module: LightningModule) -> None:
        """Add what every parameter does where it acts because it was updated."""
        readers, parameters = tuple(self._readers.values()), planned_parameters(module)
        start = self._start | dict(self._rescaled(parameters))
        effects = local_effects(module, readers, start, lambda: self._observe(module, locations=()))
        # experts without tokens are not read, as others beside them are
        read = {(name_pattern(name), self._rows[name]) for name in effects if name in self._rows}
        unread = [name for name in self._rows if (name_pattern(name), self._rows[name]) not in read]
        effects |= value_effects(self._plan, unread, parameters, start)
        acting = {name_pattern(name) for name, effect in effects.items() if effect}
        for name, effect in effects.items():
            idle = name not in self._reached or not torch.equal(parameters[name], self._start[name])
            if not effect and idle and name_pattern(name) in acting:
                continue  # an expert beside others, that no token was sent to in training, or none of the probe
            self._add(Kind.UPDATE, name, effect, name in self._readers and self._readers[name].multiplied)

    def _rescaled(self, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Starts of gains between additions as large as they are now: the next norm undoes a scale, as that of decay."""
        for name, start in self._start.items():
            if name in self._rows and self._plan.parameters[name].variant is Variant.POST_NORM and start.any():
                yield name, start * (parameters[name].detach().mul(start).sum() / start.square().sum())

    def _add(self, kind: Kind, name: str, value: float, multiplied: bool = False) -> None:
        parameter = self._plan.parameters[name]
        if parameter.role is Role.FROZEN:
            return
        expected = expected_size(kind, parameter.role, parameter.variant, parameter.ratios, multiplied)
        self._found[Quantity(kind, name_pattern(name), parameter.row)].append(value / expected)


def _is_end(name: LocationName) -> bool:
    return isinstance(name, StreamName) and name.depth == 1


def _quantity_at(name: LocationName) -> Quantity:
    if isinstance(name, FeatureName):
        return Quantity(Kind.FEATURES, f"{name_pattern(name.branch)} ({name.kind})")
    return Quantity(Kind.OUTPUT if isinstance(name, OutputName) else Kind.STREAM, str(name))
