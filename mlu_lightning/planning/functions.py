"""Plan weights that are functions of parameters, or say why they cannot be planned.

A weight W = f(v), or g·f(v) with a gain g, should have the table's std, and its steps should be those that the table's
numbers make (theory.md, section 3). An entry of W follows its own of v by the factor rms(W)/rms(v), which is that of the
base where v has the table's std and W, too: then v takes the numbers of W. Where the size of v does not matter, g is what
gives W its size: with a = rms(g) next to the base's, g takes the numbers of a bias that is multiplied by a.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from statistics import geometric_mean

from torch import nn

from mlu_lightning.discovery.structure import Structure, WeightFunction
from mlu_lightning.planning.entries import ParameterPlan
from mlu_lightning.table import OptimizerFamily, Parameterization, Role, scale
from mlu_lightning.utilities.names import name_pattern

_LISTED = 4  # reasons that a message has
_SAME = 0.03  # difference of sizes that comes from random values
_NEAR = 0.1  # difference of sizes that is left where nothing can compensate it


def require_functions(structure: Structure, module: nn.Module) -> None:
    """Refuse weights that are functions of parameters of which it cannot be told how they follow these."""
    found = {name: function for name, function in _functions(structure).items() if function.problem is not None}
    if found:
        raise ValueError(_refusal(type(module).__name__, {name: (f, f.problem or "") for name, f in found.items()}))


def plan_functions(
    structure: Structure, planned: Mapping[str, ParameterPlan], parameterization: Parameterization
) -> dict[str, ParameterPlan]:
    """Make the numbers of parameters that go through functions those of the weights that these make."""
    groups: dict[object, list[str]] = defaultdict(list)  # that differ in their place along the depth only
    functions = _functions(structure)
    for name, function in functions.items():
        both = planned[name], planned[function.entries or name]
        groups[name_pattern(name), tuple((p.role, p.shape, p.base_shape, p.ratios) for p in both)].append(name)
    changed: dict[str, ParameterPlan] = dict(planned)
    refused: dict[str, tuple[WeightFunction, str]] = {}
    for names in groups.values():
        found = _ratio({name: functions[name] for name in names}, planned, parameterization)
        if isinstance(found, str):
            refused[names[0]] = functions[names[0]], found
            continue
        for name in names:
            own = planned[name].base_constant
            changed[name] = replace(planned[name], constant=own and found * own)
    if refused:
        raise ValueError(_refusal("The module", refused))
    return changed


def _functions(structure: Structure) -> dict[str, WeightFunction]:
    facts = structure.parameters.items()
    return {name: f.function for name, f in facts if f.function is not None and f.role is not Role.FROZEN}


def _ratio(
    functions: Mapping[str, WeightFunction], planned: Mapping[str, ParameterPlan], parameterization: Parameterization
) -> float | str:
    """Constant next to the base's that parameters of one group have in their functions, or why there is none."""
    name, function = next(iter(functions.items()))
    matrix = planned[function.entries or name]
    if matrix.role is Role.FROZEN:
        return f"{function.entries} of it is left alone, so that the rest has to be, too"
    if matrix.base_shape is None:
        return "in the absolute form there is no base that tells its size"
    row = matrix.role, matrix.ratios, OptimizerFamily.ADAMW, 1.0, parameterization, matrix.variant
    std, power = scale(*row).std, function.degree or 0
    ratios, moves = [], []
    for of_parameter, f in functions.items():
        entry, of_entries = planned[of_parameter], f.entries or of_parameter
        ratios.append((entry.constant or 1.0) / (entry.base_constant or 1.0))
        # by what initialization multiplies the entries; those that are zero stay zero
        moves.append(std * (planned[of_entries].base_std or 0.0) / f.size(of_entries) or 1.0)
    ratio, move = geometric_mean(ratios), geometric_mean(moves)
    if all(each.shape == each.base_shape and each.ratios.is_identity for each in (matrix, planned[name])):
        return 1.0
    if function.degree is None and abs(math.log(move)) > _NEAR:
        return f"it is not proportional to that parameter, which the plan would multiply by {move:.3g}"
    if name == function.gain:
        ratio *= move**power / std
    elif function.gain is not None:
        return 1.0
    elif function.degree != 1:
        ratio *= move ** (power - 1)
        if abs(math.log(ratio)) > _NEAR:
            size = f"its size would be {ratio * std:.3g} times the base's where the plan asks for {std:.3g} times"
            return f"{size}: that parameter's size does not change it"
        return 1.0
    return 1.0 if abs(math.log(ratio)) < _SAME else ratio


def _refusal(module: str, found: Mapping[str, tuple[WeightFunction, str]]) -> str:
    reasons = dict.fromkeys(
        f"{name_pattern(name)} goes through {function.name} before it meets data, and {why}"
        for name, (function, why) in found.items()
    )
    listed = [*reasons][:_LISTED]
    alone = ", ".join(f'"{pattern}": "{Role.FROZEN}"' for pattern in dict.fromkeys(map(name_pattern, found)))
    more = f"; and {len(reasons) - _LISTED} more" if len(reasons) > _LISTED else ""
    return (
        f"{module} has weights that are functions of parameters and cannot be planned, because neither their initial size "
        f"nor their steps would be the table's: {'; '.join(listed)}{more}. Give such a weight a learned gain for each "
        "output, as torch.nn.utils.parametrizations.weight_norm has; multiply data by one factor after the other, in place "
        "of a product of parameters; leave the function out; or leave the parameters as they are, with "
        f"overrides={{{alone}}}."
    )
