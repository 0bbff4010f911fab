"""What the callbacks that watch a run share: what to read in its module, and a probe batch on its device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng

from mlu_lightning.callbacks.example import find_example, find_probe
from mlu_lightning.callbacks.mlu_callback import MLUCallback
from mlu_lightning.discovery.discover import discover
from mlu_lightning.discovery.structure import Branch, Structure, Tap
from mlu_lightning.observation import Location, Observation, load_probe, locate, observe
from mlu_lightning.observation.batches import clone_batch, decode_batch, encode_batch, first_samples, sample_count
from mlu_lightning.observation.probe import count_positions
from mlu_lightning.planning import BranchPlan, Plan
from mlu_lightning.table import Role
from mlu_lightning.utilities.lightning_steps import StepName

__all__ = ["Layout", "Probe", "check_probe_arguments", "given_probe", "on_rank_zero", "prepare_probe"]

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Layout:
    """What there is to read in a module.

    Args:
        depth: residual additions of every stream, L.
        embedding: dimension of every stream, D.
        hidden: hidden width M by kind of branch.
        taps: where streams and outputs are read.
        features: where pre-activations of branches are read.
        branches: the residual branches.
        data_sizes: sizes of embeddings and readouts other than D, such as that of a vocabulary, by parameter name.
        plan: in effect on the module, None without :class:`MLUCallback`.
    """

    depth: tuple[int, ...]
    embedding: tuple[int, ...]
    hidden: dict[str, int]
    taps: tuple[Tap, ...]
    features: tuple[Tap, ...]
    branches: tuple[Branch, ...] | tuple[BranchPlan, ...]
    data_sizes: dict[str, tuple[int, ...]]
    plan: Plan | None

    @classmethod
    def of(cls, trainer: Trainer, module: LightningModule) -> Layout:
        """Take it from the plan of the Trainer's :class:`MLUCallback`, or else discover it.

        Raises:
            ValueError: if the module's parameters are sharded and there is no plan, or if it cannot be discovered.
        """
        callbacks = [callback for callback in vars(trainer)["callbacks"] if isinstance(callback, MLUCallback)]
        plan = callbacks[0].plan if callbacks else None
        if plan is None and any(hasattr(parameter, "placements") for parameter in module.parameters()):
            raise ValueError(
                "The module's parameters are sharded (DTensor), and finding its residual stream needs a forward pass of "
                "the whole module. Plan it before, as it is without sharding: Plan.from_model(module, example, "
                "base=...).save(path), and give the Trainer MLUCallback(plan=path)."
            )
        # plans of older versions do not say where streams can be read
        found: Plan | Structure = plan if plan and plan.taps else discover(module, find_example(trainer, module))
        streams = found.streams
        return cls(
            depth=tuple(stream.depth for stream in streams),
            embedding=tuple(stream.embedding for stream in streams),
            hidden={branch.kind: branch.hidden for branch in found.branches},
            taps=found.taps,
            features=found.features,
            branches=found.branches,
            data_sizes=_data_sizes(found),
            plan=plan,
        )


@dataclass(frozen=True)
class Probe:
    """A batch on the module's device, and what is read when the step passes it through the module."""

    batch: Any
    step: StepName
    locations: tuple[Location, ...]
    positions: int  # rows that are kept

    @classmethod
    def of(
        cls,
        trainer: Trainer,
        module: LightningModule,
        batch: Any,
        step: StepName,
        layout: Layout,
        depths: Sequence[float],
        positions: int,
        features: tuple[Location, ...] = (),
    ) -> Probe:
        """Transfer a batch as the Trainer does, and locate streams at relative depths, outputs and features.

        Raises:
            ValueError: if a depth cannot be read.
        """
        with isolate_rng():
            torch.manual_seed(0)  # hooks may change a batch at random
            batch = trainer.precision_plugin.convert_input(clone_batch(batch))
            batch = module._on_before_batch_transfer(batch)
            batch = trainer.strategy.batch_to_device(batch)
        return cls(batch, step, locate(layout.taps, layout.depth, depths) + features, positions)

    def count_positions(self, trainer: Trainer, module: LightningModule) -> int:
        """Count the positions that the batch has in the module."""
        with trainer.precision_plugin.val_step_context():
            return count_positions(module, self.batch, self.locations, self.step)

    def observe(self, trainer: Trainer, module: LightningModule) -> Observation:
        """Pass the batch through the module."""
        with trainer.precision_plugin.val_step_context():
            return observe(module, self.batch, self.locations, self.step, self.positions)

    @contextmanager
    def first_pass(self, module: LightningModule, advice: str) -> Iterator[None]:
        """Say what fails, and what to do, if the module cannot take the batch.

        Raises:
            ValueError: if anything inside fails as a module does for a batch that is not one of its own.
        """
        try:
            yield
        # what code raises that is given another batch than it was written for; anything else is not the probe's doing
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
            raise ValueError(
                f"{type(module).__name__} cannot take the probe in its {self.step}: "
                f"{type(error).__name__}: {str(error).rstrip('.')}. {advice}"
            ) from error


def check_probe_arguments(depths: Sequence[float], positions: int, fewest: int = 0) -> tuple[float, ...]:
    """Refuse what is not a choice of relative depths and rows, and sort the depths.

    Raises:
        ValueError: if they are none.
    """
    if isinstance(depths, (int, float)) or len(depths) < fewest or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(
            f"depths={depths!r} should be relative depths between 0 (the embedding) and 1 (the last addition)."
        )
    if positions < 1:
        raise ValueError(f"positions={positions} should be the number of rows of the probe to keep, 1 or more.")
    return tuple(sorted({float(depth) for depth in depths}))


def given_probe(trainer: Trainer, module: LightningModule, given: Any, samples: int) -> tuple[Any, StepName]:
    """Take the batch that a user has given, or a few samples of the data, as it will be read from a file, and its step.

    Raises:
        ValueError: if it is no batch, or there is none.
    """
    step: StepName = "validation_step" if is_overridden("validation_step", module) else "training_step"
    if given is None:
        batch, step = find_probe(trainer, module)
    elif isinstance(given, (str, Path)):
        batch, recorded = load_probe(given)
        step = recorded or step
    else:
        batch = given
    return decode_batch(*encode_batch(first_samples(batch, samples))), step


def prepare_probe(
    trainer: Trainer, module: LightningModule, make: Callable[[Any], Probe], batch: Any, advice: str
) -> tuple[Probe, Any, int, Observation]:
    """Cut a batch to the samples that have as many positions as are kept, and 8 at least, and observe it.

    Returns the probe that ``make`` makes of it, the batch that was cut, the number of its positions, and the observation.
    """
    probe = make(batch)
    with probe.first_pass(module, advice):
        count = probe.count_positions(trainer, module)
        samples = sample_count(batch)
        if samples is not None:
            kept = min(samples, max(_FEWEST_SAMPLES, math.ceil(probe.positions * samples / count)))
            batch = first_samples(batch, kept)
            probe, count = make(batch), count * kept // samples
        return probe, batch, count, probe.observe(trainer, module)


_FEWEST_SAMPLES = 8
"""Samples of a probe that are kept even if fewer have enough positions, so that it is not one long text."""


def on_rank_zero(trainer: Trainer, make: Callable[[], ResultT]) -> ResultT:
    """Do something in the first process, and give the others its result, or its ``OSError`` or ``ValueError``."""
    result: ResultT | OSError | ValueError | None = None
    if trainer.is_global_zero:
        try:
            result = make()
        except (OSError, ValueError) as error:
            result = error
    result = trainer.strategy.broadcast(result)
    if isinstance(result, (OSError, ValueError)):
        raise result
    return result  # type: ignore[return-value]  # broadcast to all: no longer None, and what make returns is no error


def _data_sizes(found: Plan | Structure) -> dict[str, tuple[int, ...]]:
    """Sizes of embeddings and readouts without the one that is the stream's."""
    embeddings = {stream.embedding for stream in found.streams}
    sizes: dict[str, tuple[int, ...]] = {}
    for name, parameter in found.parameters.items():
        own = [axis for axis, size in enumerate(parameter.shape) if size in embeddings]
        if parameter.role in (Role.EMBEDDING, Role.READOUT) and own:
            # where both sizes are that of a stream they are equal, unless two streams differ: either may be left out
            sizes[name] = parameter.shape[: own[0]] + parameter.shape[own[0] + 1 :]
    return sizes
