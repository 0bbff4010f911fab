"""A base tuned at once, every role, and what becomes of the factors at larger shapes: the command of the study.

``python -m recipes.tune.run`` searches at the base and trains five larger shapes; ``samplers`` compares ways to search,
``bases`` asks which bases are too small, ``preset`` whether one set of factors is good for many models. README.md says what
came out.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import product
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from mlu_lightning.planning.tuned import Tuned
from recipes.common.studies import ResultFile, check_command, console, deadline, study_command, study_commands
from recipes.tune.preset import gpts, preset_table, relative, search, with_factors
from recipes.tune.report import loss_table, save_figure, verdicts
from recipes.tune.runs import BASE, STUDIES, Run, Study, missing_runs, plan_of, train, tune_at
from recipes.tune.samplers import SAMPLERS, Search, sampler_table, search_factors
from recipes.tune.small_bases import PRESETS, Change, Comparison

QUICK = Study(4, 8, 2, 1, 2, (-6, -5), {"base": BASE | {"depth": 1}, "2 × depth": BASE})


def study(
    output: str = "tune-study", trials: int = 150, workers: int = 2, minutes: float | None = None, quick: bool = False
) -> None:
    """Tune the base, train all shapes, and report their losses.

    Args:
        output: folder of the search, the runs and the figure; what is in it is not done again.
        trials: of the search at the base.
        workers: number of runs at a time, each on one core.
        minutes: after which no run is begun, and what there is is reported; another call goes on.
    """
    chosen, trials = (QUICK, 2) if quick else (Study(), trials)
    check_command(workers, chosen.seeds)
    terminal, folder, end = console(118), Path(output), deadline(minutes)
    start = _best_exponent(chosen, folder, workers, end, terminal)
    if start is None:
        return terminal.print("The time was over before the base's learning rate was known; another call goes on.")
    build, limits = partial(chosen.model, "base", start), {"trials": trials, "minutes": _left(end), "workers": workers}
    found = tune_at(build, chosen.data(0), chosen.steps, folder, terminal, seeds=chosen.seeds, **limits)
    terminal.print(found.tables())
    if len(found.trials) < trials:
        return terminal.print("The time was over before the search was; another call goes on.")
    runs = _make_runs(chosen, start, found.tuned, folder, workers, end, terminal)
    terminal.print(loss_table(chosen, runs))
    for sentence in verdicts(chosen, runs):
        terminal.print(sentence, highlight=False)
    save_figure(chosen, runs, folder / "tune_shapes.png")
    terminal.print(f"Wrote tune_shapes.png in {folder}.", highlight=False, soft_wrap=True)
    return None


def samplers(
    output: str = "tune-samplers",
    searches: int = 5,
    trials: int = 150,
    minutes: float | None = None,
    quick: bool = False,
) -> None:
    """Search the factors of a small Transformer with several samplers, and report what they found.

    Args:
        output: folder of the searches; those that are in it are not made again.
        searches: number of searches of each sampler.
        trials: of each search.
        minutes: after which no search is begun.
    """
    steps, trials, searches = (3, 12, 1) if quick else (60, trials, searches)
    settings = {"steps": steps, "trials": trials}
    file = ResultFile(Path(output) / "searches.jsonl", settings, lambda line: Search(**line))
    done, end = file.read(), deadline(minutes)
    for seed, name in product(range(searches), SAMPLERS):
        if (name, seed) not in {(one.sampler, one.seed) for one in done} and time.monotonic() < end:
            done.append(search_factors(name, seed, trials, steps))
            file.append(done[-1])
    console(118).print(sampler_table(done))


def bases(
    output: str = "tune-bases", trials: int = 130, workers: int = 2, minutes: float | None = None, quick: bool = False
) -> None:
    """Train a tied GPT, and one of four times its widths, with one thing at a time changed.

    Args:
        output: folder of the runs; those that are in it are not made again.
        trials: of the searches of factors at its base.
        workers: number of runs at a time, each on one core.
        minutes: after which no run is begun; another call goes on.
    """
    folder, end, terminal = Path(output), deadline(minutes), console(118)
    few = {"as it is": Change(steps=2)}
    made = Comparison(few if quick else gpts(folder, STUDIES["preset"], terminal, trials=trials, minutes=minutes))
    terminal.print(made.table(made.make(folder / "small_bases.jsonl", workers, end, terminal)))


def preset(
    output: str = "tune-preset",
    found_on: str = "package,nanogpt,llama",
    trials: int = 120,
    workers: int = 2,
    minutes: float | None = None,
    quick: bool = False,
) -> None:
    """Search one set of factors for several models, and train them and others with it.

    Args:
        output: folder of the search and the runs; what is in it is not done again.
        found_on: names of the models of the search, with commas.
        trials: of the search.
        workers: number of runs at a time, each on one core.
        minutes: after which no run is begun; another call goes on.
    """
    folder, end, terminal, names = Path(output), deadline(minutes), console(118), found_on.split(",")
    models = Comparison(PRESETS, {"base": 1}, range(-8, -2), 5)
    if quick:
        few = {name: replace(PRESETS[name], steps=2) for name in names}
        models = Comparison(few, {"base": 1}, [-6], 2)
    alone = models.make(folder / "alone.jsonl", workers, end, terminal)
    if any(models.missing(alone)):
        return terminal.print("The time was over before the learning rates were known; another call goes on.")
    found = search(names, models, alone, folder, terminal, trials=2 if quick else trials, minutes=_left(end))
    factors = relative(found.found)
    terminal.print(found.tables(), f"Beside the learning rate: {factors}", highlight=False)
    tuned = replace(models, changes=with_factors(models.changes, factors))
    terminal.print(preset_table(models, alone, tuned.make(folder / "preset.jsonl", workers, end, terminal)))
    return None


def _left(end: float) -> float | None:
    """Minutes until a time on the monotonic clock, for ever None."""
    return None if math.isinf(end) else max(0.0, (end - time.monotonic()) / 60)


def _best_exponent(study: Study, folder: Path, workers: int, end: float, terminal: Console) -> float | None:
    """The base's best learning rate, over seeds; None if the time was over."""
    file = ResultFile(folder / "base.jsonl", asdict(study), lambda line: Run(**line))
    runs, plan = file.read(), plan_of(study, "base", "MLU, lr alone")
    wanted = [Run("base", "MLU, lr alone", e, seed) for e in study.exponents for seed in range(study.seeds)]
    key = attrgetter("exponent", "seed")

    def missing() -> list[Run]:
        return [run for run in wanted if key(run) not in map(key, runs)]

    file.extend(runs, missing, lambda run: (study, run, plan, {}), train, workers, end, terminal)
    if missing():
        return None
    return min(study.exponents, key=lambda e: fmean(run.loss for run in runs if run.exponent == e))


def _make_runs(
    study: Study, start: float, tuned: Tuned, folder: Path, workers: int, end: float, terminal: Console
) -> list[Run]:
    """Make the runs that are missing until the time is over, and return all that were made."""
    settings = {"study": asdict(study), "start": start, "tuned": tuned}
    file = ResultFile(folder / "runs.jsonl", settings, lambda line: Run(**line))
    runs = file.read()
    plan = cache(partial(plan_of, study))

    def case(run: Run) -> tuple[Any, ...]:
        return study, run, plan(run.shape, run.method), tuned

    file.extend(runs, lambda: missing_runs(study, runs, start), case, train, workers, end, terminal)
    return runs


_STUDY = study_command(study, "python -m recipes.tune.run study")
main = study_commands(study, samplers, bases, preset, program="python -m recipes.tune.run", default=_STUDY)

if __name__ == "__main__":
    main()
