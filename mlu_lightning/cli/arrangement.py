"""Arguments of a command line in the order in which they are parsed, in whichever order they are given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence

_Commands = Mapping[str, Callable[..., None]]

_TRUTH = ("true", "false", "yes", "no")


def parameters_of(command: Callable[..., None]) -> Mapping[str, inspect.Parameter]:
    """What a command takes: options, and, without a default, what is required."""
    return inspect.signature(command).parameters


def arranged(args: Sequence[str], commands: _Commands) -> list[str]:
    """Put the command first, then what it requires, with a name or without, and then its options, each with its value."""
    if "--version" in args:
        return ["--version"]
    place = _place_of_command(args, commands)
    if place is None:
        # without a command there are no options, and what is said should be that there is none
        return [arg for arg in args if arg in ("-h", "--help") or not arg.startswith("-")][:1]
    name = args[place]
    required: list[str] = []
    options: list[str] = []
    for words in _grouped([*args[:place], *args[place + 1 :]], parameters_of(commands[name])):
        (options if words[0].startswith("-") else required).extend(words)
    return [name, *required, *options]


def _place_of_command(args: Sequence[str], commands: _Commands) -> int | None:
    """Where the first command stands that is not the value of an option of its own."""
    places = [place for place, arg in enumerate(args) if arg in commands]
    for place in places:
        *_, last = _grouped(args[: place + 1], parameters_of(commands[args[place]]))
        if last == [args[place]]:
            return place
    return next(iter(places), None)


def _grouped(args: Sequence[str], parameters: Mapping[str, inspect.Parameter]) -> Iterator[list[str]]:
    """Arguments, options each with their value, and without the names of what is required."""
    rest = list(args)
    while rest:
        option, equals, _ = (word := rest.pop(0)).partition("=")
        parameter = parameters.get(option.removeprefix("--").partition(".")[0])
        words = [word]
        if option.startswith("-") and not equals:
            flag = parameter is not None and parameter.annotation == "bool"
            if rest and not rest[0].startswith("--") and (not flag or rest[0].lower() in _TRUTH):
                words.append(rest.pop(0))
            elif flag:
                words.append("true")
        required = option.startswith("-") and parameter is not None and parameter.default is parameter.empty
        value = [word.partition("=")[2]] if equals else words[1:]
        yield value if required and value else words
