"""``mlu-lightning tune``: the learning rate and factors per role of what a configuration trains, found at its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from mlu_lightning.cli.console import list_of, make_console, place, read_axes, require, say, show_progress, writing

_OF_A_TRAINING = "model", "data", "optimizer", "lr_scheduler"


def tune_configuration(
    config: str,
    metric: str = "val_loss",
    mode: Literal["min", "max"] = "min",
    trials: int = 150,
    minutes: float | None = None,
    roles: str | None = "embedding,branch_in,branch_out,readout",
    steps: int | None = None,
    workers: int = 1,
    seeds: int = 3,
    seed: int = 0,
    confirm: dict[str, int] | None = None,
    out: str = "mlu-tune",
    storage: str | None = None,
    study: str = "mlu-tune",
    depth: str | None = "auto",
    hidden: str | None = "auto",
    embedding: str | None = "auto",
    model: str | None = None,
    data: str | None = None,
    log: Literal["study", "trials"] | None = None,
    trial: dict[str, float] | None = None,
) -> None:
    """Search the learning rate and factors per role at the base of a configuration, and write them for its MLUCallback.

    The study is kept after every trial: after Ctrl-C, the same command goes on. Several machines work on one study if they
    are given one storage.

    Args:
        config: YAML file that LightningCLI takes, with an MLUCallback and its base.
        metric: name of what the module logs.
        mode: whether it is to be least or largest.
        trials: number of trials of the study, those that are there already included.
        minutes: after which no trial begins, less what training the best again will take.
        roles: what is searched beside the learning rate, with commas: roles, of which std and lr are searched,
            branch_in@attention, globs of parameter names, one factor such as embedding.weight_decay, norms, weight_decay,
            alpha; null for the learning rate alone.
        steps: optimizer steps of a training; by default those of the configuration.
        workers: number of processes.
        seeds: trainings of each of the best few with other seeds, and as many to measure the gain.
        seed: seed of the search, and of the weights of all trials.
        confirm: shape, relative to the base, at which what was found is trained, too, with and without the factors, and at
            half and twice the learning rate: '{depth: 4, hidden: 4, embedding: 4}'.
        out: folder for tuned.yaml, tune.txt, tune.png, sweep.yaml (for agents of W&B) and the study.
        storage: URL of a database (postgresql+psycopg://user:password@host/name), or path of a journal file, for many
            machines.
        study: name of the study in it.
        depth: arguments of the model that make up its depth, as for "mlu-lightning check"; found by default.
        hidden: the same for the hidden width.
        embedding: the same for the embedding dimension.
        model: class of the model, for a configuration that does not name it.
        data: class of the data, for a configuration that does not name it.
        log: whether the W&B loggers of the configuration get the study as a run, or the study and every trial.
        trial: a point of the search that is trained alone and logged to W&B, as the agents of sweep.yaml do.
    """
    require("tune draws a figure, and matplotlib is", "matplotlib")
    from mlu_lightning.tuning.training import Training
    from mlu_lightning.tuning.tune import require_optuna, tune_training

    require_optuna()
    configured, keys = read_axes(config, {"depth": depth, "hidden": hidden, "embedding": embedding}, model, data)
    training = Training(
        partial(configured.build_all, {}),
        partial(configured.build_with, {}),
        configured.data(),
        metric,
        _trainer(configured, steps),
    )
    searched = list_of(roles) if roles else []
    if trial is not None:
        from mlu_lightning.tuning.wandb_study import run_point

        run_point(training, searched, trial, seed)
        return
    grown = _grown(configured, keys, confirm) if confirm else {}
    larger = {name: replace(training, make=partial(configured.build_all, sizes)) for name, sizes in grown.items()}
    folder, console = place(out), make_console(118)
    for note in configured.notes:
        say(console, note)
    try:
        with show_progress(console, "planning") as progress:

            def show(what: str, done: int, total: int, best: float | None) -> None:
                found = "" if best is None else f", best {metric} {best:.4f}"
                progress(done, total, f"{what}{found}")

            found = tune_training(
                training,
                larger=larger,
                mode=mode,
                trials=trials,
                minutes=minutes,
                roles=searched,
                workers=workers,
                seeds=seeds,
                seed=seed,
                out=folder,
                storage=storage,
                study=study,
                progress=show,
                content={name: configured.content.get(name) for name in _OF_A_TRAINING},
            )
    except KeyboardInterrupt:
        say(console, "Interrupted. What was tried is kept, and the same command goes on.", soft_wrap=True)
        raise
    console.print(found.tables())
    _save(found, folder, out, [config, model, data, steps, metric, roles, seed], console)
    if log:
        from mlu_lightning.tuning.wandb_study import log_study, log_trials

        loggers = configured.loggers()
        log_study(loggers, found)
        if log == "trials":
            log_trials(loggers, found, study)


def _trainer(configured: Any, steps: int | None) -> dict[str, Any]:
    """Arguments of the Trainer, which have to say how long a training is."""
    given: dict[str, Any] = configured.whole_training
    if steps is not None:
        given = {name: value for name, value in given.items() if name != "max_epochs"} | {"max_steps": steps}
    if not {"max_steps", "max_epochs"} & given.keys():
        raise ValueError(
            "The configuration does not say how long the base is trained: its Trainer has neither max_steps nor max_epochs. "
            "Give --steps, such as --steps 200."
        )
    return given


def _grown(configured: Any, keys: Mapping[str, Sequence[str]], factors: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Arguments of the model at another shape, by the shape's name."""
    from mlu_lightning.checking.options import with_found_options

    known = with_found_options(configured, keys)
    if wrong := [axis for axis, factor in factors.items() if not known.keys.get(axis) or factor < 1]:
        raise ValueError(
            f"--confirm has {wrong[0]}: {factors[wrong[0]]}, and should have factors of 1 or more for some of "
            f"{', '.join(axis for axis, names in known.keys.items() if names)}, which the model's arguments make up."
        )
    sizes = {name: known.options[name] * factor for axis, factor in factors.items() for name in known.keys[axis]}
    name = ", ".join(f"{factor} × {axis}" for axis, factor in factors.items())
    return {name: sizes}


def _save(found: Any, folder: Path, out: str, options: Sequence[Any], console: Console) -> None:
    from mlu_lightning.tuning.wandb_study import save_sweep

    path, model, data, steps, metric, roles, seed = options
    given = {"model": model, "data": data, "steps": steps, "metric": metric, "roles": roles or "null", "seed": seed}
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    with writing(out):
        found.save(folder)
        command = ["-m", "mlu_lightning", "tune", path, *words, "--trial"]
        save_sweep(found.space, found.metric, found.mode, command, folder / "sweep.yaml")
    say(console, f"Wrote tuned.yaml, tune.txt, tune.png and sweep.yaml into {folder}.")
    if found.tuned:
        say(
            console,
            f"Give any run of this model MLUCallback(base=..., tuned={str(folder / 'tuned.yaml')!r}).",
            soft_wrap=True,
        )
