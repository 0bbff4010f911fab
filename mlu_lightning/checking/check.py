"""The check: train a module at several shapes for a few steps, and say whether its features move alike at all of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from statistics import geometric_mean
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.seed import isolate_rng

from mlu_lightning.callbacks.mlu_callback import MLUCallback
from mlu_lightning.checking.growth import at_fixed_head_dim
from mlu_lightning.checking.measurement import Measured, Measurement, measure
from mlu_lightning.checking.preparation import (
    build,
    few_samples,
    first_batches,
    make_trainer,
    prepare,
    quiet,
    structure_of,
    transfer,
)
from mlu_lightning.checking.quantities import Kind, Quantity
from mlu_lightning.checking.report import CheckReport
from mlu_lightning.checking.sizes import AXES, Size, check_growth, default_axes, sizes
from mlu_lightning.checking.verdicts import Point, Row, fit_row
from mlu_lightning.planning import Plan
from mlu_lightning.planning.arguments import PlanArguments
from mlu_lightning.planning.distance import FAR
from mlu_lightning.shapes import Shape
from mlu_lightning.utilities.names import name_pattern


def check(
    module_factory: Callable[..., LightningModule],
    base: Shape,
    data: Any = None,
    *,
    callbacks: Callable[[LightningModule], Sequence[Callback]] | None = None,
    axes: Sequence[str] | None = None,
    factors: Sequence[int] = (1, 2, 4, 8),
    seeds: int = 4,
    steps: int = 4,
    seed: int = 0,
    trainer: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CheckReport:
    """Check that a module's features move alike at every shape, and name the role that is at fault if they do not.

    The module is built at several shapes along depth, hidden width and embedding, separately and together, and trained
    for a few steps by its own optimizers. Each run measures what the MLU parameterization makes independent of the shape
    (theory.md, sections 1 and 3): how far pre-activations, streams and outputs move; what every parameter does where it
    acts, at the start and because it was updated; what weight decay takes away; and what the update of each role does to
    streams and outputs. Slopes against size, fitted with a confidence interval, are the verdict. Powers in the table are
    multiples of 1/2, so a missing factor shifts a slope by 1/2 at least; 1/4 is left to drift of networks of finite size.

    Args:
        module_factory: function from ``depth=``, ``hidden=`` and ``embedding=`` to a module, whose depth may be a multiple
            of the argument, such as two additions for each block of a Transformer.
        base: arguments at which the hyperparameters are known to be good.
        data: DataLoader, list of batches or ``LightningDataModule``; None for the module's own ``train_dataloader``.
        callbacks: function from a module of the base shape to the callbacks of a Trainer, by default an
            :class:`MLUCallback` with that base; those that save checkpoints or print are left out.
        axes: some of ``"depth"``, ``"hidden"``, ``"embedding"``, ``"width"`` (both of these by one factor) and
            ``"together"``, without those that the module cannot grow alone; by default all but the width, ``"together"``
            with four factors or more, because it grows by all but the last. Where hidden width or embedding alone change
            head_dim, the width is taken in their place.
        factors: factors by which each of the three grows, ascending from 1.
        seeds: number of runs at every shape, each with other initial weights and batches.
        steps: optimizer steps of every run.
        seed: seed of the first of these runs.
        trainer: further arguments of the Trainer, such as ``precision`` or ``gradient_clip_val``.
        progress: function called with the number of runs made and that of all.

    Raises:
        ValueError: if an argument is not of these, the module cannot be planned or does not grow, or a run stops early.

    >>> from mlu_lightning.models import ResNet
    >>> def build(depth, hidden, embedding):
    ...     return ResNet(depth, hidden, embedding, inputs=3, outputs=2)
    >>> import torch
    >>> inputs = torch.randn(8, 16, 3, generator=torch.Generator().manual_seed(0))
    >>> batches = [(x, torch.stack((x[:, 0] * x[:, 1], x[:, 2].abs()), 1)) for x in inputs]
    >>> plain = check(build, Shape(2, 32, 16), batches, axes=["depth"], factors=[1, 2, 4], seeds=2, callbacks=lambda _: [])
    >>> plain.verdict, plain.causes[0].role  # without MLUCallback
    ('fail', 'branch_out')
    """
    if seeds < 1 or steps < 1:
        raise ValueError(f"seeds={seeds} and steps={steps} should both be 1 or more.")
    run_seeds = range(seed, seed + seeds)
    settings = {**(trainer or {})}
    count = steps * int(settings.get("accumulate_grad_batches", 1))
    measured: dict[tuple[Shape, int], Measured] = {}
    datamodule = data if isinstance(data, LightningDataModule) else None
    with isolate_rng(), quiet():
        planning = make_trainer([], steps, settings)

        @cache  # for any weights: only the ratios and locations of a plan are used
        def plan_of(shape: Shape) -> Plan:
            if shape == base:
                return reference
            return Plan.from_model(prepare(build(module_factory, shape, seed), planning), probe, base=reference)

        first = prepare(build(module_factory, base, seed), planning)
        batches = {run_seed: first_batches(data, first, count + 1, run_seed) for run_seed in run_seeds}
        probe = transfer(batches[seed][-1], datamodule or first)
        reference = Plan.from_model(first, probe, base=first)
        probe = few_samples(probe, first, reference)
        structures = cache(lambda shape: structure_of(build(module_factory, shape, seed), planning, probe))
        chosen, notes = at_fixed_head_dim(default_axes(factors) if axes is None else axes, base, structures)
        grid = sizes(base, factors, chosen)
        runs = [(shape, run_seed) for shape in dict.fromkeys(size.shape for size in grid) for run_seed in run_seeds]
        if callbacks and not any(isinstance(callback, MLUCallback) for callback in callbacks(first)):
            notes = (_WITHOUT, *notes)
        for axis in dict.fromkeys(size.axis for size in grid):
            small, large, *_ = (size.shape for size in grid if size.axis == axis)
            check_growth(axis, factors[1], plan_of(small), plan_of(large))
        last = {axis: [size for size in grid if size.axis == axis] for axis in chosen}
        largest = {axis: plan_of(of_axis[-1].shape) for axis, of_axis in last.items()}
        warnings = tuple(dict.fromkeys(text for plan in largest.values() for text in plan.warnings))
        notes = (*notes, *_distance_note(largest))
        planned: dict[tuple[Shape, int], Plan] = {}
        bases = cache(lambda run_seed: build(module_factory, base, run_seed))
        for shape, run_seed in runs:
            plan, module = plan_of(shape), build(module_factory, shape, run_seed)
            taking_part = list(callbacks(bases(run_seed))) if callbacks else [MLUCallback(plan=plan)]
            seed_everything(run_seed, verbose=False)
            for place, callback in enumerate(taking_part):
                if isinstance(callback, MLUCallback):
                    own = callback.arguments != PlanArguments(bases(run_seed)) or callback._example is not None
                    _plan_once(callback, None if own else plan, planned, (shape, place))
            before = measured[shape, seed].followed if (shape, seed) in measured else None
            training = taking_part, batches[run_seed][:count], probe, steps, settings, datamodule
            measured[shape, run_seed] = measure(module, plan, *training, before)
            progress(len(measured), len(runs))
    # where they act, in a submodule, the module's own constants may be in what is measured or not
    relative = {name_pattern(name) for shape, _ in runs for name in plan_of(shape).relative_parameters}
    leeway = {axis: _leeway(plan_of(last[axis][0].shape), plan) for axis, plan in largest.items()}
    local = {(kind, name) for kind in (Kind.START, Kind.UPDATE) for name in relative}
    found = _rows(grid, measured, leeway)
    rows = tuple(row for row in found if (row.quantity.kind, row.quantity.name.partition(" ")[0]) not in local)
    return CheckReport(base, tuple(factors), seeds, steps, rows, warnings, notes)


def _plan_once(
    callback: MLUCallback, plan: Plan | None, planned: dict[tuple[Shape, int], Plan], key: tuple[Shape, int]
) -> None:
    """Let a callback take the plan that another one in its place made at its shape, with the weights of another seed.

    One that would make the check's own plan, relative to the base that it was given, takes that.
    """
    if plan is not None and callback._given is None:
        callback._given = plan
    plan_of = callback._plan_of

    def once(trainer: Trainer, module: LightningModule) -> Plan:
        if key not in planned:
            planned[key] = plan_of(trainer, module)
        return planned[key]

    vars(callback)["_plan_of"] = once


_WITHOUT = (
    "There is no MLUCallback in this training: what is checked is the module without it, whose initial weights and "
    "learning rates do not follow its shape."
)
_Leeway = Mapping[str, tuple[float, float]]


def _distance_note(largest: Mapping[str, Plan]) -> tuple[str, ...]:
    """How much farther from its limit than the base the largest shape along each axis is."""
    ratios = {axis: max((d.ratio or 0.0 for d in plan.distances), default=0.0) for axis, plan in largest.items()}
    if not any(ratios.values()):
        return ()
    listed = ", ".join(f"{axis} {ratio:.3g}" for axis, ratio in ratios.items())
    far = [axis for axis, ratio in ratios.items() if ratio > FAR]
    advice = f"; above {FAR:g} ({', '.join(far)}) the best learning rate may be lower than the base's" if far else ""
    return (f"Distance ratio r = √(d/(l·m)) at the largest size along each axis: {listed}{advice}.",)


def _leeway(small: Plan, large: Plan) -> dict[str, tuple[float, float]]:
    """Half a power of head_dim for what attention branches do, by pattern of names, where plans change it by µP's rule."""
    before = {name_pattern(branch.name): branch.head_dim for branch in small.branches}
    found: dict[str, tuple[float, float]] = {}
    for number, branch in enumerate(large.branches):
        old, new = before.get(name_pattern(branch.name)), branch.head_dim
        if old is not None and new is not None and old != new:
            ends = (-0.5, 0.0) if new > old else (0.0, 0.5)
            own = [name for name, entry in large.parameters.items() if entry.branch == number]
            found |= dict.fromkeys(map(name_pattern, (branch.name, *own)), ends)
    return found


def _rows(
    grid: Sequence[Size], measured: Mapping[tuple[Shape, int], Measured], leeway: Mapping[str, _Leeway] | None = None
) -> Iterator[Row]:
    every = chain.from_iterable(found.measurements for found in measured.values())
    by_depth = sorted(every, key=lambda measurement: -len(measurement.values))
    shallowest = {measurement.quantity: measurement for measurement in by_depth}
    points: dict[tuple[Quantity, str], list[Point]] = defaultdict(list)
    for size in grid:
        for (shape, seed), found in measured.items():
            if shape == size.shape:
                for measurement in found.measurements:
                    quantity, values = measurement.quantity, measurement.values
                    mean = _geometric_mean(_at(shallowest[quantity].depths, measurement))
                    points[quantity, size.axis].append(Point(size.factor, seed, mean, min(values), max(values)))
    kinds, shrinks = list(Kind), {axis: _shrinks(axis, grid, measured) for axis in AXES}
    alone: dict[Quantity, float] = defaultdict(float)  # drifts along single axes, which add up where all grow
    for quantity, axis in sorted(points, key=lambda key: (kinds.index(key[0].kind), AXES.index(key[1]))):
        others = [points[quantity, other] for other in AXES if other != axis and (quantity, other) in points]
        low, high = (leeway or {}).get(axis, {}).get(quantity.name.partition(" ")[0], (0.0, 0.0))
        if quantity.kind is Kind.UPDATE:
            high += shrinks[axis]
        if axis == "together":
            low, high = low + min(alone[quantity], 0.0), high + max(alone[quantity], 0.0)
        row = fit_row(quantity, axis, points[quantity, axis], others, shallowest[quantity].may_be_still, (low, high))
        if row.verdict == "pass" and math.isfinite(row.slope):
            alone[quantity] += row.slope
        yield row


def _shrinks(axis: str, grid: Sequence[Size], measured: Mapping[tuple[Shape, int], Measured]) -> float:
    """Power, 1/2 at most, with which the ends of streams shrink and gradients from there grow.

    What branches add at random falls as l^(-1/2), and may be most of a stream, as where norms end branches and
    embeddings are small. It shows where an optimizer's eps is as large as gradients.
    """
    found = [
        (size.factor, of.stream_sizes)
        for size in grid
        for (shape, _), of in measured.items()
        if (size.axis, size.shape) == (axis, shape)
    ]
    slopes = [0.0]
    for name in found[0][1] if found else ():
        points = [(factor, of[name]) for factor, of in found if 0 < of.get(name, 0.0) < math.inf]
        if len({factor for factor, _ in points}) > 1:
            factors, of_stream = np.log(points).T
            slopes.append(float(np.polyfit(factors, of_stream, 1)[0]))
    return min(0.5, -min(slopes))


def _at(depths: Sequence[float], measurement: Measurement) -> Sequence[float]:
    """Values at given relative depths, interpolated between those where they were measured, if they depend on the depth."""
    values = measurement.values
    if not measurement.depths or not all(0 < value < math.inf for value in values):
        return values
    along = sorted(zip(measurement.depths, values, strict=True))
    return tuple(np.exp(np.interp(depths, [depth for depth, _ in along], np.log([value for _, value in along]))))


def _geometric_mean(values: Sequence[float]) -> float:
    if not all(map(math.isfinite, values)):
        return math.nan
    return geometric_mean(values) if min(values) > 0 else 0.0
