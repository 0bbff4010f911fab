"""Where the report of a check goes: into files of a folder, and to W&B and TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from mlu_lightning.checking.report import CheckReport

__all__ = ["log_check", "save_check"]


def save_check(report: CheckReport, folder: str | PathLike[str]) -> None:
    """Write ``check.json``, which has everything, ``check.txt`` and ``check.png`` into a folder.

    Args:
        report: report of a check.
        folder: folder, which is made if it does not exist.
    """
    from mlu_lightning.checking.figure import draw_check  # which needs matplotlib

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / "check.json").write_text(report.to_json(), encoding="utf-8")
    (path / "check.txt").write_text(f"{report}\n", encoding="utf-8")
    draw_check(report).savefig(path / "check.png", dpi=110)


@rank_zero_only
def log_check(loggers: Sequence[Logger], report: CheckReport) -> None:
    """Log a check to the loggers of a run.

    A ``WandbLogger`` gets the figure as the image ``mlu/check``, the verdict and the roles at fault in the run's summary,
    and the table ``mlu/check/rows`` of all slopes; a ``TensorBoardLogger`` the figure and the printed report. Other
    loggers are left alone.

    Args:
        loggers: loggers of a Trainer, or on their own: ``log_check([WandbLogger()], check(...))``.
        report: report of a check.

    >>> from mlu_lightning import Shape
    >>> log_check([], CheckReport(Shape(1, 1, 1), (1, 2), 1, 1, ()))
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _log_to_wandb(logger, report)
        elif isinstance(logger, TensorBoardLogger):
            from mlu_lightning.checking.figure import draw_check

            logger.experiment.add_figure("mlu/check", draw_check(report))
            logger.experiment.add_text("mlu/check", f"```\n{report}\n```")
            logger.experiment.flush()


def _log_to_wandb(logger: WandbLogger, report: CheckReport) -> None:
    import wandb

    from mlu_lightning.checking.figure import draw_check

    run: Any = logger.experiment
    run.log({"mlu/check": wandb.Image(draw_check(report))})
    columns = ["kind", "name", "role", "axis", "slope", "error", "verdict", "reason"]
    data = []
    for row in report.rows:
        quantity = row.quantity
        numbers = (None if math.isnan(number) else number for number in (row.slope, row.error))
        data.append(
            [str(quantity.kind), quantity.name, quantity.role, row.axis, *numbers, row.verdict, str(row.reason)]
        )
    logger.log_table("mlu/check/rows", columns=columns, data=data)
    run.summary["mlu/check/verdict"] = report.verdict
    run.summary["mlu/check/causes"] = [str(cause) for cause in report.causes]
