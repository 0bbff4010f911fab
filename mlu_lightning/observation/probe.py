"""Pass a probe batch through a model in training, read streams, outputs and pre-activations, and leave no trace.

The batch goes through the model's own step in evaluation mode, without gradients; hooks that are there for this one pass
read streams and outputs (theory.md, section 4), and modes of torch what enters activations and attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, reduce
from math import prod
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from mlu_lightning.discovery.structure import Tap
from mlu_lightning.observation.batches import clone_batch
from mlu_lightning.observation.features import rows_along, watch_features
from mlu_lightning.observation.locations import Location, LocationName
from mlu_lightning.utilities.function_calls import tensors_in, watched
from mlu_lightning.utilities.lightning_steps import StepName, call_module, call_step, is_lightning_module, muted
from mlu_lightning.utilities.state import KeptValues, preserve_state

Observation = dict[LocationName, Tensor]
"""Values of streams, outputs and features by the name of their location: float32, on the CPU, [positions, dimension]."""


def observe(
    module: nn.Module,
    batch: Any,
    locations: Sequence[Location],
    step: StepName = "training_step",
    positions: int = 128,
    restore_parameters: bool = False,
) -> Observation:
    """Pass a batch through a model and read its streams and outputs.

    The model is in evaluation mode and builds no graph; code of ``torch.compile`` is not used. Afterwards buffers, training
    modes, random states and attributes of the module, also what tensors, generators and containers in them hold, are as
    before, and nothing was logged. Random numbers of the pass are the same in every call.

    Args:
        module: LightningModule, of which the step is run, or any other module, of which ``forward`` is run.
        batch: What the step takes, on the module's device; the arguments of ``forward`` for other modules.
        locations: What to read.
        step: Method of a LightningModule that takes the batch.
        positions: Number of rows to keep, evenly spaced over all samples (times tokens, pixels) of the batch.
        restore_parameters: Whether steps may change parameters, of which a copy is kept meanwhile.

    Returns:
        Values [rows, dimension] by location, in float32 on the CPU, without readouts and pre-activations that were not
        computed in evaluation mode. Pre-activations are up to 32 rows of 256 units or keys, -inf where a key is not seen.

    Raises:
        ValueError: If the stream was not passed at a location.
        ParametersChangedError: If the step changes parameters.
    """
    return observe_counted(module, batch, locations, step, positions, restore_parameters)[0]


def observe_counted(
    module: nn.Module,
    batch: Any,
    locations: Sequence[Location],
    step: StepName,
    positions: int,
    restore_parameters: bool = False,
) -> tuple[Observation, int]:
    """Observe a batch, and count the positions (samples, times tokens or pixels) that its streams have."""
    read: dict[Tap, Tensor] = {}
    counts = [1]

    @cache
    def chosen(rows: int, device: torch.device) -> Tensor:
        return torch.linspace(0, rows - 1, positions, dtype=torch.float64, device="cpu").round().long().to(device)

    def keep(tap: Tap, values: Tensor) -> None:
        if tap.function is None:
            counts.append(values.numel() // values.shape[tap.axis])
            rows = rows_along(values, tap.axis)
            if positions < len(rows):
                rows = rows[chosen(len(rows), rows.device)]
            values = rows.to("cpu", torch.float32, copy=True)  # at once, because what follows may change it in place
            values *= prod(tap.constants)
        read[tap] = values

    taps = dict.fromkeys(tap for location in locations for tap in location.taps)
    inside = [tap for tap in taps if tap.function is not None]
    with undisturbed(module, restore_parameters), torch.no_grad(), ExitStack() as stack:
        for tap in taps:
            if tap.function is None:
                stack.callback(_attach(module.get_submodule(tap.module), tap, read, keep).remove)
        if inside:
            stack.enter_context(watched(module, watch_features(inside, keep)))
        pass_batch(module, clone_batch(batch), step)
    for location in locations:
        missing = [tap for tap in location.taps if tap not in read and tap.reads in ("stream", "branch")]
        if missing:
            raise ValueError(
                f"The submodule {missing[0].module!r}, which takes part in training_step, was not called by {step} in "
                f"evaluation mode, so the stream cannot be read at {location.name}. Choose other depths, or a step that "
                "calls it: modules without a validation_step are passed through training_step."
            )
    observation = {
        location.name: _interpolated(
            [(weight, reduce(add, map(read.__getitem__, taps))) for weight, taps in location.parts]
        )
        for location in locations
        if all(tap in read for tap in location.taps)
    }
    return observation, max(counts)


@contextmanager
def undisturbed(module: nn.Module, restore_parameters: bool = False, kept: KeptValues | None = None) -> Iterator[None]:
    """Let a module be passed through in evaluation mode, by code that Python runs, and leave no trace."""
    eager = torch.compiler.set_stance("force_eager")
    with preserve_state(module, restore_parameters, kept), eager, ExitStack() as stack:
        # the fused code of nn.TransformerEncoder for evaluation calls no submodules and drops padding
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        module.eval()
        # torch.manual_seed takes a stack trace for each kind of device that is not there
        (torch if torch.accelerator.is_available() else torch.default_generator).manual_seed(0)
        for submodule in module.modules():
            if is_lightning_module(submodule):
                stack.enter_context(muted(submodule))
        yield


def pass_batch(module: nn.Module, batch: Any, step: StepName) -> Any:
    """Pass a batch through the step of a LightningModule, or through any other module."""
    return call_step(module, step, batch) if is_lightning_module(module) else call_module(module, batch)


def _attach(module: nn.Module, tap: Tap, read: Mapping[Tap, Tensor], keep: Callable[[Tap, Tensor], None]) -> Any:
    """Hook a module for one pass, before all other hooks on its inputs and after all others on its outputs."""

    def first(values: Any) -> None:
        if tap not in read:  # the first call is the one that the tap means
            keep(tap, values)

    def given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first(list(tensors_in((args, kwargs)))[tap.index or 0])

    def returned(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if tap.index is not None:
            output = list(output.values() if isinstance(output, Mapping) else output)[tap.index]
        first(output)

    if tap.where == "input":
        return module.register_forward_pre_hook(given, prepend=True, with_kwargs=True)
    return module.register_forward_hook(returned)


def _interpolated(parts: list[tuple[float, Tensor]]) -> Tensor:
    """Weighted sum; where a stage of the network changes the shape in between, the nearer part."""
    if len({part.shape for _, part in parts}) > 1:
        return max(reversed(parts), key=lambda part: part[0])[1]
    return reduce(add, (part if weight == 1 else part * weight for weight, part in parts))
