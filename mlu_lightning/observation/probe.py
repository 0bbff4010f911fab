"""Look at a residual stream, at outputs and at pre-activations of a model while it trains, and leave no trace in it.

A probe batch is passed through the model's own ``validation_step`` or ``training_step`` in evaluation mode, without
gradients; hooks that are there for this one pass read the stream and the outputs (theory.md, section 4), and modes of torch
what enters activations and attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mlu_lightning.discovery.structure import Branch, Tap
from mlu_lightning.observation.attention_logits import whole
from mlu_lightning.observation.features import reading
from mlu_lightning.planning.entries import BranchPlan
from mlu_lightning.utilities.function_calls import tensors_in, watched
from mlu_lightning.utilities.lightning_steps import StepName, call_step, is_lightning_module, muted
from mlu_lightning.utilities.state import undisturbed

__all__ = [
    "Location",
    "Observation",
    "copied",
    "count_positions",
    "first_samples",
    "locate",
    "locate_features",
    "observe",
    "sample_count",
]

Observation = dict[str, Tensor]
"""Values of streams and outputs by the name of their location: float32, on the CPU, [positions, dimension]."""


@dataclass(frozen=True)
class Location:
    """What is read under one name: a weighted sum of values, each of which is a sum of what taps read.

    Args:
        name: ``"s=0.25"``, ``"stream1/s=0.25"`` for further streams, ``"output"``, ``"output1"`` for further readouts,
            ``"attention/blocks.0.attention"`` for pre-activations.
        parts: weights, which sum to one, and taps.

    >>> tap = Tap("readout", 0, 0, "head", "output", None, -1)
    >>> Location("output", ((1.0, (tap,)),)).taps[0].module
    'head'
    """

    name: str
    parts: tuple[tuple[float, tuple[Tap, ...]], ...]

    @property
    def taps(self) -> tuple[Tap, ...]:
        """All taps that are read."""
        return tuple(tap for _, taps in self.parts for tap in taps)


def locate(taps: Sequence[Tap], stream_depths: Sequence[int], depths: Sequence[float]) -> tuple[Location, ...]:
    """Find what to read at relative depths s of every stream, and at every readout.

    The stream at s is that after s · L residual additions; where that is not a whole number, the two next to it are
    interpolated, h(s) = (1 - w) h_k + w h_(k+1) with w = s · L - k, which is exact up to O(1/L²) in the limit of
    large depth (theory.md, section 5). Where no submodule is given or returns the stream itself, it is the stream before
    plus the branches.

    Args:
        taps: of a structure or plan.
        stream_depths: residual additions L of every stream.
        depths: relative depths s between 0 (the embedding) and 1 (the last addition).

    Returns:
        Streams in order, each at all depths, then readouts.

    Raises:
        ValueError: if a depth is not between 0 and 1, or there is no tap for one.

    >>> taps = [Tap("stream", 0, position, "", "output", None, -1) for position in range(3)]
    >>> [(location.name, [w for w, _ in location.parts]) for location in locate(taps, [2], [0, 0.25])]
    [('s=0', [1.0]), ('s=0.25', [0.5, 0.5])]
    """
    for s in depths:
        if not 0 <= s <= 1:
            raise ValueError(
                f"A relative depth lies between 0 (the embedding) and 1 (the last addition), and {s} does not."
            )
    found = []
    for number, depth in enumerate(stream_depths):
        along = _positions([tap for tap in taps if tap.number == number])
        for s in depths:
            below = round(float(s) * depth, 9)  # without what 0.7 * 10 has too much
            weight = below % 1
            weights = [(int(below), 1 - weight), (int(below) + 1, weight)]
            for position, part in weights:
                if part and position not in along:
                    raise ValueError(
                        f"The residual stream after {position} of its {depth} additions cannot be read: no submodule is "
                        "given it or returns it. Let it pass through a submodule there (an nn.Identity is enough), or "
                        f"choose depths other than {s:g}."
                    )
            name = f"s={s:g}" if number == 0 else f"stream{number}/s={s:g}"
            found.append(Location(name, tuple((part, along[position]) for position, part in weights if part)))
    for tap in taps:
        if tap.reads == "readout":
            found.append(Location(f"output{tap.number or ''}", ((1.0, (tap,)),)))
    return tuple(found)


def locate_features(features: Sequence[Tap], branches: Sequence[Branch | BranchPlan]) -> tuple[Location, ...]:
    """Find where to read the pre-activations of branches: what enters their nonlinearity, or the logits of attention.

    Args:
        features: of a structure or plan.
        branches: of the same.

    Returns:
        One for each branch that can be read, ``"mlp/blocks.0.mlp"`` by kind and name; that of the module itself is
        ``"mlp/self"``.

    >>> from mlu_lightning.discovery.structure import Branch
    >>> tap = Tap("units", 0, 0, "blocks.0.read", "output", None, -1)
    >>> [location.name for location in locate_features([tap], [Branch("blocks.0", "mlp", 8, 0, 0, ())])]
    ['mlp/blocks.0']
    """
    return tuple(
        Location(f"{branches[tap.number].kind}/{branches[tap.number].name or 'self'}", ((1.0, (tap,)),))
        for tap in features
    )


def observe(
    module: nn.Module, batch: Any, locations: Sequence[Location], step: StepName = "training_step", positions: int = 128
) -> Observation:
    """Pass a batch through a model and read its streams and outputs.

    The model is in evaluation mode and builds no graph; code of ``torch.compile`` is not used. Afterwards parameters,
    buffers, metric states, training modes and random states are as before, nothing was logged, and attributes that the
    step assigned, or tensors, generators, lists, dicts and sets in them that it changed, are restored; for that the pass
    needs the memory of another copy of the parameters. Only objects of other classes that the step changes keep the
    change. Random numbers of the pass are the same in every call.

    Args:
        module: a LightningModule, of which the step is run, or any other module, of which ``forward`` is run.
        batch: what the step takes, on the module's device; the arguments of ``forward`` for other modules.
        locations: what to read.
        step: which method of a LightningModule takes the batch.
        positions: number of rows to keep, evenly spaced over all samples (times tokens, pixels) of the batch.

    Returns:
        For every location the values [rows, dimension], in float32 on the CPU. A readout that was not called in
        evaluation mode, such as one that only helps in training, is left out, and so are pre-activations. Of these there
        are up to 32 rows of 256 units or keys, spread evenly, and -inf where a key cannot be seen.

    Raises:
        ValueError: if the stream was not passed at a location.

    >>> from mlu_lightning import discover
    >>> from mlu_lightning.models import ResNet
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

    _pass(module, batch, locations, step, keep)
    return {
        location.name: _interpolated([(weight, _sum([read[tap] for tap in taps])) for weight, taps in location.parts])
        for location in locations
        if all(tap in read for tap in location.taps)
    }


def count_positions(
    module: nn.Module, batch: Any, locations: Sequence[Location], step: StepName = "training_step"
) -> int:
    """Pass a batch through a model and count the positions (samples, times tokens or pixels) that its streams have.

    Args:
        module: as for :func:`observe`.
        batch: as for :func:`observe`.
        locations: as for :func:`observe`.
        step: as for :func:`observe`.

    Returns:
        The most that any location has.

    >>> from mlu_lightning import discover
    >>> from mlu_lightning.models import CausalTransformer
    >>> model = CausalTransformer(vocabulary=10, context=4, depth=1, embedding=6, heads=1, head_dim=2)
    >>> tokens = torch.ones(3, 5, dtype=torch.long)
    >>> count_positions(model, tokens, locate(discover(model, tokens).taps, [2], [0, 1]))
    12
    """
    counts = [1]
    counted = [location for location in locations if all(tap.function is None for tap in location.taps)]
    _pass(module, batch, counted, step, lambda tap, values: counts.append(values.numel() // values.shape[tap.axis]))
    return max(counts)


def sample_count(batch: Any) -> int | None:
    """Number of samples in a batch: the first dimension of its tensors, None if it is not the same in all.

    Args:
        batch: tensors in tuples, lists and dicts.

    >>> sample_count({"x": torch.ones(8, 3), "label": torch.ones(8), "name": "words"})
    8
    """
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
    return sizes.pop() if len(sizes) == 1 and 0 not in sizes else None


def first_samples(batch: Any, count: int) -> Any:
    """Leave only the first samples of a batch, if it can be told what they are.

    Args:
        batch: tensors in tuples, lists and dicts.
        count: number of samples to leave.

    >>> [list(part.shape) for part in first_samples((torch.ones(8, 3), torch.ones(8)), 2)]
    [[2, 3], [2]]
    """
    if (sample_count(batch) or 0) <= count:
        return batch
    return tree_map(lambda leaf: leaf[:count].clone() if isinstance(leaf, Tensor) else leaf, batch)


def _pass(
    module: nn.Module,
    batch: Any,
    locations: Sequence[Location],
    step: StepName,
    keep: Callable[[Tap, Tensor], None],
) -> None:
    """Pass a copy of a batch through a model, with hooks that hand over what is at its taps."""
    passed: set[Tap] = set()
    with ExitStack() as stack:
        stack.enter_context(isolate_rng())
        stack.enter_context(undisturbed(module))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_without_fast_path())
        taps = dict.fromkeys(tap for location in locations for tap in location.taps)
        inside = [tap for tap in taps if tap.function is not None]
        for tap in taps:
            if tap.function is None:
                stack.callback(_attach(module.get_submodule(tap.module), tap, passed, keep).remove)
        if inside:
            stack.enter_context(watched(module, reading(inside, keep)))
        module.eval()
        _seed()
        if is_lightning_module(module):
            for submodule in module.modules():
                if is_lightning_module(submodule):
                    stack.enter_context(muted(submodule))
            call_step(module, step, copied(batch))
        else:
            _call(module, copied(batch))
    for location in locations:
        missing = [tap for tap in location.taps if tap not in passed and tap.reads in ("stream", "branch")]
        if missing:
            raise ValueError(
                f"The submodule {missing[0].module!r}, which takes part in training_step, was not called by {step} in "
                f"evaluation mode, so the stream cannot be read at {location.name}. Choose other depths, or a step that "
                "calls it: modules without a validation_step are passed through training_step."
            )


def copied(batch: Any) -> Any:
    """Copy the tensors and the containers of a batch, which steps may change.

    Args:
        batch: tensors in tuples, lists and dicts.

    >>> batch = {"x": torch.zeros(2)}
    >>> copied(batch)["x"].add_(1), batch["x"]
    (tensor([1., 1.]), tensor([0., 0.]))
    """
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """``nn.TransformerEncoder`` without its fused code for evaluation, which calls no submodules and drops padding."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _seed() -> None:
    """Seed all generators; ``torch.manual_seed`` takes a stack trace for each kind of device that is not there."""
    if torch.accelerator.is_available():
        torch.manual_seed(0)
    else:
        torch.default_generator.manual_seed(0)


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
    values = whole(values)
    rows = values.movedim(axis, -1).flatten(0, -2) if values.ndim > 1 else values[None]
    if positions < len(rows):
        chosen = torch.linspace(0, len(rows) - 1, positions, dtype=torch.float64).round().long()
        rows = rows[chosen.to(rows.device)]
    return rows.to("cpu", torch.float32, copy=True)


def _positions(taps: Sequence[Tap]) -> dict[int, tuple[Tap, ...]]:
    """What to add up for a stream at each position where it can be read."""
    along: dict[int, tuple[Tap, ...]] = {tap.position: (tap,) for tap in taps if tap.reads == "stream"}
    branches: dict[int, tuple[Tap, ...]] = {}
    for tap in taps:
        if tap.reads == "branch":
            branches[tap.position] = (*branches.get(tap.position, ()), tap)
    for position, added in sorted(branches.items()):
        if position in along:
            along.setdefault(position + 1, along[position] + added)
    return along


def _interpolated(parts: list[tuple[float, Tensor]]) -> Tensor:
    """Weighted sum; where a stage of the network changes the shape in between, the nearer part."""
    if len({part.shape for _, part in parts}) > 1:
        return max(reversed(parts), key=lambda part: part[0])[1]
    return _sum([part if weight == 1 else part * weight for weight, part in parts])


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _call(module: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        module(**batch)
    elif isinstance(batch, (tuple, list)):
        module(*batch)
    else:
        module(batch)
