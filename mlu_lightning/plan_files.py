"""Plans as YAML that a person can read and edit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

import yaml

from mlu_lightning.horizon import Horizon
from mlu_lightning.planning import BranchPlan, Multiplier, ParameterPlan, StreamPlan
from mlu_lightning.rules import Parameterization, Ratios, Role
from mlu_lightning.structure import Site, Tap

__all__ = ["parts_from_yaml", "parts_to_yaml"]

_HEADER = """\
# Plan of an MLU parameterization. Roles and ratios (to the base shape) decide every factor; base_std is the root mean
# square of the base's parameter at initialization (null: leave it as it was built).
# Roles: {roles}.
"""
_VERSION = 1
_ADDED: dict[str, Any] = {"rules": "mlu", "horizon": {}, "taps": [], "features": []}
"""What a file means that was written before it had these keys."""


def parts_to_yaml(parts: Mapping[str, Any]) -> str:
    """Write a plan, one line for each parameter, branch, multiplier and tap.

    Args:
        parts: the fields of a ``Plan``.
    """
    lines = [_HEADER.format(roles=", ".join(role.value for role in Role)).rstrip(), f"mlu_plan: {_VERSION}"]
    lines.append(f"rules: {Parameterization(parts['rules']).value}")
    lines.append(f"alpha: {_flow(parts['alpha'])}")
    lines.append(f"horizon: {_flow(asdict(parts['horizon']))}")
    for key in ("warnings", "streams", "branches", "multipliers", "taps", "features"):
        values = parts[key]
        lines.append(f"{key}:" if values else f"{key}: []")
        lines.extend(f"  - {_flow(value if isinstance(value, str) else asdict(value))}" for value in values)
    lines.append("parameters:")
    lines.extend(
        f"  {name}: {_flow(asdict(parameter) | {'role': parameter.role.value})}"
        for name, parameter in parts["parameters"].items()
    )
    return "\n".join(lines) + "\n"


def parts_from_yaml(text: str, source: str) -> dict[str, Any]:
    """Read what ``parts_to_yaml`` wrote, as the fields of a ``Plan``.

    Args:
        text: YAML.
        source: name of the file, for errors.

    Raises:
        ValueError: if it is not a plan, saying where it goes wrong.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {error}") from error
    if not isinstance(content, dict) or "mlu_plan" not in content:
        raise ValueError(
            f"{source} is not a plan: it has no line 'mlu_plan: {_VERSION}'. Write one with Plan.from_model(...).save(path)."
        )
    if content["mlu_plan"] != _VERSION:
        raise ValueError(
            f"{source} has version {content['mlu_plan']!r} of the format of plans, and this mlu-lightning reads version "
            f"{_VERSION}. Update mlu-lightning, or plan the same module and base again: Plan.from_model(...).save(path)."
        )
    content = _ADDED | content
    lists = {"warnings", "streams", "branches", "multipliers", "taps", "features"}
    parts = {"rules", "alpha", "horizon", "parameters"} | lists
    if set(content) - {"mlu_plan"} != parts:
        wrong = sorted(set(content) - {"mlu_plan"} ^ parts)
        raise ValueError(f"{source} is not a complete plan: {', '.join(wrong)} should be there or should not be.")
    if content["rules"] not in set(Parameterization):
        known = ", ".join(Parameterization)
        raise ValueError(f"{source}: there are no rules {content['rules']!r}. Rules are: {known}.")
    return {
        "rules": Parameterization(content["rules"]),
        "alpha": float(content["alpha"]),
        "horizon": _value(Horizon, content["horizon"], source, "horizon"),
        "warnings": tuple(content["warnings"]),
        "streams": tuple(_value(StreamPlan, entry, source, "streams") for entry in content["streams"]),
        "branches": tuple(_value(BranchPlan, entry, source, "branches") for entry in content["branches"]),
        "multipliers": tuple(_value(Multiplier, entry, source, "multipliers") for entry in content["multipliers"]),
        "taps": tuple(_value(Tap, entry, source, "taps") for entry in content["taps"]),
        "features": tuple(_value(Tap, entry, source, "features") for entry in content["features"]),
        "parameters": {
            name: _value(ParameterPlan, entry, source, name) for name, entry in content["parameters"].items()
        },
    }


def _value(cls: type, entry: Any, source: str, where: str) -> Any:
    """A dataclass from the mapping that an entry is."""
    known = {field.name: field for field in fields(cls)}
    required = {name for name, field in known.items() if field.default is MISSING}
    if not isinstance(entry, dict) or not required <= set(entry) <= set(known):
        raise ValueError(f"{source}, {where}: {entry} should be a mapping with the keys {', '.join(known)}.")
    entry = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    if cls is ParameterPlan:
        if entry["role"] not in set(Role):
            roles = ", ".join(role.value for role in Role)
            raise ValueError(f"{source}, {where}: there is no role {entry['role']!r}. Roles are: {roles}.")
        entry["role"] = Role(entry["role"])
        entry["ratios"] = _value(Ratios, entry["ratios"], source, where)
    if cls is Multiplier and entry["site"] is not None:
        entry["site"] = _value(Site, entry["site"], source, where)
    return cls(**entry)


def _flow(value: Any) -> str:
    """One line of YAML."""
    dumped: str = yaml.safe_dump(
        _plain(value), default_flow_style=True, sort_keys=False, width=float("inf"), allow_unicode=True
    )
    return dumped.removesuffix("...\n").rstrip("\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
