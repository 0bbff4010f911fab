"""Checks where runs are shown: in W&B and TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from mlu_lightning.checking.report import CheckReport

__all__ = ["log_check"]


@rank_zero_only
def log_check(loggers: Sequence[Logger], report: CheckReport) -> None:
    """Show a check where a run is shown.

    A ``WandbLogger`` gets the figure as the image ``mlu/check``, the verdict and the roles at fault in the run's summary,
    and the table ``mlu/check/rows`` of all slopes; a ``TensorBoardLogger`` the figure and the printed report. Other
    loggers are left alone.

    Args:
        loggers: of a Trainer, or on their own: ``log_check([WandbLogger()], check(...))``.
        report: of a check.

    >>> from mlu_lightning import Shape
    >>> log_check([], CheckReport(Shape(1, 1, 1), (1, 2), 1, 1, ()))
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _to_wandb(logger, report)
        elif isinstance(logger, TensorBoardLogger):
            from mlu_lightning.checking.figure import draw_check  # which needs matplotlib

            logger.experiment.add_figure("mlu/check", draw_check(report))
            logger.experiment.add_text("mlu/check", f"```\n{report}\n```")
            logger.experiment.flush()


_COLUMNS = "kind", "name", "role", "axis", "slope", "error", "verdict", "reason"


def _to_wandb(logger: WandbLogger, report: CheckReport) -> None:
    import wandb

    from mlu_lightning.checking.figure import draw_check

    run: Any = logger.experiment
    run.log({"mlu/check": wandb.Image(draw_check(report))})
    logger.log_table("mlu/check/rows", columns=[*_COLUMNS], data=[*map(list, _rows(report))])
    run.summary["mlu/check/verdict"] = report.verdict
    run.summary["mlu/check/causes"] = [str(cause) for cause in report.causes]


def _rows(report: CheckReport) -> list[tuple[Any, ...]]:
    """All slopes; None where there is none."""
    return [
        (
            row.quantity.kind,
            row.quantity.name,
            row.quantity.role,
            row.axis,
            *(None if math.isnan(number) else number for number in (row.slope, row.error)),
            row.verdict,
            row.reason,
        )
        for row in report.rows
    ]
