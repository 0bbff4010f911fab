"""Comparison of recorded runs, and the check that embeddings are coupled."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mlu_lightning.observation import Observation, OutputName, Reference, StreamName, compare_references
from mlu_lightning.observation.comparison import check_coupled
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
    small = recorded(tmp_path / "small", 4, [0, 2, 3, 8])
    large = recorded(tmp_path / "large", 8, [0, 1, 3, 8, 9])
    found = compare_references(small, large, ["gram", "rms", "output"])
    assert list(found) == [0, 3, 8]
    for step, distances in found.items():
        ours, theirs = values(step, 4), values(step, 8)
        h, r = ours["s=1"].double().numpy(), theirs["s=1"].double().numpy()
        f, g = ours["output"].double().numpy(), theirs["output"].double().numpy()
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
    remedy = r"one and .*other have no step in common.*ReferenceRecorder\(steps=\"log\"\)"
    with pytest.raises(ValueError, match=remedy):
        compare_references(one, other)


def test_embeddings_that_are_near_the_references_first_coordinates_count_as_coupled() -> None:
    large = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    check_coupled({StreamName(0): large[:, :8] + 0.1 * noise}, {StreamName(0): large, StreamName(1): -large})
    with pytest.raises(ValueError, match=r"not coupled: .* at s=0 differs .* by 0.5\d? of its size"):
        check_coupled({StreamName(0): large[:, :8] + 0.5 * noise}, {StreamName(0): large})


@pytest.mark.parametrize("size", [math.nan, 0.0])
def test_embeddings_of_which_nothing_can_be_told_are_not_coupled(size: float) -> None:
    embedding = torch.full((5, 4), size)
    with pytest.raises(ValueError, match=r"not coupled: .* by nan of its size.*MLUCallback\(init=\"coupled\"\)"):
        check_coupled({StreamName(0): embedding}, {StreamName(0): embedding})
    with pytest.raises(ValueError, match="not coupled"):
        check_coupled({StreamName(0): torch.ones(5, 4)}, {StreamName(0): embedding})


def test_every_stream_has_to_be_coupled() -> None:
    one, other = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(0))
    reference = {StreamName(0): one, StreamName(0, 1): other}
    check_coupled({StreamName(0): one[:, :8], StreamName(0, 1): other[:, :8]}, reference)
    with pytest.raises(ValueError, match=r"not coupled: the run's stream at stream1/s=0 differs"):
        check_coupled({StreamName(0): one[:, :8], StreamName(0, 1): other[:, 8:]}, reference)
    with pytest.raises(ValueError, match=r"not coupled: the run's stream at s=0 differs"):
        check_coupled({StreamName(0): one[:, 8:], StreamName(0, 1): other[:, :8]}, reference)


def test_reference_without_depth_zero_cannot_be_checked() -> None:
    stream = torch.ones(5, 4)
    remedy = (
        r"not recorded at depth 0, so \"rms\" cannot be measured.*0 among depths, or choose other metrics \(\"gram\""
    )
    with pytest.raises(ValueError, match=remedy):
        check_coupled({StreamName(0): stream, StreamName(1): stream}, {StreamName(0.5): stream, StreamName(1): stream})
