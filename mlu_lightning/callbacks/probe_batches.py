"""What the watching callbacks share: the layout of the module that is watched, and a probe batch on its device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from mlu_lightning.callbacks.example import find_example, find_probe
from mlu_lightning.callbacks.mlu_callback import MLUCallback
from mlu_lightning.discovery.discover import discover
from mlu_lightning.discovery.structure import Branch, Structure, Tap
from mlu_lightning.observation import Location, Observation, load_probe, locate
from mlu_lightning.observation.batches import clone_batch, decode_batch, encode_batch, first_samples, sample_count
from mlu_lightning.observation.probe import observe_counted
from mlu_lightning.planning import BranchPlan, Plan
from mlu_lightning.table import Role
from mlu_lightning.utilities.lightning_namespaces import is_hook_overridden
from mlu_lightning.utilities.lightning_private import before_batch_transfer
from mlu_lightning.utilities.lightning_steps import StepName

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Layout:
    """What there is to read in a module."""

    depth: tuple[int, ...]  # residual additions L of every stream
    embedding: tuple[int, ...]  # dimension D of every stream
    hidden: dict[str, int]  # width M by kind of branch
    taps: tuple[Tap, ...]  # of streams and outputs
    features: tuple[Tap, ...]  # pre-activations of branches
    branches: tuple[Branch, ...] | tuple[BranchPlan, ...]
    data_sizes: dict[str, tuple[int, ...]]  # of embeddings and readouts, beside D, such as a vocabulary, by parameter
    plan: Plan | None  # in effect on the module, None without MLUCallback

    @classmethod
    def of(cls, trainer: Trainer, module: LightningModule) -> Layout:
        """Take it from the plan of the Trainer's :class:`MLUCallback`, or else discover it."""
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
        return cls(
            depth=tuple(stream.depth for stream in found.streams),
            embedding=tuple(stream.embedding for stream in found.streams),
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
        """Transfer a batch, and locate streams at relative depths, outputs and features."""
        locations = locate(layout.taps, layout.depth, depths) + features
        return cls(_transferred(trainer, module, batch), step, locations, positions)

    def observe(self, trainer: Trainer, module: LightningModule) -> Observation:
        """Pass the batch through the module."""
        return self.observe_counted(trainer, module)[0]

    def observe_counted(self, trainer: Trainer, module: LightningModule) -> tuple[Observation, int]:
        """Pass the batch through the module, and count the positions that it has there."""
        with trainer.precision_plugin.val_step_context():
            return observe_counted(module, self.batch, self.locations, self.step, self.positions)

    @contextmanager
    def first_pass(self, module: LightningModule, advice: str) -> Iterator[None]:
        """Say what fails inside, and what to do, if the module cannot take the batch."""
        try:
            yield
        # what code raises that is given another batch than it was written for; anything else is not the probe's doing
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
            raise ValueError(
                f"{type(module).__name__} cannot take the probe in its {self.step}: "
                f"{type(error).__name__}: {str(error).rstrip('.')}. {advice}"
            ) from error


def check_arguments(depths: Sequence[float], positions: int, fewest: int = 0) -> tuple[float, ...]:
    """Refuse what is not a choice of relative depths and rows, and sort the depths."""
    if isinstance(depths, (int, float)) or len(depths) < fewest or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(
            f"depths={depths!r} should be relative depths from 0 (the embedding) to 1 (the last addition)."
        )
    if positions < 1:
        raise ValueError(f"positions={positions} should be the number of rows of the probe to keep, 1 or more.")
    return tuple(sorted({float(depth) for depth in depths}))


def given_probe(trainer: Trainer, module: LightningModule, given: Any, samples: int) -> tuple[Any, StepName]:
    """Take the batch that a user has given, or a few samples of the data, as it will be read from a file, and its step."""
    step: StepName = "validation_step" if is_hook_overridden("validation_step", module) else "training_step"
    if given is None:
        batch, step = find_probe(trainer, module)
    elif isinstance(given, (str, Path)):
        batch, recorded = load_probe(given)
        step = recorded or step
    else:
        batch = given
    return decode_batch(*encode_batch(first_samples(batch, samples))), step


def cut_probe(
    trainer: Trainer, module: LightningModule, probe: Probe, batch: Any, callback: str
) -> tuple[Probe, Any, int, Observation]:
    """Observe a probe, whose batch is cut to the samples that are needed; return it, the batch and its positions."""
    with probe.first_pass(module, f"Give {callback}(probe=...) a batch as {probe.step} takes it."):
        observation, count = probe.observe_counted(trainer, module)
        samples = sample_count(batch) or 0
        kept = max(_FEWEST_SAMPLES, math.ceil(probe.positions * samples / count))
        if kept < samples:
            batch = first_samples(batch, kept)
            probe = replace(probe, batch=_transferred(trainer, module, batch))
            observation, count = probe.observe(trainer, module), count * kept // samples
        return probe, batch, count, observation


_FEWEST_SAMPLES = 8  # that are kept even if fewer have enough positions, so that it is not one long text


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


def _transferred(trainer: Trainer, module: LightningModule, batch: Any) -> Any:
    """A copy of a batch, on the device of the module, as the Trainer makes it."""
    with isolate_rng():
        torch.manual_seed(0)  # hooks may change a batch at random
        batch = before_batch_transfer(module, trainer.precision_plugin.convert_input(clone_batch(batch)))
        return trainer.strategy.batch_to_device(batch)


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
