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
from mlu_lightning.observation.batches import decode_batch, encode_batch
from mlu_lightning.observation.probe import (
    Location,
    Observation,
    copied,
    count_positions,
    first_samples,
    locate,
    observe,
    sample_count,
)
from mlu_lightning.observation.reference import load_probe
from mlu_lightning.planning.entries import BranchPlan
from mlu_lightning.planning.plan import Plan
from mlu_lightning.table import Role
from mlu_lightning.utilities.lightning_steps import StepName

__all__ = ["Layout", "Probe", "given_probe", "on_rank_zero", "smallest_probe"]

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

    >>> Layout((8,), (64,), {"mlp": 256}, (), (), (), {"tokens.weight": (100,)}, None).depth
    (8,)
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

        Args:
            trainer: which is fitting the module.
            module: the trainer's.

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
    """A batch on the module's device, and what is read when it is passed through.

    Args:
        batch: as the step takes it.
        step: that takes it.
        locations: what is read.
        positions: rows of it that are kept.

    >>> Probe(None, "training_step", (), 128).positions
    128
    """

    batch: Any
    step: StepName
    locations: tuple[Location, ...]
    positions: int

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
        """Transfer a batch as the Trainer does, and locate what is read.

        Args:
            trainer: which is fitting the module.
            module: the trainer's, on its device.
            batch: as a loader gives it.
            step: that takes it.
            layout: of the module.
            depths: relative depths.
            positions: rows to keep.
            features: further locations, of pre-activations.

        Raises:
            ValueError: if a depth cannot be read.
        """
        with isolate_rng():
            torch.manual_seed(0)  # hooks may change a batch at random
            batch = trainer.precision_plugin.convert_input(copied(batch))
            batch = module._on_before_batch_transfer(batch)
            batch = trainer.strategy.batch_to_device(batch)
        return cls(batch, step, locate(layout.taps, layout.depth, depths) + features, positions)

    def count_positions(self, trainer: Trainer, module: LightningModule) -> int:
        """Count the positions that the batch has in the module.

        Args:
            trainer: which is fitting the module.
            module: the trainer's.
        """
        with trainer.precision_plugin.val_step_context():
            return count_positions(module, self.batch, self.locations, self.step)

    def observe(self, trainer: Trainer, module: LightningModule) -> Observation:
        """Pass the batch through the module.

        Args:
            trainer: which is fitting the module.
            module: the trainer's.
        """
        with trainer.precision_plugin.val_step_context():
            return observe(module, self.batch, self.locations, self.step, self.positions)

    @contextmanager
    def first_pass(self, module: LightningModule, advice: str) -> Iterator[None]:
        """Say what fails if the module cannot take the batch.

        Args:
            module: the trainer's.
            advice: what to do.

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


def given_probe(trainer: Trainer, module: LightningModule, given: Any, samples: int) -> tuple[Any, StepName]:
    """Take the batch that a user has given, or the first samples of the data, as it will be read from a file.

    Args:
        trainer: which is fitting the module.
        module: the trainer's.
        given: a batch, the path of a file with one, or None.
        samples: the most that are taken.

    Returns:
        The batch, and the step that takes it.

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


def smallest_probe(
    trainer: Trainer, module: LightningModule, probe_of: Callable[[Any], Probe], batch: Any
) -> tuple[Probe, Any, int]:
    """Cut a batch to the samples that have as many positions as are kept, and to 8 at least.

    Args:
        trainer: which is fitting the module.
        module: the trainer's.
        probe_of: makes the probe of a batch.
        batch: to be cut.

    Returns:
        The probe, its batch before it was transferred, and the number of its positions.
    """
    probe = probe_of(batch)
    count = probe.count_positions(trainer, module)
    samples = sample_count(batch)
    if samples is None:
        return probe, batch, count
    kept = min(samples, max(_FEWEST_SAMPLES, math.ceil(probe.positions * samples / count)))
    batch = first_samples(batch, kept)
    return probe_of(batch), batch, count * kept // samples


_FEWEST_SAMPLES = 8
"""Samples of a probe that are kept even if fewer have enough positions, so that it is not one long text."""


def on_rank_zero(trainer: Trainer, make: Callable[[], ResultT]) -> ResultT:
    """Do something in the first process, and give the others its result or its error.

    Args:
        trainer: which knows the processes.
        make: what to do; what it returns is sent to the others.

    Raises:
        OSError: in every process, if ``make`` raised it.
        ValueError: the same.
    """
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
