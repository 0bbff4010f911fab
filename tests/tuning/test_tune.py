"""A search from its trials to the file of factors: planted gains, noise, resuming, halving, and what fails."""

import importlib
import math
import signal
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from helpers.trainers import loader, quiet
from helpers.tuned_trainings import BATCHES, DATA, TRAINER, Failing, Small, Spoiled, tuned
from rich.console import Console

from mlu_lightning import MLUCallback, Plan, tune
from mlu_lightning.models import ResNet
from mlu_lightning.planning.tuned import read_tuned
from mlu_lightning.tuning.found import Confirmed, Estimate, TrialRecord, Tuning
from mlu_lightning.tuning.training import Training


@pytest.fixture
def own_interrupts() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)  # a Trainer ignores further ones after the first
    yield
    signal.signal(signal.SIGINT, before)


def rendered(found: Tuning) -> str:
    text = StringIO()
    Console(file=text, width=200).print(found.tables())
    return text.getvalue()


def test_a_trial_is_a_fit_with_the_factors() -> None:
    factors = {"embedding": {"lr": 4.0, "std": 2.0}, "branch_out": {"std": 0.5}}
    training = Training.of(Small, Small, data=DATA, trainer=TRAINER)
    torch.manual_seed(5)
    module, trainer = Small(), quiet(MLUCallback(Small(), tuned=factors), max_steps=8)
    trainer.fit(module, loader(BATCHES), loader(BATCHES[:2]))
    reported: dict[int, float] = {}
    outcome = training.run(training.plan(), factors, 5, lambda percent, value: bool(reported.update({percent: value})))
    assert outcome.value == trainer.validate(module, loader(BATCHES[:2]), verbose=False)[0]["val_loss"]
    assert [*reported] == [25, 50, 75]
    assert outcome.percent == 100
    unmonitored = Training.of(Small, Small, data=BATCHES, metric="train_loss", trainer=TRAINER)
    reported.clear()
    last = unmonitored.run(unmonitored.plan(), {}, 5, lambda percent, value: bool(reported.update({percent: value})))
    assert [*reported] == [25, 50, 75]
    assert len({*reported.values(), last.value}) == 4


def test_a_planted_gain_is_found_with_other_seeds_written_and_confirmed(tmp_path: Path) -> None:
    found = tuned(tmp_path, trials=5, seeds=2, roles=[], confirm={"2 × depth": lambda: Small(depth=2)})
    assert found.found["branch_in"]["lr"] > 2
    assert found.gain.is_convincing and found.tuned == found.found
    means = {number: math.fsum(losses.values()) for number, losses in found.again.items()}
    assert {*map(tuple, found.again.values())} == {(1, 2)}
    assert found.chosen == min(means, key=lambda number: means[number])
    training = Training.of(Small, Small, data=DATA, trainer=TRAINER)
    plan = training.plan()
    expected = [[training.run(plan, factors, seed).value for seed in (3, 4)] for factors in ({}, found.tuned)]
    assert [*map(list, found.gains)] == expected
    for path in found.save(tmp_path):
        assert path.stat().st_size > 100
    assert read_tuned(tmp_path / "tuned.yaml") == found.tuned
    quiet(callback := MLUCallback(Small(), tuned=tmp_path / "tuned.yaml"), max_steps=1).fit(
        Small(4, 8, 8), loader(BATCHES)
    )
    assert callback.plan is not None and callback.plan.tuned == found.tuned
    (confirmed,) = found.confirmed
    assert "At 2 × depth: gain of the factors" in confirmed.verdict()
    assert {len(losses) for losses in confirmed.losses.values()} == {2}


def test_noise_is_no_gain(tmp_path: Path) -> None:
    class Noise(Small):
        def validation_step(self, batch: Any) -> None:
            self.log("val_loss", torch.rand(()))

    found = tuned(tmp_path, build=Noise, seeds=3, trials=2)
    assert found.verdict().startswith("No gain: val_loss")
    found.save(tmp_path)
    assert (tmp_path / "tuned.yaml").read_text().endswith("{}\n")
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    again = optuna.load_study(study_name="mlu-tune again", storage=storage).trials
    assert len({(trial.user_attrs["key"], trial.user_attrs["seed"]) for trial in again}) == len(again)  # each once
    assert read_tuned(tmp_path / "tuned.yaml") == found.tuned == {}


@pytest.mark.parametrize("trials", [3, pytest.param(13, marks=pytest.mark.slow)])  # of which the first ten are random
def test_a_search_that_was_interrupted_goes_on_as_it_would_have(
    tmp_path: Path, trials: int, own_interrupts: None
) -> None:
    whole = tuned(tmp_path / "whole", trials=trials)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "parts", trials=trials, callbacks=Failing(KeyboardInterrupt, tmp_path / "count", trials - 1))
    parts = tuned(tmp_path / "parts", trials=trials + 1)
    assert [trial.reason for trial in parts.trials if trial.number == trials - 1] == ["its process ended"]
    for mine, theirs in zip(parts.trials[: trials - 1], whole.trials[: trials - 1], strict=True):
        assert mine == theirs
    assert len(parts.trials) == trials + 1
    assert tuned(tmp_path / "parts", trials=trials + 1, minutes=0) == parts  # nothing is trained again


def test_trials_that_do_worse_are_stopped(tmp_path: Path) -> None:
    found = tuned(tmp_path, trials=6)
    stopped = [trial for trial in found.trials if trial.reason]
    reasons = {f"stopped after {percent} % of the steps, below the better half" for percent in (25, 50)}
    assert {trial.reason for trial in stopped} <= reasons
    for trial in stopped:
        earlier = [other.reported[25] for other in found.trials[: trial.number]]
        assert trial.value is None
        assert trial.reported[25] > min(earlier)
    assert 1 <= len(stopped) <= 4


def test_a_trial_that_fails_has_its_reason_and_the_search_goes_on(tmp_path: Path) -> None:
    found = tuned(tmp_path, build=Spoiled, metric="spoiled", trials=3)
    assert [trial.reason for trial in found.trials] == ["", *["spoiled is nan after 25 % of the steps"] * 2]
    assert "2 of 3 trials failed, the first because of: spoiled is nan" in rendered(found)
    found = tuned(tmp_path / "raised", trials=2, callbacks=Failing(RuntimeError, tmp_path / "count", 1))
    assert found.trials[1].reason == "RuntimeError: out of luck"
    assert all(math.isinf(loss) for losses in found.gains for loss in losses)
    assert found.tuned == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "accuracy"}, "logs no 'accuracy'.*It logs .*val_loss"),
        ({"build": Spoiled, "metric": "never"}, "None of 4 trials.*The first did not because of this: never is nan"),
        ({"callbacks": lambda base: []}, "no MLUCallback"),
        ({"callbacks": lambda base: [MLUCallback("absolute")]}, "has no base"),
        ({"callbacks": lambda base: [MLUCallback(plan=Plan.from_model(base, BATCHES[0]))]}, "has no base"),
        ({"callbacks": lambda base: [MLUCallback(base, tuned={"embedding": {"lr": 2}})]}, "tuned factors already"),
        ({"trials": 0}, "1 or more"),
        ({"build": lambda: Small(), "workers": 2}, "other processes cannot be given.*top of a module"),
        ({"storage": "nonsense://nowhere"}, "cannot be kept in nonsense.*--storage"),
        ({"storage": "sqlite:////nowhere/at/all.db"}, "cannot be kept in sqlite.*unable to open"),
    ],
)
def test_bad_input_is_an_error_in_plain_words(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuned(tmp_path, **changes)


def test_an_optimizer_that_is_not_in_the_table_is_an_error(tmp_path: Path) -> None:
    class Sidestep(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> Any:
            return None if closure is None else closure()

    class Odd(Small):
        def configure_optimizers(self) -> Any:
            return Sidestep(self.parameters(), {"lr": 0.1})

    with pytest.raises(ValueError, match=r"base cannot be trained as it is: .*Sidestep"):
        tuned(tmp_path, build=Odd)


def test_a_study_of_something_else_is_refused(tmp_path: Path) -> None:
    tuned(tmp_path, trials=1)
    for other, what in (
        ({"roles": ["readout"]}, "space"),
        ({"trainer": TRAINER | {"max_steps": 4}}, "training"),
        ({"mode": "max"}, "mode"),
        ({"build": lambda: ResNet(2, 4, 4, 3, 2)}, "training"),
        ({"metric": "train_loss", "seed": 3}, "metric, seed"),
    ):
        with pytest.raises(ValueError, match=f"of something else: its {what} is not"):
            tuned(tmp_path, **other)


def test_without_optuna_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("mlu_lightning.tuning.tune"), "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'mlu-lightning\[tune\]'"):
        tune(Small, DATA, trainer=TRAINER, out=tmp_path)


def test_gains_are_of_pairs_and_signed() -> None:
    trials = tuple(TrialRecord(n, {}, *of) for n, of in enumerate([(1.0,), (3.0,), (2.0, "stopped"), (None,)]))
    for mode, sign, first in (("min", 1, 0), ("max", -1, 1)):
        found = Tuning("loss", mode, (), trials, {}, ([3.0, 5.0, 4.0], [2.0, 3.0, 3.0]))  # type: ignore[arg-type]
        assert found.gain == Estimate(sign * 4 / 3, pytest.approx(1 / 3))
        assert found.best_first[0].number == first
        assert found.gain.is_convincing == (sign > 0)
    losses = {"tuned": [2.0, 2.1], "untuned": [2.5, 2.7], "lr / 2": [1.5, 1.7], "lr × 2": [2.0, 2.2]}
    moved = Confirmed("4 × depth", "min", losses)
    assert moved.better_rates == ["lr / 2"]
    assert "the optimum has moved: lr / 2 is better by 0.4500 ± 0.0500" in moved.verdict()
    assert not Tuning("loss", "min", (), trials, {}, ([1.0], [math.inf])).gain.is_convincing
    assert Tuning("loss", "min", (), trials, {}, ([math.inf], [1.0])).gain.is_convincing
    for after, said in ((1.0, "Perhaps a gain, but one seed does not tell it from noise"), (3.1, "No gain")):
        alone = Tuning("loss", "min", (), trials, {}, ([3.0], [after]), chosen=0)
        assert alone.tuned == {} and alone.verdict().startswith(said)
