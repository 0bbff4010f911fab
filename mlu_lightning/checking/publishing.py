"""Log the report of a check to W&B and TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from mlu_lightning.checking.report import CheckReport


@rank_zero_only
def log_check(loggers: Sequence[Logger], report: CheckReport) -> None:
    """Log a check to the loggers of a run.

    A ``WandbLogger`` gets the figure as the image ``mlu/check``, the verdict and the roles at fault in the run's summary,
    and the table ``mlu/check/rows`` of all slopes; a ``TensorBoardLogger`` the figure and the printed report.

    Args:
        loggers: loggers of a Trainer, or made for this; those of other kinds are left alone.
        report: report of a check.

    >>> from mlu_lightning import Shape
    >>> log_check([], CheckReport(Shape(1, 1, 1), (1, 2), 1, 1, ()))
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _log_to_wandb(logger, report)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure("mlu/check", report.draw())
            logger.experiment.add_text("mlu/check", f"```\n{report}\n```")
            logger.experiment.flush()


def _log_to_wandb(logger: WandbLogger, report: CheckReport) -> None:
    import wandb

    run: Any = logger.experiment
    run.log({"mlu/check": wandb.Image(report.draw())})
    columns = ["kind", "name", "role", "axis", "slope", "error", "verdict", "reason"]
    data: list[list[Any]] = []
    for row in report.rows:
        numbers = (None if math.isnan(number) else number for number in (row.slope, row.error))
        what = str(row.quantity.kind), row.quantity.name, row.quantity.role
        data.append([*what, row.axis, *numbers, row.verdict, str(row.reason)])
    logger.log_table("mlu/check/rows", columns=columns, data=data)
    run.summary["mlu/check/verdict"] = report.verdict
    run.summary["mlu/check/causes"] = [str(cause) for cause in report.causes]
