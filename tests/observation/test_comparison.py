"""Comparison of recorded runs, and the check that embeddings are coupled."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mlu_lightning.observation import Observation, OutputName, Reference, StreamName, compare_references
from mlu_lightning.observation.comparison import uncoupled
from mlu_lightning.observation.reference_format import ReferenceHeader
from mlu_lightning.observation.reference_writer import ReferenceWriter

POSITIONS, OUTPUTS = 6, 3


def values(step: int, embedding: int) -> Observation:
    draws = torch.Generator().manual_seed(100 * embedding + step)
    return {
        StreamName(1): torch.randn(POSITIONS, embedding, generator=draws),
        OutputName(): torch.randn(POSITIONS, OUTPUTS, generator=draws),
    }


def recorded(path: Path, embedding: int, steps: list[int], probe: Tensor | None = None) -> Reference:
    locations = {name: (POSITIONS, size) for name, size in ((StreamName(1), embedding), (OutputName(), OUTPUTS))}
    header = ReferenceHeader((4,), (embedding,), {"mlp": 16}, (1.0,), locations, "training_step", {}, None)
    writer = ReferenceWriter(path, header, torch.ones(POSITIONS, 2) if probe is None else probe)
    for step in steps:
        writer.write(step, values(step, embedding), torch.zeros(step))
    return Reference.load(path)


def test_recorded_runs_are_compared_at_the_steps_that_both_have(tmp_path: Path) -> None:
    small, large = recorded(tmp_path / "small", 4, [0, 2, 3, 8]), recorded(tmp_path / "large", 8, [0, 1, 3, 8, 9])
    found = compare_references(small, large, ["gram", "rms", "output"])
    assert list(found) == [0, 3, 8]
    for step, distances in found.items():
        h, r = (values(step, embedding)["s=1"].double().numpy() for embedding in (4, 8))
        f, g = (values(step, embedding)["output"].double().numpy() for embedding in (4, 8))
        expected = {
            "gram/s=1": np.linalg.norm(h @ h.T / 4 - r @ r.T / 8) / POSITIONS,
            "rms/s=1": np.sqrt(np.mean((h - r[:, :4]) ** 2)),
            "output": np.sqrt(np.mean((f - g) ** 2)),
        }
        assert distances == pytest.approx(expected, rel=1e-12)  # both in float64
    everything = compare_references(small, large)
    assert set(everything[0]) == {"rms/s=1", "gram/s=1", "cka/s=1", "procrustes/s=1", "output"}
    assert all(everything[step].items() >= distances.items() for step, distances in found.items())


def test_recorded_runs_with_different_probes_are_refused(tmp_path: Path) -> None:
    one = recorded(tmp_path / "one", 4, [0, 1])
    other = recorded(tmp_path / "other", 4, [0, 1], probe=torch.zeros(POSITIONS, 2))
    remedy = r"one and .*other were recorded with different probes.*ReferenceRecorder\(probe='.*one'\)"
    with pytest.raises(ValueError, match=remedy):
        compare_references(one, other)


def test_recorded_runs_without_a_common_step_are_refused(tmp_path: Path) -> None:
    one, other = recorded(tmp_path / "one", 4, [0, 2]), recorded(tmp_path / "other", 4, [1, 3])
    with pytest.raises(ValueError, match=r"one and .*other have no step in common.*ReferenceRecorder\(steps=\"log\"\)"):
        compare_references(one, other)


def refused(message: str, run: Observation, reference: Observation) -> None:
    found = uncoupled(run, reference)
    assert found is not None and re.search(message, ". ".join(found))


def test_embeddings_that_are_near_the_references_first_coordinates_count_as_coupled() -> None:
    large = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    near, far = ({StreamName(0): large[:, :8] + size * noise} for size in (0.1, 0.5))
    assert uncoupled(near, {StreamName(0): large, StreamName(1): -large}) is None
    refused(r"not coupled: .* at s=0 differs .* by 0.5\d? of its size", far, {StreamName(0): large})


@pytest.mark.parametrize("size", [math.nan, 0.0])
def test_embeddings_of_which_nothing_can_be_told_are_not_coupled(size: float) -> None:
    embedding = {StreamName(0): torch.full((5, 4), size)}
    refused(r"not coupled: .* by nan of its size.*MLUCallback\(init=\"coupled\"\)", embedding, embedding)
    refused("not coupled", {StreamName(0): torch.ones(5, 4)}, embedding)


def test_every_stream_has_to_be_coupled() -> None:
    one, other = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(0))

    def streams(one: Tensor, other: Tensor) -> Observation:
        return {StreamName(0): one, StreamName(0, 1): other}

    reference = streams(one, other)
    assert uncoupled(streams(one[:, :8], other[:, :8]), reference) is None
    refused("not coupled: the run's stream at stream1/s=0 differs", streams(one[:, :8], other[:, 8:]), reference)
    refused("not coupled: the run's stream at s=0 differs", streams(one[:, 8:], other[:, :8]), reference)


def test_reference_without_depth_zero_cannot_be_checked() -> None:
    run, reference = ({StreamName(s): torch.ones(5, 4), StreamName(1): torch.ones(5, 4)} for s in (0, 0.5))
    refused(r"not recorded at depth 0\. Record it with 0 among depths", run, reference)
