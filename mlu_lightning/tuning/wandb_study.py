"""Log a search to W&B: the study as a run, its trials as a group of runs, and the same search as a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers import Logger, WandbLogger

from mlu_lightning.tuning.found import Tuning
from mlu_lightning.tuning.search_figure import draw_search
from mlu_lightning.tuning.space import Dimension, factors_at, search_space
from mlu_lightning.tuning.training import Training
from mlu_lightning.utilities.whole_files import write_whole


def log_study(loggers: Sequence[Logger], found: Tuning) -> None:
    """Log a search to W&B: the image ``mlu/tune``, the table ``mlu/tune/trials``, and what is gained."""
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        import wandb
        from matplotlib.image import imread

        run: Any = logger.experiment
        picture = draw_search(found.space, found.curve(), found.metric, found.mode, found.best_point())
        run.log({"mlu/tune": wandb.Image((imread(BytesIO(picture)) * 255).astype("uint8"))})
        names = [dimension.name for dimension in found.space]
        rows = [[t.number, *(t.point.get(name) for name in names), t.value, t.reason] for t in found.trials]
        logger.log_table("mlu/tune/trials", columns=["trial", *names, found.metric, "reason"], data=rows)
        run.config.update({"mlu": {"tuned": found.tuned}}, allow_val_change=True)
        run.summary["mlu/tune/gain"] = found.gain.value
        run.summary["mlu/tune/gain_error"] = found.gain.error
        run.summary["mlu/tune/verdict"] = found.verdict()


def log_trials(loggers: Sequence[Logger], found: Tuning, group: str) -> None:
    """Make a W&B run of every trial, in one group, beside the run of each W&B logger, which is finished before."""
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        import wandb

        study: Any = logger.experiment
        place = {"project": study.project, "entity": study.entity or None, "dir": logger.save_dir, "group": group}
        study.finish()
        for trial in found.trials:
            run = wandb.init(**place, name=f"trial {trial.number}", job_type="trial", config=dict(trial.point))
            for percent, value in trial.reported.items():
                run.log({found.metric: value, "percent": percent})
            if trial.value is not None:
                run.log({found.metric: trial.value, "percent": 100})
            run.summary["reason"] = trial.reason
            run.finish()


def run_point(training: Training, roles: Sequence[str], point: Mapping[str, float], seed: int) -> float:
    """Train the base at a point of the search, in a W&B run whose agent has chosen it; return its metric."""
    if find_spec("wandb") is None:
        raise ValueError("--trial logs to W&B, which is not installed: pip install 'mlu-lightning[wandb]'.")
    import wandb

    plan = training.plan()
    space = search_space(plan, roles)
    if unknown := sorted(point.keys() - {dimension.name for dimension in space}):
        names = ", ".join(dimension.name for dimension in space)
        raise ValueError(f"--trial has {unknown[0]}, which is not searched. What is searched is {names}.")
    with wandb.init(config=dict(point)) as run:

        def report(percent: int, value: float) -> bool:
            run.log({training.metric: value, "percent": percent})
            return False

        value = training.run(plan, factors_at(space, point), seed, report).value
        run.log({training.metric: value, "percent": 100})
    return value


def save_sweep(space: Sequence[Dimension], metric: str, mode: str, command: Sequence[str], path: Path) -> None:
    """Write a W&B sweep of the same space, whose agent gives each point as JSON to the last option of a command."""
    content = {
        "method": "bayes",
        "metric": {"name": metric, "goal": "minimize" if mode == "min" else "maximize"},
        "early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 2},
        "command": ["${env}", "${interpreter}", *command, "${args_json}"],
        "parameters": {
            dimension.name: {"distribution": "log_uniform_values", "min": dimension.low, "max": dimension.high}
            for dimension in space
        },
    }
    head = f"# The search of mlu-lightning tune as a sweep of W&B: wandb sweep {path.name}, and the command that it prints\n"
    write_whole({path: (head + yaml.safe_dump(content, sort_keys=False)).encode()})
