"""Train a module for a few steps as its Trainer does, and measure what moves and what moves it."""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

from mlu_lightning.checking.local_effects import find_readers, local_effects, rms, value_effects
from mlu_lightning.checking.quantities import Kind, Quantity, expected_powers
from mlu_lightning.checking.shrinkage import shrinkage
from mlu_lightning.discovery.structure import Tap
from mlu_lightning.observation import LocationName, Observation, locate, locate_features, observe
from mlu_lightning.observation import rms_change as moved
from mlu_lightning.planning.plan import Plan
from mlu_lightning.table import Role, Variant, row_name
from mlu_lightning.utilities.names import name_pattern, planned_parameters

__all__ = ["Batches", "Measurement", "make_trainer", "measure", "quiet"]


@dataclass(frozen=True)
class Measurement:
    """A quantity in one run, at every place along the depth where it is.

    Args:
        quantity: what was measured.
        values: over what it is expected to grow as: constant in the limit of large networks.
        depths: relative depths s of these places, ascending, if values depend on it. How far pre-activations move does,
            because the stream before them has moved, too: in the block at s = 0, the only one of the shallowest network,
            less than further up. Empty otherwise.
    """

    quantity: Quantity
    values: tuple[float, ...]
    depths: tuple[float, ...] = ()


def measure(
    module: LightningModule,
    plan: Plan,
    callbacks: Sequence[Callback],
    batches: Sequence[Any],
    probe: Any,
    steps: int,
    trainer: Mapping[str, Any],
    datamodule: LightningDataModule | None = None,
) -> tuple[Measurement, ...]:
    """Train a module, and measure it before the first step, before the last and after it.

    Args:
        module: freshly built.
        plan: of the module, for ratios and where to read; none of its factors are used.
        callbacks: of the Trainer.
        batches: to train on.
        probe: batch on which effects are measured, by ``training_step`` in evaluation mode.
        steps: of the optimizer.
        trainer: further arguments of the Trainer.
        datamodule: whose hooks transfer batches.

    Raises:
        ValueError: if the training stops before its last step.

    >>> from mlu_lightning.models import ResNet
    >>> model = ResNet(depth=2, hidden=8, embedding=6, inputs=3, outputs=2)
    >>> batch = torch.ones(5, 3), torch.ones(5, 2)
    >>> plan = Plan.from_model(model, batch, base=model)
    >>> found = measure(model, plan, [], [batch], batch, 1, {})
    >>> [len(one.values) for one in found if one.quantity.name == "blocks.*.read.weight"]
    [2, 2]
    """
    watch = _Watch(plan, probe, steps)
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
    return watch.measurements()


def make_trainer(callbacks: Sequence[Callback], steps: int, trainer: Mapping[str, Any]) -> Trainer:
    """Make a Trainer that trains for a few steps, and neither writes nor prints anything.

    Args:
        callbacks: of the Trainer; those that save or print are left out.
        steps: of the optimizer.
        trainer: further arguments.

    >>> make_trainer([], 3, {"accelerator": "cpu"}).max_steps
    3
    """
    arguments = {
        "accelerator": "cpu",
        "devices": 1,
        **trainer,
        "max_steps": steps,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "logger": DummyLogger(),  # which steps and callbacks may ask for
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [one for one in callbacks if not isinstance(one, (Checkpoint, ProgressBar, ModelSummary))],
    }
    return Trainer(**arguments)


@contextmanager
def quiet() -> Iterator[None]:
    """Be without what the Trainer says about devices and loaders in each of many short runs.

    >>> with quiet():
    ...     warnings.warn("The loader does not have many workers.")
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _Watch(Callback):
    """Measures a module while it is trained."""

    def __init__(self, plan: Plan, probe: Any, steps: int) -> None:
        super().__init__()
        self._plan = plan
        self._rows = {name: one.row for name, one in plan.parameters.items()}
        self._probe = probe
        self._steps = steps
        self._readers = {reader.parameter: reader for reader in find_readers(plan)}
        depths = [stream.depth for stream in plan.streams]
        self._locations = locate(plan.taps, depths, (0, 1)) + locate_features(plan.features, plan.branches)
        self._depths = {
            location.name: _relative_depth(plan, tap)
            for location, tap in zip(locate_features(plan.features, plan.branches), plan.features, strict=True)
        }
        self._found: dict[Quantity, list[float]] = defaultdict(list)
        self._along: dict[Quantity, list[float]] = defaultdict(list)
        self._start: dict[str, Tensor] = {}
        self._before: Observation = {}
        self._decayed = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = {name: parameter.detach().clone() for name, parameter in planned_parameters(pl_module).items()}
        self._before = self._observe(pl_module)
        self._add_local("start", pl_module, {name: torch.zeros_like(value) for name, value in self._start.items()})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._decayed or trainer.global_step < self._steps - 1:
            return
        self._decayed = True  # schedules may end at a learning rate of zero, so not after the last step
        parameters = {
            name: parameter for name, parameter in planned_parameters(pl_module).items() if parameter.requires_grad
        }
        for name, part in shrinkage(trainer.optimizers, parameters).items():
            self._add("decay", name, part)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._add_local("update", pl_module, self._start)
        after = self._observe(pl_module)
        for name, values in after.items():
            moves = moved(self._before[name], values)
            kind, _, branch = name.partition("/")
            if branch and not kind.startswith("stream"):
                quantity = Quantity("features", f"{name_pattern(branch)} ({kind})")
                self._found[quantity].append(moves)
                self._along[quantity].append(self._depths[name])
            else:
                self._found[Quantity("output" if kind.startswith("output") else "stream", name)].append(moves)
        for role in dict.fromkeys(self._rows.values()):
            without = self._without(role, pl_module)
            for name in _ends(after):
                effect: Kind = "effect on output" if name.startswith("output") else "effect on stream"
                moves = moved(without[name], after[name])
                if moves > 0:  # what comes after a stream has no effect on it
                    self._found[Quantity(effect, role, role)].append(moves)

    def measurements(self) -> tuple[Measurement, ...]:
        return tuple(
            Measurement(quantity, tuple(values), tuple(self._along.get(quantity, ())))
            for quantity, values in self._found.items()
        )

    def _observe(self, module: LightningModule) -> Observation:
        return observe(module, self._probe, self._locations, "training_step", restore_parameters=True)

    def _add_local(self, kind: Kind, module: LightningModule, others: Mapping[str, Tensor]) -> None:
        """Add what every parameter does where it acts."""

        def run() -> None:
            observe(module, self._probe, (), "training_step", restore_parameters=True)

        effects = local_effects(module, tuple(self._readers.values()), others, run)
        # experts without tokens are not read, as others beside them are
        read = {(name_pattern(name), self._rows[name]) for name in effects}
        parameters = planned_parameters(module)
        unread = [name for name in parameters if (name_pattern(name), self._rows[name]) not in read]
        effects |= value_effects(self._plan, unread, parameters, others, aligned=kind == "update")
        for name, effect in effects.items():
            multiplied = name in self._readers and self._readers[name].multiplied
            if kind == "start" and multiplied and self._plan.roles[name] is Role.BRANCH_NORM and effect > 0:
                # it is the multiplier of what comes before the norm, and the norm's values are something else
                size = rms(parameters[name])
                self._add(kind, name, size)
                before_norm = Role.BRANCH_OUT, Variant.BEFORE_NORM
                self._add(kind, name, effect / size, before_norm, " (multiplier)", multiplied)
            elif effect > 0 or kind == "update":  # what is zero at the start has no size to scale
                self._add(kind, name, effect, multiplied=multiplied)

    def _add(
        self,
        kind: Kind,
        name: str,
        value: float,
        row: tuple[Role, Variant | None] | None = None,
        what: str = "",
        multiplied: bool = False,
    ) -> None:
        parameter = self._plan.parameters[name]
        role, variant = row or (parameter.role, parameter.variant)
        expected = expected_powers(kind, role, multiplied, variant, parameter.ratios)(parameter.ratios)
        self._found[Quantity(kind, f"{name_pattern(name)}{what}", row_name(role, variant))].append(value / expected)

    def _without(self, role: str, module: LightningModule) -> Observation:
        """Observe the module with the parameters of one role as they were at the start."""
        of_role = {
            name: parameter for name, parameter in planned_parameters(module).items() if self._rows[name] == role
        }
        now = {name: parameter.detach().clone() for name, parameter in of_role.items()}
        with torch.no_grad():
            for name, parameter in of_role.items():
                parameter.copy_(self._start[name])
            observed = self._observe(module)
            for name, parameter in of_role.items():
                parameter.copy_(now[name])
        return observed


class Batches:
    """Batches that a Trainer takes for a loader; a list would be one of several loaders.

    >>> list(Batches([1, 2]))
    [1, 2]
    """

    def __init__(self, batches: Sequence[Any]) -> None:
        """Keep batches.

        Args:
            batches: in their order.
        """
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def _relative_depth(plan: Plan, tap: Tap) -> float:
    branch = plan.branches[tap.number]
    return tap.position / plan.streams[branch.stream].depth


def _ends(observed: Observation) -> list[LocationName]:
    """Where streams end, and outputs."""
    return [name for name in observed if name.startswith("output") or name.endswith("s=1")]
