"""Optuna studies and their storage: open one, sample the next trial, keep repeated trainings."""

from __future__ import annotations

import json
import math
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from mlu_lightning.tuning.space import Dimension

Mode = Literal["min", "max"]
DONE = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
_HEARTBEAT, _GRACE = 15, 60  # seconds between signs of life, and without any, after which a trial has failed
LONGEST = 500  # characters of a reason


@dataclass(frozen=True)
class Place:
    """Where a study is, and what it is of."""

    storage: str  # URL of a database, or path of a journal file
    name: str
    seed: int  # of what is tried
    mode: Mode
    content: Mapping[str, Any]  # whatever else has to be the same for all who work on the study


def open_study(place: Place, space: Sequence[Dimension]) -> tuple[optuna.Study, optuna.Study]:
    """Open or create a study, and the one that keeps repeated trainings; refuse a study of something else."""
    direction: Literal["minimize", "maximize"] = "minimize" if place.mode == "min" else "maximize"
    with quiet_optuna():
        try:
            storage = _storage(place.storage)
            study = optuna.create_study(
                storage=storage,
                study_name=place.name,
                direction=direction,
                load_if_exists=True,
                sampler=_ByNumber(place.seed),
                # a training that is halfway goes on if it is among the better half of those that were there
                pruner=SuccessiveHalvingPruner(min_resource=25, reduction_factor=2),
            )
            again = optuna.create_study(storage=storage, study_name=f"{place.name} again", load_if_exists=True)
        except (SQLAlchemyError, OSError, ImportError, optuna.exceptions.OptunaError) as error:
            wrong = str(error).splitlines()[0].rstrip(".")
            raise ValueError(
                f"The study cannot be kept in {place.storage}: {wrong}. Give storage (--storage) the URL of a database, "
                "such as sqlite:///study.db or postgresql+psycopg://user:password@host/name, with its driver installed, or "
                "the path of a file that all machines can lock, for a journal."
            ) from error
    _require_same(study, place, space)
    return study, again


def add_again(again: optuna.Study, key: Mapping[str, Any], seed: int, value: float, reason: str = "") -> None:
    """Keep the value of a training that was made again; one without a value has failed."""
    attributes = {"key": _text(key), "seed": seed, "reason": reason[:LONGEST]}
    failed = not math.isfinite(value)
    again.add_trial(
        optuna.create_trial(
            state=TrialState.FAIL if failed else TrialState.COMPLETE,
            value=None if failed else value,
            user_attrs=attributes,
        )
    )


def read_again(again: optuna.Study, key: Mapping[str, Any]) -> dict[int, float]:
    """Values by seed of what was trained again, infinite where it failed."""
    wanted = _text(key)
    trials = [trial for trial in again.get_trials(deepcopy=False) if trial.user_attrs.get("key") == wanted]
    return {trial.user_attrs["seed"]: math.inf if trial.value is None else trial.value for trial in trials}


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Silence what Optuna says of each trial, and of its own experiments."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)


class _ByNumber(BaseSampler):
    """The default first, then multivariate TPE seeded by the trial's number.

    So a search that was stopped goes on as it would have, and processes that start together do not try the same.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._inner: BaseSampler = TPESampler(seed=seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._inner = TPESampler(multivariate=True, seed=1_000_003 * self._seed + trial.number)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {} if trial.number == 0 else self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        if trial.number == 0:
            return 1.0
        return self._inner.sample_independent(study, trial, param_name, param_distribution)


def _storage(url: str) -> BaseStorage:
    if "://" not in url:
        return JournalStorage(JournalFileBackend(url))
    # SQLite lets one process write at a time
    options = {"connect_args": {"timeout": 100}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    for pause in (0.3, 1.0, 3.0, 0.0):
        try:
            return RDBStorage(url, engine_kwargs=options, heartbeat_interval=_HEARTBEAT, grace_period=_GRACE)
        except SQLAlchemyError as error:  # where another process makes the same tables now
            if not pause or not any(sign in str(error).lower() for sign in ("unique", "already exists")):
                raise
            time.sleep(random.uniform(0.5, 1.5) * pause)
    raise AssertionError("unreachable")


def _require_same(study: optuna.Study, place: Place, space: Sequence[Dimension]) -> None:
    """Refuse a study of another space, metric or training in the place of this one."""
    content = json.loads(
        json.dumps({**place.content, "mode": place.mode, "space": [asdict(dimension) for dimension in space]})
    )
    found = study.user_attrs.get("mlu")
    if found is None and not study.get_trials(deepcopy=False):
        study.set_user_attr("mlu", content)
        return
    other = [*content] if found is None else [name for name in content if found.get(name) != content[name]]
    if other:
        raise ValueError(
            f"The study {place.name!r} in {place.storage} is of something else: its {', '.join(other)} is not what is asked "
            "for now. Give it another name (--study) or place (--out, --storage), or ask for the same."
        )


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
