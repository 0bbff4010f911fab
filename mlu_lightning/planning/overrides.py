"""Apply roles that the user gives where discovery cannot tell, or should not."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from torch import nn

from mlu_lightning.discovery.structure import ParameterFacts, Structure
from mlu_lightning.table import TABLES, Parameterization, Role, Variant, row_name
from mlu_lightning.utilities.names import listed, name_pattern, planned_parameters

_Value = TypeVar("_Value")


def override_roles(
    structure: Structure, overrides: Mapping[str, Role | str], elsewhere: Iterable[str] = ()
) -> Structure:
    """Replace roles by those that the user gives, by glob pattern of parameter names; later patterns win.

    A pattern may match names ``elsewhere`` instead: a base has no counterpart of the last blocks of a deeper module.
    """
    parameters, copies = dict(structure.parameters), dict(structure.copies)
    sizes = {(stream.embedding,) for stream in structure.streams}
    for pattern, role in overrides.items():
        matches = fnmatch.filter(parameters, pattern)
        if not matches and not fnmatch.filter(elsewhere, pattern):
            raise ValueError(
                f"The override {pattern!r}: {str(role)!r} matches no parameter, so it would do nothing. Names are those of "
                f"named_parameters(), such as {', '.join(list(parameters)[:3])}; patterns are globs, such as '*.bias'."
            )
        if str(role).startswith(_COPY):
            copy = pattern.partition("*")[0].rstrip(".")
            copies = {name: of for name, of in copies.items() if not name.startswith(f"{copy}.")}  # the whole says it
            copies[copy] = str(role).removeprefix(_COPY)
            role = Role.FROZEN
        if str(role) not in _ROWS:
            raise ValueError(
                f"The override {pattern!r} names the role {str(role)!r}, which does not exist. Roles are: "
                f"{', '.join(_ROWS)}; what is a copy of another submodule is '{_COPY}net'."
            )
        for name in matches:
            (given, variant), facts = _ROWS[str(role)], parameters[name]
            _check_readout(structure, name, given, pattern)
            if given is facts.role:
                variant = variant or facts.variant
            elif given is Role.EMBEDDING and facts.role in (None, Role.FROZEN) and facts.shape[1:] in sizes:
                # autograd has not shown which way round it is: a table, as of positions
                facts = replace(facts, fan_in=1, fan_out=facts.shape[1], transposed=True)
            parameters[name] = replace(facts, role=given, variant=variant)
    unassigned = {name: why for name, why in structure.unassigned.items() if parameters[name].role is None}
    left_alone = {name for name, facts in parameters.items() if facts.role is Role.FROZEN}
    return replace(
        structure,
        parameters=parameters,
        branches=tuple(replace(b, folds=() if left_alone & {*b.folds} else b.folds) for b in structure.branches),
        readouts=tuple(readout for readout in structure.readouts if readout.parameter not in left_alone),
        unassigned=unassigned,
        copies=_checked(copies, parameters),
    )


def _checked(copies: Mapping[str, str], parameters: Mapping[str, ParameterFacts]) -> dict[str, str]:
    """Copies that are still left alone; refuse what is no copy of the submodule that is named."""
    found = {}
    for copy, original in copies.items():
        names = [name for name in parameters if name.startswith(f"{copy}.")]
        if all(parameters[name].role is Role.FROZEN for name in names):
            found[copy] = original
        for name in names:
            other = f"{original}{name[len(copy) :]}"
            if other not in parameters or parameters[other].shape != parameters[name].shape:
                raise ValueError(
                    f"The overrides make {copy} a copy of {original}, but {name} {list(parameters[name].shape)} has no "
                    f"counterpart {other} of this shape. Name the submodule whose parameters have the same names inside."
                )
    return found


def require_roles(structure: Structure, module: nn.Module, overrides: Mapping[str, Role | str]) -> None:
    """Refuse a structure in which a parameter has no role, with the overrides that would settle it."""
    left_alone = [pattern for pattern, role in overrides.items() if role == Role.FROZEN]
    parameters = ((name, p) for name, p in planned_parameters(module).items() if p.is_complex() and p.requires_grad)
    complex_ones = [name for name, _ in parameters if not any(fnmatch.fnmatch(name, each) for each in left_alone)]
    if complex_ones:
        alone = ", ".join(f'"{pattern}": "{Role.FROZEN}"' for pattern in dict.fromkeys(map(name_pattern, complex_ones)))
        raise ValueError(
            f"Parameters of {type(module).__name__} are complex: {listed(complex_ones)}. The table is one of real weights, "
            f"so leave them as they are with overrides={{{alone}}}, and choose their numbers yourself."
        )
    if not structure.unassigned:
        return
    shapes = {name: structure.parameters[name].shape for name in structure.unassigned}
    reasons = {name: f"{list(shapes[name])}: {why}" for name, why in structure.unassigned.items()}
    found = "; ".join(f"{pattern} {reason}" for pattern, reason in _along_depth(reasons, structure).items())
    placed = ((name, structure.parameters[name]) for name in shapes)
    rows = {name: (f.likely or Role.STREAM_NORM, f.variant) for name, f in placed}
    likely = {name: row_name(*row) if row_name(*row) in _ROWS else row[0].value for name, row in rows.items()}
    lines = ", ".join(f'"{pattern}": "{role}"' for pattern, role in _along_depth(likely, structure).items())
    raise ValueError(
        f"{len(shapes)} of the parameters of {type(module).__name__} could not be placed ({found}). Say what they are for, "
        f"for example overrides={{{lines}}}; roles are: {', '.join(_ROWS)}."
    )


def _along_depth(values: dict[str, _Value], structure: Structure) -> dict[str, _Value]:
    """Write names as globs over blocks, where those match nothing that has another value."""
    patterns = {}
    for name, value in values.items():
        pattern = name_pattern(name)
        alike = {values.get(other) for other in fnmatch.filter(structure.parameters, pattern)}
        patterns[pattern if alike == {value} else name] = value
    return patterns


def _check_readout(structure: Structure, name: str, role: Role, pattern: str) -> None:
    """Refuse to change which matrices are readouts: their multipliers are placed by discovery."""
    facts = structure.parameters[name]
    found = any(readout.parameter == name for readout in structure.readouts)
    changes = role not in (Role.FROZEN, facts.role)
    if changes and found != (role is Role.READOUT) and (found or _is_matrix(facts.shape)):
        here = "was found to be a readout" if found else f"was not found to be one (its role is {facts.role})"
        raise ValueError(
            f"The override {pattern!r} makes {name} {'a' if found else 'the'} {role}, but it {here}. A readout's output is "
            "multiplied by 1/d, and where that is cannot be said by a role. Leave the role of this matrix as it was "
            f"found; a matrix from the stream to an output of bounded size is a {Role.STREAM_BOUNDED_MATRIX}."
        )


_COPY = "copy_of "  # how an override begins that names the submodule of which another one is a copy

_ROWS: dict[str, tuple[Role, Variant | None]] = {role.value: (role, None) for role in Role} | {
    row_name(role, variant): (role, variant) for role, variant in TABLES[Parameterization.MLU].variants
}


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return sum(size > 1 for size in shape) > 1
