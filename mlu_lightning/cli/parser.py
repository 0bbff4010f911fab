"""Parse the command line, run its command, and report errors."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentParser

import mlu_lightning
from mlu_lightning.cli.arrangement import arranged, parameters_of
from mlu_lightning.cli.check_command import check_configuration
from mlu_lightning.cli.console import say_error
from mlu_lightning.cli.plan_command import plan
from mlu_lightning.cli.quickstart_command import quickstart
from mlu_lightning.cli.report_command import report
from mlu_lightning.cli.shape_command import shape
from mlu_lightning.cli.tune_command import tune_configuration

# a function with the name of one in the package would be looked for there, which imports half of it
COMMANDS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart,
    "check": check_configuration,
    "tune": tune_configuration,
    "plan": plan,
    "report": report,
    "shape": shape,
}


def run(args: Sequence[str]) -> None:
    """Run a command; after an error that its arguments have caused, say so in a line and exit with 1."""
    usage = "%(prog)s COMMAND [its arguments and options]"
    parser = ArgumentParser(prog="mlu-lightning", usage=usage, version=mlu_lightning.__version__, allow_abbrev=False)
    commands = parser.add_subcommands(required=True, dest="command", prog="mlu-lightning", metavar="COMMAND")
    for name, command in COMMANDS.items():
        description = (inspect.getdoc(command) or "").partition("\n\nArgs:")[0]
        required = (one.name.upper() for one in parameters_of(command).values() if one.default is one.empty)
        usage = " ".join(("mlu-lightning", name, *required, "[options]"))
        subparser = ArgumentParser(usage=usage, description=description, allow_abbrev=False)
        subparser.add_function_arguments(command, as_group=False, as_positional=True)
        commands.add_subcommand(name, subparser, help=description.partition("\n\n")[0])
    found = parser.parse_args(arranged(args, COMMANDS))
    try:
        COMMANDS[found.command](**found[found.command].as_dict())
    except ValueError as error:
        say_error(str(error))
        sys.exit(1)
