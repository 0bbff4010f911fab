"""Parse the command line, run its command, and report errors."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence

from jsonargparse import ArgumentParser

import mlu_lightning
from mlu_lightning.cli.check_command import check_configuration
from mlu_lightning.cli.console import say_error
from mlu_lightning.cli.plan_command import plan
from mlu_lightning.cli.quickstart_command import quickstart
from mlu_lightning.cli.report_command import report
from mlu_lightning.cli.shape_command import shape
from mlu_lightning.cli.tune_command import tune_configuration

# a function with the name of one in the package would be looked for there, which imports half of it
_COMMANDS: dict[str, Callable[..., None]] = {
    "quickstart": quickstart,
    "check": check_configuration,
    "tune": tune_configuration,
    "plan": plan,
    "report": report,
    "shape": shape,
}


def run(args: Sequence[str]) -> None:
    """Run a command; after an error that its arguments have caused, say so in a line and exit with 1."""
    parser = ArgumentParser(prog="mlu-lightning", version=mlu_lightning.__version__, allow_abbrev=False)
    commands = parser.add_subcommands(required=True, dest="command")
    for name, command in _COMMANDS.items():
        description = (inspect.getdoc(command) or "").partition("\n\nArgs:")[0]
        subparser = ArgumentParser(description=description, allow_abbrev=False)
        subparser.add_function_arguments(command, as_group=False, as_positional=True)
        commands.add_subcommand(name, subparser, help=description.partition("\n\n")[0])
    found = parser.parse_args(_without_required(args))
    try:
        _COMMANDS[found.command](**found[found.command].as_dict())
    except ValueError as error:
        say_error(str(error))
        sys.exit(1)


def _without_required(args: Sequence[str]) -> list[str]:
    """Leave out the names of required arguments, which need none: ``shape --parameters 1e8`` is ``shape 1e8``."""
    command = _COMMANDS.get(args[0]) if args else None
    parameters = {} if command is None else inspect.signature(command).parameters
    required = {f"--{name}" for name, parameter in parameters.items() if parameter.default is parameter.empty}
    kept = []
    for arg in args:
        name, equals, value = arg.partition("=")
        if name not in required:
            kept.append(arg)
        elif equals:
            kept.append(value)
    return kept
