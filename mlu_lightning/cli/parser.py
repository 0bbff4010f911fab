"""From the words of a command line to the command that they name, and what is said when it fails."""

from __future__ import annotations

import sys
from collections.abc import Callable

from jsonargparse import auto_cli

import mlu_lightning
from mlu_lightning.cli.check_command import check
from mlu_lightning.cli.console import say_error
from mlu_lightning.cli.quickstart_command import quickstart
from mlu_lightning.cli.report_command import report
from mlu_lightning.cli.shape_command import shape
from mlu_lightning.cli.tune_command import tune

__all__ = ["run"]

_COMMANDS: list[Callable[..., None] | type] = [quickstart, check, tune, report, shape]


def run(args: list[str]) -> None:
    """Run a command; after an error that its arguments have caused, say so in a line and exit with 1."""
    if args[:1] in (["check"], ["tune"], ["report"]) and len(args) > 1 and not args[1].startswith("-"):
        args.insert(1, "--path")  # what a command is about needs no option
    version = mlu_lightning.__version__
    try:
        auto_cli(_COMMANDS, args=args, prog="mlu-lightning", as_positional=False, version=version)
    except ValueError as error:
        say_error(str(error))
        sys.exit(1)
