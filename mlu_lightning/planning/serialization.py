"""Save and load plans as YAML that a person can read and edit.

A file may come from anybody: every value in it has to be of its field's type, or the file is refused. Texts are read as
the field says, whatever YAML would make of them: a branch may be called ``on``, and ``1e-3`` is a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from enum import Enum
from reprlib import repr as shortened
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from mlu_lightning.discovery.structure import Tap
from mlu_lightning.planning.entries import BranchPlan, Multiplier, ParameterPlan, StreamPlan
from mlu_lightning.planning.horizon import Horizon
from mlu_lightning.planning.ranges import in_range, range_of, smallest_integer
from mlu_lightning.table import OptimizerFamily, Parameterization, Role
from mlu_lightning.utilities.plain_yaml import LONGEST, parse_yaml

_HEADER = """\
# Plan of a parameterization. Roles, and fans and depths next to the base's, decide the factors of every parameter, by
# its table; multipliers are the numbers in their lines, whatever it is. For another parameterization make another
# plan: with the word edited, this one would be half of each. base_std is the root mean square of the base's parameter
# at initialization (null: leave it as it was built).
# Roles: {roles}.
"""
_VERSION = 2


def parts_to_yaml(parts: Mapping[str, Any]) -> str:
    """Write the fields of a plan, one line for each parameter, branch, multiplier and tap."""
    lines = [_HEADER.format(roles=", ".join(role.value for role in Role)).rstrip(), f"mlu_plan: {_VERSION}"]
    for key in _PARTS:
        value = parts[key]
        if key in _OPTIONAL and not value:
            continue
        block = isinstance(value, (tuple, dict)) and len(value) > 0
        lines.append(f"{key}:" if block else f"{key}: {_flow(value)}")
        if isinstance(value, dict):
            lines.extend(f"  {_key(name)}: {_flow(entry)}" for name, entry in value.items())
        elif block:
            lines.extend(f"  - {_flow(entry)}" for entry in value)
    text = "\n".join(lines) + "\n"
    length = len(text.encode())
    if length > LONGEST:
        raise ValueError(
            f"The plan of {len(parts['parameters'])} parameters has {length} bytes, and at most {LONGEST} are read, "
            "from a file or a checkpoint. Put parameters that are alike, such as those of experts, into one tensor."
        )
    return text


def parts_from_yaml(text: str, source: str) -> dict[str, Any]:
    """Read the fields of a plan from what :func:`parts_to_yaml` wrote; errors name the source."""
    content = parse_yaml(text, source)
    if not isinstance(content, dict) or "mlu_plan" not in content:
        raise ValueError(
            f"{source} is not a plan: it has no line 'mlu_plan: {_VERSION}'. Write one with Plan.from_model(...).save(path)."
        )
    version = content.pop("mlu_plan")
    if version != str(_VERSION):
        raise ValueError(
            f"{source} has version {shortened(version)} of the format of plans, and this mlu-lightning reads version "
            f"{_VERSION}. Update mlu-lightning, or plan the same module and base again: Plan.from_model(...).save(path)."
        )
    content = {**_OPTIONAL, **content}
    if content.keys() != _PARTS.keys():
        wrong = ", ".join(sorted(content.keys() ^ _PARTS.keys())[:20])
        raise ValueError(f"{source} is not a complete plan: {wrong[:200]} should be there or should not be.")
    parts = {key: _read(hint, content[key], source, key) for key, hint in _PARTS.items()}
    _check_references(parts, source)
    return parts


_PARTS: dict[str, Any] = {
    "parameterization": Parameterization,
    "alpha": float,
    "horizon": Horizon,
    "tuned": dict[str, dict[str, float]],
    "optimizers": tuple[OptimizerFamily, ...],
    "warnings": tuple[str, ...],
    "streams": tuple[StreamPlan, ...],
    "branches": tuple[BranchPlan, ...],
    "multipliers": tuple[Multiplier, ...],
    "taps": tuple[Tap, ...],
    "features": tuple[Tap, ...],
    "parameters": dict[str, ParameterPlan],
}
_OPTIONAL: dict[str, Any] = {"tuned": {}, "optimizers": []}  # where there is none, a file has no line of it
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NULLS = ("null", "Null", "NULL", "~", "")
_BOOLEANS = {"true": True, "True": True, "false": False, "False": False}


def _read(hint: Any, value: Any, where: str, key: str) -> Any:
    """A value of a type, from what YAML has for the key."""
    arguments = get_args(hint)
    if isinstance(hint, type) and is_dataclass(hint):
        return _read_fields(hint, value, where, key)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _read_enum(hint, value, where, key)
    if NoneType in arguments:
        (inner,) = (argument for argument in arguments if argument is not NoneType)
        return None if isinstance(value, str) and value in _NULLS else _read(inner, value, where, key)
    if get_origin(hint) is dict:
        _require(isinstance(value, dict), where, key, value, "a mapping")
        return {name: _read(arguments[1], item, where, name) for name, item in value.items()}
    if get_origin(hint) is tuple:
        _require(isinstance(value, list), where, key, value, "a list")
        if arguments[1] is ...:
            return tuple(_read(arguments[0], item, where, key) for item in value)
        _require(len(value) == len(arguments), where, key, value, f"a list of {len(arguments)}")
        return tuple(_read(one, item, where, key) for one, item in zip(arguments, value, strict=True))
    if get_origin(hint) is Literal:
        _require(value in arguments, where, key, value, f"one of {', '.join(arguments)}")
        return value
    _require(isinstance(value, str), where, key, value, "no list and no mapping")
    if hint is bool:
        _require(value in _BOOLEANS, where, key, value, "true or false")
        return _BOOLEANS[value]
    if hint is int:
        return _read_integer(value, where, key)
    return _read_number(value, where, key) if hint is float else value


def _read_fields(cls: type, value: Any, where: str, key: str) -> Any:
    hints = get_type_hints(cls)
    required = {field.name for field in fields(cls) if field.default is MISSING}
    fits = isinstance(value, dict) and required <= value.keys() <= hints.keys()
    _require(fits, where, key, value, f"a mapping with the keys {', '.join(hints)}")
    return cls(**{name: _read(hints[name], item, f"{where}, {key[:80]}", name) for name, item in value.items()})


def _read_enum(cls: type[Enum], value: Any, where: str, key: str) -> Enum:
    known = [member.value for member in cls]
    if value not in known:
        are, names = ("are", key) if key.endswith("s") else ("is", f"{key}s")
        known_are = f"{names.capitalize()} are: {', '.join(known)}"
        raise ValueError(f"{where}: there {are} no {key} {shortened(value)}. {known_are}.")
    return cls(value)


def _read_integer(text: str, where: str, key: str) -> int:
    smallest = smallest_integer(key)
    right = _INTEGER.fullmatch(text) is not None and int(text) >= smallest
    _require(right, where, key, text, f"a whole number from {smallest} on")
    return int(text)


def _read_number(text: str, where: str, key: str) -> float:
    number = float(text) if _NUMBER.fullmatch(text) else math.nan
    _require(in_range(key, number), where, key, text, range_of(key))
    return number


def _require(right: bool, where: str, key: str, value: Any, what: str) -> None:
    if not right:
        raise ValueError(f"{where}, {key[:80]}: {shortened(value)} should be {what}.")


def _check_references(parts: Mapping[str, Any], source: str) -> None:
    """Refuse what points at a stream, branch or parameter that the plan does not have."""
    streams, branches, parameters = len(parts["streams"]), len(parts["branches"]), parts["parameters"]
    multiplied = {multiplier.name for multiplier in parts["multipliers"] if multiplier.kind == "branch"}
    wrong = [f"branch {b.name!r} in a stream {b.stream}" for b in parts["branches"] if b.stream >= streams]
    wrong += [f"branch {b.name!r} without a multiplier" for b in parts["branches"] if b.name not in multiplied]
    wrong += [
        f"parameter {name!r} in a branch {parameter.branch}"
        for name, parameter in parameters.items()
        if parameter.branch is not None and parameter.branch >= branches
    ]
    along = (tap.number for tap in parts["taps"] if tap.reads != "readout")
    wrong += [f"tap of a stream {number}" for number in along if number >= streams]
    wrong += [f"tap of a branch {tap.number}" for tap in parts["features"] if tap.number >= branches]
    if wrong:
        raise ValueError(f"{source} contradicts itself: it has a {wrong[0]}.")


def _key(name: str) -> str:
    written = _flow(name)
    return written if len(written) < 1000 else f"? {written}\n  "  # YAML looks no further for a colon in a line


def _flow(value: Any) -> str:
    if is_dataclass(value) and not isinstance(value, type):
        empty = [field.name for field in fields(value) if field.default == () == getattr(value, field.name)]
        value = {name: part for name, part in asdict(value).items() if name not in empty}
    style: Any = {"default_flow_style": True, "sort_keys": False, "width": math.inf, "allow_unicode": True}
    dumped: str = yaml.dump(value, Dumper=_OneLine, **style)
    return dumped.removesuffix("...\n").rstrip("\n")


class _OneLine(yaml.SafeDumper):
    """Writes members of enums as their values, and texts with line breaks, which YAML would break up, with escapes."""

    def represent_str(self, data: str) -> Any:
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_OneLine.add_representer(str, _OneLine.represent_str)
_OneLine.add_representer(tuple, _OneLine.represent_list)
_OneLine.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))
