"""Pass a probe batch through a model while it trains, read streams, outputs and pre-activations, and leave no trace.

The batch goes through the model's own ``validation_step`` or ``training_step`` in evaluation mode, without gradients; hooks
that are there for this one pass read the stream and the outputs (theory.md, section 4), and modes of torch what enters
activations and attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from mlu_lightning.discovery.structure import Tap
from mlu_lightning.observation.attention_logits import full_tensor
from mlu_lightning.observation.batches import clone_batch
from mlu_lightning.observation.features import watch_features
from mlu_lightning.observation.locations import Location, LocationName
from mlu_lightning.utilities.function_calls import tensors_in, watched
from mlu_lightning.utilities.lightning_steps import StepName, call_step, is_lightning_module, muted
from mlu_lightning.utilities.state import preserve_state

__all__ = ["Observation", "count_positions", "observe"]

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

    The model is in evaluation mode and builds no graph; code of ``torch.compile`` is not used. Afterwards buffers, metric
    states, training modes and random states are as before, nothing was logged, and attributes that the step assigned, or
    tensors, generators, lists, dicts and sets in them that it changed, are restored. Only objects of other classes that
    the step changes keep the change. Random numbers of the pass are the same in every call.

    Args:
        module: LightningModule, of which the step is run, or any other module, of which ``forward`` is run.
        batch: What the step takes, on the module's device; the arguments of ``forward`` for other modules.
        locations: What to read.
        step: Method of a LightningModule that takes the batch.
        positions: Number of rows to keep, evenly spaced over all samples (times tokens, pixels) of the batch.
        restore_parameters: Whether steps may change parameters, of which a copy is kept meanwhile.

    Returns:
        Values [rows, dimension] at every location, in float32 on the CPU. A readout that was not called in evaluation
        mode, such as one that only helps in training, is left out, and so are pre-activations. Of these there are up to
        32 rows of 256 units or keys, spread evenly, and -inf where a key cannot be seen.

    Raises:
        ValueError: If the stream was not passed at a location.
        ParametersChangedError: If the step changes parameters.

    >>> from mlu_lightning import discover
    >>> from mlu_lightning.models import ResNet
    >>> from mlu_lightning.observation import locate
    >>> model = ResNet(depth=4, hidden=8, embedding=6, inputs=3, outputs=2)
    >>> batch = torch.ones(5, 3), torch.ones(5, 2)
    >>> structure = discover(model, batch)
    >>> values = observe(model, batch, locate(structure.taps, [structure.depth], [0, 1]))
    >>> {name: list(value.shape) for name, value in values.items()}
    {'s=0': [5, 6], 's=1': [5, 6], 'output': [5, 2]}
    """
    read: dict[Tap, Tensor] = {}

    def keep(tap: Tap, values: Tensor) -> None:
        read[tap] = values if tap.function is not None else _rows(values, tap.axis, positions)

    _pass(module, batch, locations, step, keep, restore_parameters)
    return {
        location.name: _interpolated(
            [(weight, reduce(add, (read[tap] for tap in taps))) for weight, taps in location.parts]
        )
        for location in locations
        if all(tap in read for tap in location.taps)
    }


def count_positions(
    module: nn.Module, batch: Any, locations: Sequence[Location], step: StepName = "training_step"
) -> int:
    """Pass a batch through a model, and count the positions (samples, times tokens or pixels) that its streams have."""
    counts = [1]
    counted = [location for location in locations if all(tap.function is None for tap in location.taps)]
    _pass(module, batch, counted, step, lambda tap, values: counts.append(values.numel() // values.shape[tap.axis]))
    return max(counts)


def _pass(
    module: nn.Module,
    batch: Any,
    locations: Sequence[Location],
    step: StepName,
    keep: Callable[[Tap, Tensor], None],
    restore_parameters: bool = False,
) -> None:
    """Pass a copy of a batch through a model, with hooks that hand over what is at its taps."""
    passed: set[Tap] = set()
    with ExitStack() as stack:
        stack.enter_context(preserve_state(module, restore_parameters))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_without_fast_path())
        taps = dict.fromkeys(tap for location in locations for tap in location.taps)
        inside = [tap for tap in taps if tap.function is not None]
        for tap in taps:
            if tap.function is None:
                stack.callback(_attach(module.get_submodule(tap.module), tap, passed, keep).remove)
        if inside:
            stack.enter_context(watched(module, watch_features(inside, keep)))
        module.eval()
        # torch.manual_seed takes a stack trace for each kind of device that is not there
        (torch if torch.accelerator.is_available() else torch.default_generator).manual_seed(0)
        if is_lightning_module(module):
            for submodule in module.modules():
                if is_lightning_module(submodule):
                    stack.enter_context(muted(submodule))
            call_step(module, step, clone_batch(batch))
        elif isinstance(batch, Mapping):
            module(**clone_batch(batch))
        else:
            module(*clone_batch(batch if isinstance(batch, (tuple, list)) else [batch]))
    for location in locations:
        missing = [tap for tap in location.taps if tap not in passed and tap.reads in ("stream", "branch")]
        if missing:
            raise ValueError(
                f"The submodule {missing[0].module!r}, which takes part in training_step, was not called by {step} in "
                f"evaluation mode, so the stream cannot be read at {location.name}. Choose other depths, or a step that "
                "calls it: modules without a validation_step are passed through training_step."
            )


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """``nn.TransformerEncoder`` without its fused code for evaluation, which calls no submodules and drops padding."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _attach(module: nn.Module, tap: Tap, passed: set[Tap], keep: Callable[[Tap, Tensor], None]) -> Any:
    """Hook a module for one pass, before all other hooks on its inputs and after all others on its outputs."""

    def first(values: Any) -> None:
        if tap not in passed:  # the first call is the one that the tap means
            passed.add(tap)
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


def _rows(values: Tensor, axis: int, positions: int) -> Tensor:
    """Evenly spaced rows of a tensor, copied at once, because what follows may change it in place."""
    values = full_tensor(values)
    rows = values.movedim(axis, -1).flatten(0, -2) if values.ndim > 1 else values[None]
    if positions < len(rows):
        chosen = torch.linspace(0, len(rows) - 1, positions, dtype=torch.float64).round().long()
        rows = rows[chosen.to(rows.device)]
    return rows.to("cpu", torch.float32, copy=True)


def _interpolated(parts: list[tuple[float, Tensor]]) -> Tensor:
    """Weighted sum; where a stage of the network changes the shape in between, the nearer part."""
    if len({part.shape for _, part in parts}) > 1:
        return max(reversed(parts), key=lambda part: part[0])[1]
    return reduce(add, (part if weight == 1 else part * weight for weight, part in parts))
