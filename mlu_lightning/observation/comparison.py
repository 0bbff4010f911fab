"""Distances between what two runs of any shapes make of one probe, at all depths and in all metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor

from mlu_lightning.observation.distances import (
    cka_distance,
    gram_distance,
    output_distance,
    procrustes_distance,
    rms_distance,
)
from mlu_lightning.observation.locations import OutputName, StreamName
from mlu_lightning.observation.probe import Observation
from mlu_lightning.observation.reference import Reference

__all__ = ["MetricName", "check_coupled", "compare", "compare_references", "validated_metrics"]

MetricName = Literal["rms", "gram", "cka", "procrustes", "output"]

_COUPLED = 0.25
"""Relative distance of embeddings up to which they count as coupled.

Independent ones are at sqrt(2). Coupled ones are at 0, except for the sampling noise of a base that each run builds for
itself (some percent), bfloat16 (0.4 %), and a norm over D coordinates right behind the embedding, of order 1/sqrt(D).
"""


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
    found: dict[str, float] = {}
    for metric in metrics:
        for name in observation:
            if name in reference and isinstance(name, OutputName if metric == "output" else StreamName):
                label = str(name) if metric == "output" else f"{metric}/{name}"
                found[label] = float(_DISTANCES[metric](observation[name], reference[name]))
    return found


def compare_references(
    reference: Reference, other: Reference, metrics: Sequence[MetricName] = get_args(MetricName)
) -> dict[int, dict[str, float]]:
    """Measure the distances between two recorded runs, at the steps that both have.

    Of two seeds of one run they are the noise floor: no other run can be expected to be nearer to either.

    Args:
        reference: Recorded run with the smaller embedding, if ``metrics`` has ``"rms"``.
        other: Recorded run with the same probe.
        metrics: Metrics, as for :func:`compare`.

    Returns:
        What :func:`compare` returns, by step.

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


def check_coupled(observation: Observation, reference: Observation) -> None:
    """Refuse embeddings at step 0 that are not the first coordinates of the reference's (theory.md, section 4)."""
    names = [name for name in observation if isinstance(name, StreamName) and name.depth == 0 and name in reference]
    if not names:
        raise ValueError(
            "Whether the embeddings are coupled cannot be checked, because the reference was not recorded at depth 0, so "
            '"rms" cannot be measured. Record it with 0 among depths, or choose other metrics ("gram", "cka", '
            '"procrustes" and "output" need no coupling).'
        )
    for name in names:
        size = reference[name].square().mean().sqrt()
        distance = float(rms_distance(observation[name], reference[name]) / size)
        if not distance <= _COUPLED:
            raise ValueError(
                f"The embeddings at step 0 are not coupled: the run's stream at {name} differs from the first coordinates "
                f'of the reference\'s by {distance:.2g} of its size (independent embeddings by 1.4), so "rms" would '
                'compare unrelated coordinates. Train both runs with MLUCallback(init="coupled") with the same seed and '
                'base, or choose other metrics ("gram", "cka", "procrustes" and "output" need no coupling).'
            )


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
