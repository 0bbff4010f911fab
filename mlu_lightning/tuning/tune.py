"""Tune from beginning to end: search, choose with other seeds, measure the gain, confirm at other shapes."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Callback, LightningModule

from mlu_lightning.planning.fingerprint import fingerprint
from mlu_lightning.tuning.found import Confirmed, TrialRecord, Tuning
from mlu_lightning.tuning.space import DEFAULT_ROLES, factors_at, search_space
from mlu_lightning.tuning.training import Training

if TYPE_CHECKING:
    import optuna

    from mlu_lightning.tuning.trials import Again, Crew, Search

CANDIDATES = 5  # trials that are trained again with other seeds, the best of which is chosen

Progress = Callable[[str, int, int, float | None], None]
"""Takes what is done, how much of it, of how much, and the best value so far."""


def tune(
    build: Callable[[], LightningModule],
    data: Any = None,
    *,
    callbacks: Callable[[LightningModule], Sequence[Callback]] | None = None,
    metric: str = "val_loss",
    mode: Literal["min", "max"] = "min",
    trials: int = 150,
    minutes: float | None = None,
    roles: Sequence[str] = DEFAULT_ROLES,
    workers: int = 1,
    seeds: int = 3,
    seed: int = 0,
    trainer: Mapping[str, Any] | None = None,
    out: str | Path = "mlu-tune",
    storage: str | None = None,
    study: str = "mlu-tune",
    confirm: Mapping[str, Callable[[], LightningModule]] | None = None,
    progress: Progress = lambda what, done, total, best: None,
) -> Tuning:
    """Search the learning rate and factors per role at the base, where a training is cheap, for trainings of every shape.

    What is Θ(1) at the base keeps its meaning at every shape (theory.md, section 3), so what is found goes into any run:
    ``MLUCallback(base, tuned="mlu-tune/tuned.yaml")``. Trials are Optuna's (multivariate TPE), and those that do worse than
    half of the others at a quarter or half of the steps are stopped. The best few are trained again with other seeds, and
    the gain of the one with the best mean is measured with still others; a gain that is not above two standard errors is
    none. The study is kept after every trial: the same call goes on, and several processes and machines may share it.

    The base has to be one that learns: with weights for its own width (std 1/√D; 0.02 at D = 32 is a ninth of that) and
    enough steps to leave the plateau of single tokens, at whose end seeds differ more than shapes (recipes/tune).

    Args:
        build: function that builds the module of the base; in several processes it must be one that can be pickled.
        data: ``LightningDataModule``, DataLoader or list of batches, a pair of these for training and validation, or None
            for the module's own.
        callbacks: function from a module of the base to the callbacks of a Trainer, by default an
            :class:`mlu_lightning.MLUCallback` with that base. Those that save checkpoints or print are left out.
        metric: name of what the module logs, at the end of the training and, to stop early, at validations.
        mode: ``"min"`` or ``"max"``.
        trials: number of trials of the study, those that are there already included.
        minutes: after which no trial begins, less what training again will take.
        roles: what is searched beside the learning rate (see :func:`mlu_lightning.tuning.space.search_space`).
        workers: processes, which share the device.
        seeds: trainings of each of the best few, and as many for the gain.
        seed: seed of the search, and of the weights of all trials; others follow it.
        trainer: arguments of the Trainer, such as ``max_steps``.
        out: folder of the study, unless ``storage`` is given.
        storage: URL of a database, for several machines, or the path of a journal file that all can lock.
        study: name of the study.
        confirm: by name, functions that build the module at other shapes, which are trained with the factors found,
            without them, and at half and twice the learning rate.
        progress: function called with what is done, how much of it, of how much, and the best value.

    Raises:
        ValueError: if Optuna is not installed, the module logs no such metric, the base cannot be trained, all trials fail,
            or the storage has a study of something else.

    >>> import torch
    >>> from mlu_lightning.models import ResNet
    >>> def build():
    ...     return ResNet(depth=1, hidden=4, embedding=4, inputs=3, outputs=2)
    >>> batches = [(torch.ones(2, 3), torch.ones(2, 2))] * 2
    >>> import tempfile
    >>> found = tune(build, (batches, batches), trials=2, seeds=1, trainer={"max_steps": 2}, out=tempfile.mkdtemp())
    >>> len(found.trials)
    2
    """
    more = {"data": data, "metric": metric, "trainer": dict(trainer or {})}
    return tune_training(
        Training.of(build, build, callbacks, **more),
        larger={name: Training.of(larger, build, callbacks, **more) for name, larger in (confirm or {}).items()},
        mode=mode,
        trials=trials,
        minutes=minutes,
        roles=roles,
        workers=workers,
        seeds=seeds,
        seed=seed,
        out=Path(out),
        storage=storage,
        study=study,
        progress=progress,
    )


def tune_training(
    training: Training,
    *,
    larger: Mapping[str, Training],
    mode: Literal["min", "max"],
    trials: int,
    minutes: float | None,
    roles: Sequence[str],
    workers: int,
    seeds: int,
    seed: int,
    out: Path,
    storage: str | None,
    study: str,
    progress: Progress,
    content: Mapping[str, Any] | None = None,
) -> Tuning:
    """Tune a training of the base, and confirm what is found in others; ``content`` says what else a study is of."""
    require_optuna()
    if trials < 1 or seeds < 1 or workers < 1:
        raise ValueError(f"trials={trials}, seeds={seeds} and workers={workers} should all be 1 or more.")
    from mlu_lightning.tuning.storage import Place, open_study
    from mlu_lightning.tuning.trials import Search, assembled

    if workers > 1:
        _require_pickle(training)
    plan = training.plan()
    space = search_space(plan, roles)
    if storage is None:
        out.mkdir(parents=True, exist_ok=True)
        storage = f"sqlite:///{out.absolute() / 'study.db'}"
    trained = {"module": fingerprint(plan), "trainer": dict(sorted(training.trainer.items())), **(content or {})}
    digest = hashlib.sha256(json.dumps(trained, sort_keys=True, default=repr).encode()).hexdigest()[:16]
    place = Place(storage, study, seed, mode, {"metric": training.metric, "seed": seed, "training": digest})
    opened, again = open_study(place, space)
    reruns = (CANDIDATES + 2 + 4 * len(larger)) * seeds
    end = math.inf if minutes is None else time.time() + 60 * minutes - _seconds(opened) * reruns / workers
    search = Search(training, plan, space, place, trials, seed, end)
    with assembled(workers) as crew:
        search.run(crew, lambda done, total, best: progress("trials", done, total, best))
        records = read_trials(opened)
        found = _choose(search, Tuning(training.metric, mode, space, records, {}), again, seeds, crew, progress)
        confirmed = [
            _confirm(replace(search, training=there, plan=there.plan()), name, found, again, seeds, crew, progress)
            for name, there in larger.items()
        ]
    return replace(found, importance=_importance(opened), confirmed=tuple(confirmed))


def require_optuna() -> None:
    """Refuse to search without Optuna."""
    if find_spec("optuna") is None:
        raise ValueError("tune searches with Optuna, which is not installed: pip install 'mlu-lightning[tune]'.")


def _require_pickle(training: Training) -> None:
    try:
        pickle.dumps(training)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{error}, so that other processes cannot be given the training. Define build and callbacks as functions at the "
            "top of a module, give data that can be pickled, or leave workers at 1."
        ) from error


def read_trials(study: optuna.Study) -> tuple[TrialRecord, ...]:
    """Trials of a study that came to an end."""
    from mlu_lightning.tuning.storage import DONE

    return tuple(
        TrialRecord(
            trial.number,
            dict(trial.params),
            None if trial.value is None or trial.user_attrs.get("reason") else trial.value,
            trial.user_attrs.get("reason", "" if trial.value is not None else "its process ended"),
            dict(trial.intermediate_values),
        )
        for trial in study.get_trials(deepcopy=False)
        if trial.state in DONE
    )


def _choose(search: Search, found: Tuning, again: optuna.Study, seeds: int, crew: Crew, progress: Progress) -> Tuning:
    """Train the best few with other seeds, choose the best mean, and measure its gain with still others."""
    few = found.best_first[:CANDIDATES]
    if not few:
        return found
    points = {trial.number: factors_at(found.space, trial.point) for trial in few}
    first = range(search.seed + 1, search.seed + 1 + seeds)
    groups = {number: _cases(search, "base", tuned, first) for number, tuned in points.items()}
    losses = _train(groups, again, crew, lambda *counts: progress("best few with other seeds", *counts))
    sign = 1.0 if found.mode == "min" else -1.0
    means = {
        number: fmean(sign * value if math.isfinite(value) else math.inf for value in of.values())
        for number, of in losses.items()
    }
    chosen = min(means, key=lambda number: means[number])
    second = range(search.seed + 1 + seeds, search.seed + 1 + 2 * seeds)
    pair = {what: _cases(search, "base", tuned, second) for what, tuned in (("default", {}), ("found", points[chosen]))}
    gains = _train(pair, again, crew, lambda *counts: progress("gain with still other seeds", *counts))
    default, best = ([gains[name][seed] for seed in second] for name in ("default", "found"))
    return replace(found, again=losses, gains=(default, best), chosen=chosen)


def _confirm(
    search: Search, name: str, found: Tuning, again: optuna.Study, seeds: int, crew: Crew, progress: Progress
) -> Confirmed:
    """Train another shape with the factors, without them, and at other learning rates."""
    lr = found.space[0]
    rates = {what: factors_at([lr], {"lr": rate}) for what, rate in (("lr / 2", 0.5), ("lr × 2", 2.0))}
    variants = {"tuned": found.tuned, "untuned": {}, **{what: times(found.tuned, rate) for what, rate in rates.items()}}
    chosen = range(search.seed + 1, search.seed + 1 + seeds)
    groups = {what: _cases(search, name, tuned, chosen) for what, tuned in variants.items()}
    losses = _train(groups, again, crew, lambda *counts: progress(f"runs at {name}", *counts))
    return Confirmed(name, found.mode, {what: [values[seed] for seed in chosen] for what, values in losses.items()})


def times(
    one: Mapping[str, Mapping[str, float]], other: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """The product of two mappings of factors."""
    return {
        key: {
            what: one.get(key, {}).get(what, 1.0) * other.get(key, {}).get(what, 1.0)
            for what in {**one.get(key, {}), **other.get(key, {})}
        }
        for key in {**one, **other}
    }


def _cases(search: Search, shape: str, tuned: Any, seeds: Sequence[int]) -> list[Again]:
    from mlu_lightning.tuning.trials import Again

    key = {"shape": shape, "module": fingerprint(search.plan), "tuned": tuned}
    return [Again(search.training, search.plan, key, tuned, seed) for seed in seeds]


def _train(
    groups: Mapping[Any, Sequence[Again]],
    again: optuna.Study,
    crew: Crew,
    progress: Callable[[int, int, float | None], None],
) -> dict[Any, dict[int, float]]:
    """Train what is missing of groups of trainings, and return their values by group and seed."""
    from mlu_lightning.tuning.storage import read_again
    from mlu_lightning.tuning.trials import train_again

    cases = [case for group in groups.values() for case in group]
    train_again(again, cases, crew, progress)
    known = {name: read_again(again, group[0].key) for name, group in groups.items()}
    return {name: {case.seed: known[name][case.seed] for case in group} for name, group in groups.items()}


def _seconds(study: optuna.Study) -> float:
    times_taken = [trial.duration for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    return median(taken.total_seconds() for taken in times_taken if taken is not None) if times_taken else 0.0


def _importance(study: optuna.Study) -> dict[str, float]:
    """Importance of each dimension by Optuna; empty where there are too few trials, or nothing varies."""
    import optuna

    from mlu_lightning.tuning.storage import quiet_optuna

    with quiet_optuna():
        try:
            return dict(optuna.importance.get_param_importances(study))
        except (ValueError, RuntimeError):
            return {}
