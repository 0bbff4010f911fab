"""Run the trials of a search, and repeated trainings, in one process or in several."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
import torch
from optuna.trial import TrialState

from mlu_lightning.checking.preparation import USERS_ERRORS
from mlu_lightning.planning import Plan
from mlu_lightning.planning.tuned import Tuned
from mlu_lightning.tuning.space import Dimension, factors_at
from mlu_lightning.tuning.storage import DONE, LONGEST, Place, add_again, open_study, quiet_optuna, read_again
from mlu_lightning.tuning.training import Training, UnknownMetric
from mlu_lightning.utilities.workers import worker_pool

HALVED = "stopped"  # how the reason of a trial begins that did worse than others
_HOPELESS = 10  # trials, all of which failed, after which no more are made
_PAUSE = 1.0  # seconds between looks at what other processes do

Progress = Callable[[int, int, float | None], None]
"""Takes how many trials are done, of how many, and the best value so far."""


@dataclass(frozen=True)
class Crew:
    """Processes that train; without a pool it is this one."""

    size: int
    pool: ProcessPoolExecutor | None = None


@contextmanager
def assembled(workers: int) -> Iterator[Crew]:
    """Start so many processes, if they are more than one."""
    if workers == 1:
        yield Crew(1)
        return
    with worker_pool(workers, max(1, torch.get_num_threads() // workers)) as pool:
        yield Crew(workers, pool)


@dataclass(frozen=True)
class Search:
    """Factors that are searched in a study by training the base."""

    training: Training
    plan: Plan
    space: tuple[Dimension, ...]
    place: Place
    trials: int
    seed: int
    end: float = math.inf  # time, in seconds of the clock, after which no trial begins

    def run(self, crew: Crew, progress: Progress) -> None:
        """Make trials until the study has enough or the time is over; refuse a study in which all of them failed."""
        study, _ = open_study(self.place, self.space)
        if crew.pool is None:
            self.work(progress)
        else:
            running = {crew.pool.submit(self.work) for _ in range(crew.size)}
            while running:
                done, running = wait(running, _PAUSE, FIRST_COMPLETED)
                for future in done:
                    _result(future)
                progress(*self._state(study))
        failed = [trial for trial in study.get_trials(deepcopy=False) if trial.state in DONE]
        if failed and all(_has_failed(trial) for trial in failed):
            reason = failed[0].user_attrs.get("reason", "its process ended")
            raise ValueError(
                f"None of {len(failed)} trials came to an end. The first did not because of this: {reason}. Mend that, or "
                "begin from another learning rate, and give the study another name (--study) or place (--out)."
            )

    def work(self, progress: Progress = lambda done, total, best: None) -> None:
        """Make trials, as one of those who do, until there are enough."""
        study, _ = open_study(self.place, self.space)
        with quiet_optuna():
            progress(*self._state(study))
            while self._goes_on(study):
                study.optimize(self._trial, n_trials=1)
                progress(*self._state(study))

    def _goes_on(self, study: optuna.Study) -> bool:
        done = [trial for trial in study.get_trials(deepcopy=False) if trial.state in DONE]
        hopeless = len(done) >= _HOPELESS and all(_has_failed(trial) for trial in done)
        return len(done) < self.trials and time.time() < self.end and not hopeless

    def _state(self, study: optuna.Study) -> tuple[int, int, float | None]:
        done = [trial for trial in study.get_trials(deepcopy=False) if trial.state in DONE]
        values = [trial.value for trial in done if trial.state == TrialState.COMPLETE and trial.value is not None]
        best = min if self.place.mode == "min" else max
        return len(done), self.trials, best(values, default=None)

    def _trial(self, trial: optuna.Trial) -> float:
        point = {d.name: trial.suggest_float(d.name, d.low, d.high, log=True) for d in self.space}
        tuned = factors_at(self.space, point)

        def report(percent: int, value: float) -> bool:
            trial.report(value, percent)
            return bool(tuned) and trial.should_prune()

        try:
            outcome = self.training.run(self.plan, tuned, self.seed, report)
        except UnknownMetric:
            raise
        except USERS_ERRORS as error:
            reason = f"{type(error).__name__}: {error}"
            if not tuned:
                trial.set_user_attr("reason", reason[:LONGEST])
                raise ValueError(f"The base cannot be trained as it is: {reason}") from error
            return _pruned(trial, reason)
        if not math.isfinite(outcome.value):
            return _pruned(trial, f"{self.training.metric} is {outcome.value} after {outcome.percent} % of the steps")
        if outcome.percent < 100:
            return _pruned(trial, f"{HALVED} after {outcome.percent} % of the steps, below the better half")
        return outcome.value


@dataclass(frozen=True)
class Again:
    """A training that is made once more, with its name in the storage."""

    training: Training
    plan: Plan
    key: Mapping[str, Any]
    tuned: Tuned
    seed: int

    def run(self) -> tuple[float, str]:
        """Train, and return the metric, or infinity and why."""
        try:
            value = self.training.run(self.plan, self.tuned, self.seed).value
        except UnknownMetric:
            raise
        except USERS_ERRORS as error:
            return math.inf, f"{type(error).__name__}: {error}"
        return (value, "") if math.isfinite(value) else (math.inf, f"{self.training.metric} is {value}")


def train_again(again: optuna.Study, cases: Sequence[Again], crew: Crew, progress: Progress) -> None:
    """Make those trainings that the study does not have yet."""
    once = {(json.dumps(case.key, sort_keys=True), case.seed): case for case in cases}
    missing = [case for case in once.values() if case.seed not in read_again(again, case.key)]
    progress(0, len(missing), None)

    def keep(number: int, case: Again, value: float, reason: str) -> None:
        with quiet_optuna():
            add_again(again, case.key, case.seed, value, reason)
        progress(number, len(missing), None)

    if crew.pool is None:
        for number, case in enumerate(missing, 1):
            keep(number, case, *case.run())
        return
    pending = {crew.pool.submit(case.run): case for case in missing}
    for number, future in enumerate(as_completed(pending), 1):
        keep(number, pending[future], *_result(future))


def _result(future: Any) -> Any:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "A process that trained has ended, as where memory is short. What was tried is kept: give the same command "
            "again, with fewer processes (--workers)."
        ) from error


def _pruned(trial: optuna.Trial, reason: str) -> float:
    trial.set_user_attr("reason", reason[:LONGEST])
    raise optuna.TrialPruned(reason)


def _has_failed(trial: Any) -> bool:
    reason = str(trial.user_attrs.get("reason", ""))
    return trial.state != TrialState.COMPLETE and not reason.startswith(HALVED)
