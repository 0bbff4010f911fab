"""Map the parameters of a module to their names in its plan."""

from __future__ import annotations

from torch import nn

from mlu_lightning.planning import Plan
from mlu_lightning.utilities.names import planned_name


def plan_names(module: nn.Module, plan: Plan) -> dict[int, str]:
    """Names of a module's parameters by ``id``, as its plan has them, also in wrappers and where they are pruned."""
    return {id(parameter): _planned(name, module, plan) for name, parameter in module.named_parameters()}


def _planned(name: str, module: nn.Module, plan: Plan) -> str:
    planned = planned_name(name)
    owner, _, own = name.rpartition(".")
    if planned in plan.parameters or not own.endswith("_orig"):
        return planned
    # pruning renames it so; others, such as spectral_norm, do too, but not without another function of the module
    buffers = dict(module.get_submodule(owner).named_buffers(recurse=False))
    return planned.removesuffix("_orig") if f"{own.removesuffix('_orig')}_mask" in buffers else planned
