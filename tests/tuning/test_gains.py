"""What is a gain: more than two standard errors of what pairs of seeds differ by, in closed form."""

import pytest

from mlu_lightning.tuning import Tuning
from mlu_lightning.tuning.found import TrialRecord
from mlu_lightning.tuning.space import Dimension

SPACE = (Dimension("embedding.std", ("embedding",), "std", 0.125, 8.0),)
TRIALS = (TrialRecord(0, {"embedding.std": 1.0}, 2.0), TrialRecord(1, {"embedding.std": 2.0}, 1.9))
DEFAULT = [2.0, 2.1, 1.9]


@pytest.mark.parametrize(
    ("differences", "mean", "error", "is_gain"),
    [
        ([0.3, 0.2, 0.1], 0.2, 0.1 / 3**0.5, True),
        ([0.3, 0.0, 0.0], 0.1, 0.1, False),  # one standard error
        ([-0.3, -0.2, -0.1], -0.2, 0.1 / 3**0.5, False),
    ],
)
def test_what_is_within_the_noise_of_seeds_is_not_written(
    differences: list[float], mean: float, error: float, is_gain: bool
) -> None:
    found = [value - difference for value, difference in zip(DEFAULT, differences, strict=True)]
    tuning = Tuning("val_loss", "min", SPACE, TRIALS, {1: {1: 1.9}}, (DEFAULT, found), 1)
    assert (tuning.gain.value, tuning.gain.error) == pytest.approx((mean, error))
    assert tuning.tuned == ({"embedding": {"std": 2.0}} if is_gain else {})
    assert tuning.verdict().startswith("Gain" if is_gain else "No gain") and ("{}" in tuning.to_yaml()) == (not is_gain)
