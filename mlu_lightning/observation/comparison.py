"""Measure distances between two runs of any shape on one probe, and how far the features of a run have moved."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor

from mlu_lightning.discovery.structure import BranchKind
from mlu_lightning.observation.distances import (
    cka_distance,
    gram_distance,
    output_distance,
    procrustes_distance,
    rms_distance,
)
from mlu_lightning.observation.locations import FeatureName, OutputName, StreamName
from mlu_lightning.observation.probe import Observation
from mlu_lightning.observation.reference import Reference

MetricName = Literal["rms", "gram", "cka", "procrustes", "output"]

_COUPLED = 0.25
"""Relative distance of embeddings up to which they count as coupled; independent ones are at sqrt(2).

Coupled ones are not at 0 for the noise of a base that each run draws, bfloat16, and a norm over D right behind them."""


def compare(observation: Observation, reference: Observation, metrics: Sequence[MetricName]) -> dict[str, float]:
    """Measure the distances of what a run makes of a probe from what a reference makes of it.

    Args:
        observation: Values [positions, dimension] by location, as :func:`~mlu_lightning.observation.observe` returns them.
        reference: The same of the reference; locations that only one of them has are left out.
        metrics: ``"rms"``, ``"gram"``, ``"cka"`` and ``"procrustes"`` of streams, ``"output"`` of outputs.

    Returns:
        Distances by ``<metric>/<location>``, and by ``"output"`` for outputs.

    Raises:
        ValueError: If shapes do not allow a metric.

    >>> import torch
    >>> run = {StreamName(0): torch.ones(4, 2), OutputName(): torch.ones(4, 3)}
    >>> other = {StreamName(0): torch.ones(4, 8), OutputName(): torch.zeros(4, 3)}
    >>> compare(run, other, ["rms", "gram", "output"])
    {'rms/s=0': 0.0, 'gram/s=0': 0.0, 'output': 1.0}
    """
    return {
        str(name) if metric == "output" else f"{metric}/{name}": float(_DISTANCES[metric](values, reference[name]))
        for metric in metrics
        for name, values in observation.items()
        if name in reference and isinstance(name, OutputName if metric == "output" else StreamName)
    }


def compare_references(
    reference: Reference, other: Reference, metrics: Sequence[MetricName] = get_args(MetricName)
) -> dict[int, dict[str, float]]:
    """Measure the distances between two recorded runs, at the steps that both have.

    Of two seeds of one run they are the noise floor: no other run can be expected to be nearer to either.

    Args:
        reference: Recorded run with the smaller embedding, if ``metrics`` has ``"rms"``.
        other: Recorded run with the same probe.
        metrics: Metrics, as for :func:`compare`, whose distances are returned by step.

    Raises:
        ValueError: If the probes differ, or there is no common step.
    """
    if reference.probe_hash != other.probe_hash:
        raise ValueError(
            f"{reference.path} and {other.path} were recorded with different probes, so nothing in them can be compared. "
            f"Record one of them again with ReferenceRecorder(probe={str(reference.path)!r})."
        )
    common = sorted(set(reference.steps) & set(other.steps))
    if not common:
        raise ValueError(
            f"{reference.path} and {other.path} have no step in common. Record both at the same steps, for example with "
            'ReferenceRecorder(steps="log").'
        )
    return {step: compare(reference.read(step), other.read(step), metrics) for step in common}


def feature_updates(before: Observation, after: Observation) -> dict[str, float]:
    """Measure how far what was observed has moved: by Θ(1) in MLU, at every shape (theory.md, section 1).

    Args:
        before: Observation [rows, dimension] by location, as :func:`mlu_lightning.observation.observe` makes it.
        after: Another one of the same batch; what has no counterpart of its shape in both is left out.

    Returns:
        Root mean squares of the differences: ``"attention/<branch>"``, ``"mlp/<branch>"`` and ``"convolution/<branch>"`` of
        pre-activations, ``"all/mlp"`` of all branches of a kind, ``"stream/s=0.5"`` and ``"output"``. None of these names
        is the folder of another, which a logger that keeps each value in a file of its name could not have.

    >>> import torch
    >>> before = {FeatureName("mlp", f"blocks.{i}"): torch.zeros(2, 3) for i in range(2)} | {StreamName(1): torch.zeros(1)}
    >>> after = {name: values + 1 for name, values in before.items()}
    >>> feature_updates(before, after)
    {'mlp/blocks.0': 1.0, 'mlp/blocks.1': 1.0, 'stream/s=1': 1.0, 'all/mlp': 1.0}
    """
    found: dict[str, float] = {}
    kinds: dict[BranchKind, list[float]] = defaultdict(list)
    for name, values in after.items():
        if name not in before or before[name].shape != values.shape:
            continue
        change = rms_change(before[name], values)
        found[f"stream/{name}" if isinstance(name, StreamName) and name.number == 0 else str(name)] = change
        if isinstance(name, FeatureName):
            kinds[name.kind].append(change)
    return found | {
        f"all/{kind}": math.sqrt(math.fsum(value**2 for value in values) / len(values))
        for kind, values in kinds.items()
    }


def rms_change(before: Tensor, after: Tensor) -> float:
    """Root mean square of a difference, without entries that are -inf in both, as logits are of keys that cannot be seen.

    Args:
        before: Values of any shape.
        after: Values of the same shape; where any are not finite, the result is not.
    """
    hidden = before.isneginf() & after.isneginf()
    if hidden.any():  # choosing takes longer than all else
        before, after = before[~hidden], after[~hidden]
    return (after.double() - before.double()).square().mean().sqrt().item()


def uncoupled(observation: Observation, reference: Observation) -> tuple[str, str] | None:
    """Why embeddings at step 0 are not the first coordinates of the reference's (theory.md, section 4), and the remedy."""
    names = [name for name in observation if isinstance(name, StreamName) and name.depth == 0 and name in reference]
    if not names:
        return (
            "whether the embeddings are coupled cannot be checked, because the reference was not recorded at depth 0",
            "Record it with 0 among depths",
        )
    for name in names:
        size = reference[name].square().mean().sqrt()
        distance = float(rms_distance(observation[name], reference[name]) / size)
        if not distance <= _COUPLED:
            return (
                f"the embeddings at step 0 are not coupled: the run's stream at {name} differs from the first coordinates "
                f"of the reference's by {distance:.2g} of its size (independent embeddings by 1.4)",
                'Train both runs with MLUCallback(init="coupled") with the same seed and base',
            )
    return None


def validated_metrics(metrics: Sequence[str]) -> tuple[MetricName, ...]:
    """Refuse what is not a choice of metrics."""
    known: dict[str, MetricName] = {name: name for name in get_args(MetricName)}
    if not metrics or isinstance(metrics, str) or not all(name in known for name in metrics):
        raise ValueError(f"metrics={metrics!r} should be a list of some of: {', '.join(known)}.")
    return tuple(known[name] for name in metrics)


_DISTANCES: Mapping[MetricName, Callable[[Tensor, Tensor], Tensor]] = {
    "rms": rms_distance,
    "gram": gram_distance,
    "cka": cka_distance,
    "procrustes": procrustes_distance,
    "output": output_distance,
}
