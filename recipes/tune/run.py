"""A base tuned at once, every role, and what becomes of the factors at larger shapes: the command of the study.

``python -m recipes.tune.run`` searches at the base and trains five larger shapes; ``samplers`` compares ways to search,
``bases`` asks which bases are too small, ``preset`` whether one set of factors is good for many models. README.md says what
came out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import Progress

from mlu_lightning.planning.tuned import Tuned
from mlu_lightning.tuning import Tuning, tune
from mlu_lightning.utilities.workers import worker_pool
from recipes.common.studies import ResultFile, check_command, console, deadline, study_command, study_commands
from recipes.tune.preset import PRESET, Presets, relative
from recipes.tune.report import loss_table, save_figure, verdicts
from recipes.tune.runs import BASE, Run, Study, missing_runs, plan_of, train
from recipes.tune.samplers import Search, sampler_table, search
from recipes.tune.small_bases import Change, Comparison, changes_of

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
    found = _tune(chosen, start, trials, folder, workers, _left(end), terminal)
    terminal.print(found.tables())
    if len(found.trials) < trials:
        return terminal.print("The time was over before the search was; another call goes on.")
    found.save(folder)
    runs = _make_runs(chosen, start, found.tuned, folder, workers, end, terminal)
    terminal.print(loss_table(chosen, runs))
    for sentence in verdicts(chosen, runs):
        terminal.print(sentence, highlight=False)
    save_figure(chosen, runs, folder / "tune_shapes.png")
    terminal.print(f"Wrote tune_shapes.png in {folder}.", highlight=False, soft_wrap=True)
    return None


def samplers(
    output: str = "tune-samplers",
    workers: int = 2,
    searches: int = 5,
    trials: int = 150,
    minutes: float | None = None,
    quick: bool = False,
) -> None:
    """Search the factors of a small Transformer with several samplers, and report what they found.

    Args:
        output: folder of the searches; those that are in it are not made again.
        workers: number of searches at a time, each on one core.
        searches: number of searches of each sampler.
        trials: of each search.
        minutes: after which no search is begun.
    """
    check_command(workers, searches)
    steps, trials, searches = (3, 12, 1) if quick else (60, trials, searches)
    file = ResultFile(Path(output) / "searches.jsonl", _Settings(steps, trials), Search.encode, Search.decode)
    done, end, terminal = file.read(), deadline(minutes), console(118)
    names = ("TPE", "CMA-ES", "trust region")
    wanted = [(name, seed) for seed in range(searches) for name in names]

    def next_search(running: Sequence[tuple[Any, ...]]) -> tuple[Any, ...] | None:
        begun = {(one.sampler, one.seed) for one in done} | {case[:2] for case in running}
        waiting = [case for case in wanted if case not in begun]
        return (*waiting[0], trials, steps) if waiting and time.monotonic() < end else None

    with worker_pool(workers, threads=1) as pool:
        file.extend(done, pool, workers, search, next_search)
    terminal.print(sampler_table(done))


def bases(output: str = "tune-bases", trials: int = 130, minutes: float | None = None, quick: bool = False) -> None:
    """Train a tied GPT, and one of four times its widths, with one thing at a time changed.

    Args:
        output: folder of the runs; those that are in it are not made again.
        trials: of the search of factors at a base.
        minutes: after which no run is begun; another call goes on.
    """
    folder, end = Path(output), deadline(minutes)
    compared = Comparison({"as it is": Change(steps=2)} if quick else changes_of(folder, trials, PRESET))
    console(118).print(compared.table(compared.make(folder / "small_bases.jsonl", end)))


def preset(
    output: str = "tune-preset",
    found_on: str = "package,nanogpt,llama",
    trials: int = 120,
    minutes: float | None = None,
    quick: bool = False,
) -> None:
    """Search one set of factors for several models, and train them and others with it.

    Args:
        output: folder of the search and the runs; what is in it is not done again.
        found_on: names of the models of the search, with commas.
        trials: of the search.
        minutes: after which no run is begun; another call goes on.
    """
    names, folder, end, terminal = tuple(found_on.split(",")), Path(output), deadline(minutes), console(118)
    chosen = Presets(names[:1], names[:1], 2, 2, (-6,)) if quick else Presets(names)
    alone = chosen.compared({}).make(folder / "alone.jsonl", end)
    if not all(chosen.compared({}).losses(alone, name) for name in chosen.names):
        return terminal.print("The time was over before the learning rates were known; another call goes on.")
    found = chosen.search(folder, alone, 2 if quick else trials, _left(end))
    found.save(folder)
    factors = relative(found.found)
    terminal.print(found.tables(), f"Beside the learning rate: {factors}", highlight=False)
    terminal.print(chosen.table(alone, chosen.compared(factors).make(folder / "preset.jsonl", end)))
    return None


def _left(end: float) -> float | None:
    """Minutes until a time on the monotonic clock, for ever None."""
    return None if math.isinf(end) else max(0.0, (end - time.monotonic()) / 60)


@dataclass(frozen=True)
class _Settings:
    steps: int
    trials: int


@dataclass(frozen=True)
class _Tuned:
    """Settings of runs at all shapes."""

    study: dict[str, Any]
    start: float
    tuned: Tuned


def _best_exponent(study: Study, folder: Path, workers: int, end: float, terminal: Console) -> float | None:
    """The base's best learning rate, over seeds; None if the time was over."""
    file = ResultFile(folder / "base.jsonl", study, Run.encode, Run.decode)
    runs, plan = file.read(), plan_of(study, "base", "MLU, lr alone")
    wanted = [Run("base", "MLU, lr alone", e, seed) for e in study.exponents for seed in range(study.seeds)]
    _train(study, lambda: wanted, runs, file, lambda run: (study, run, plan, {}), workers, end, terminal)
    losses = {e: [run.loss for run in runs if run.exponent == e] for e in study.exponents}
    if any(len(of_seeds) < study.seeds for of_seeds in losses.values()):
        return None
    return min(losses, key=lambda exponent: fmean(losses[exponent]))


def _tune(
    study: Study, start: float, trials: int, folder: Path, workers: int, left: float | None, terminal: Console
) -> Tuning:
    with Progress(console=terminal) as progress:
        bar = progress.add_task("search at the base")
        return tune(
            partial(study.model, "base", start),
            study.data(0),
            trials=trials,
            minutes=left,
            workers=workers,
            seeds=study.seeds,
            trainer={"accelerator": "cpu", "max_steps": study.steps},
            out=folder,
            progress=lambda what, done, total, best: progress.update(
                bar, description=what, completed=done, total=total
            ),
        )


def _make_runs(
    study: Study, start: float, tuned: Tuned, folder: Path, workers: int, end: float, terminal: Console
) -> list[Run]:
    """Make the runs that are missing until the time is over, and return all that were made."""
    file = ResultFile(folder / "runs.jsonl", _Tuned(asdict(study), start, tuned), Run.encode, Run.decode)
    runs = file.read()
    plans: dict[tuple[str, str], Any] = {}

    def case(run: Run) -> tuple[Any, ...]:
        if (run.shape, run.method) not in plans:
            plans[run.shape, run.method] = plan_of(study, run.shape, run.method)
        return study, run, plans[run.shape, run.method], tuned

    _train(study, lambda: missing_runs(study, runs, start), runs, file, case, workers, end, terminal)
    return runs


def _train(
    study: Study, wanted: Any, runs: list[Run], file: Any, case: Any, workers: int, end: float, terminal: Console
) -> None:
    """Make those of the wanted runs that are not there yet, in order."""
    with worker_pool(workers, threads=1) as pool, Progress(console=terminal) as progress:
        bar = progress.add_task("runs")

        def next_run(running: Sequence[tuple[Any, ...]]) -> tuple[Any, ...] | None:
            known = {
                (run.shape, run.method, run.exponent, run.seed) for run in [*runs, *(one for _, one, *_ in running)]
            }
            waiting = [run for run in wanted() if (run.shape, run.method, run.exponent, run.seed) not in known]
            progress.update(bar, completed=len(runs), total=len(runs) + len(waiting) + len(running))
            return case(waiting[0]) if waiting and time.monotonic() < end else None

        file.extend(runs, pool, workers, train, next_run)


_STUDY = study_command(study, "python -m recipes.tune.run study")
main = study_commands(study, samplers, bases, preset, program="python -m recipes.tune.run", default=_STUDY)

if __name__ == "__main__":
    main()
