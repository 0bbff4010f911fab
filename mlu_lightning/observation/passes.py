"""Follow one pass of a module, and collect its uses of parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlu_lightning.observation.dataflow import Addition, Dataflow, How, Use
from mlu_lightning.observation.probe import pass_batch, undisturbed
from mlu_lightning.planning import Plan
from mlu_lightning.table import Role
from mlu_lightning.utilities.module_copies import copied_batch
from mlu_lightning.utilities.names import name_pattern_of_parts, planned_parameters
from mlu_lightning.utilities.state import KeptValues

UseKey = tuple[tuple[str, ...], How]  # parameters that are used together, and how


@dataclass(frozen=True)
class Followed:
    """What a pass did with parameters."""

    uses: dict[UseKey, tuple[Use, ...]]
    additions: tuple[Addition, ...]
    shapes: dict[str, tuple[int, ...]]  # of parameters
    sizes: dict[str, float]  # root mean squares of parameters

    @property
    def is_plain(self) -> bool:
        """Whether parameters are used as they are, and no function of them is."""
        return all(use.plain for uses in self.uses.values() for use in uses)


def roles_of_base(plan: Plan, base: nn.Module) -> dict[str, Role]:
    """Roles of a base's parameters, told by their names without numbers, and their shapes."""
    planned = {(name_pattern_of_parts(name), entry.base_shape): entry.role for name, entry in plan.parameters.items()}
    keys = {name: (name_pattern_of_parts(name), tuple(value.shape)) for name, value in planned_parameters(base).items()}
    return {name: planned[key] for name, key in keys.items() if key in planned}


def follow(module: nn.Module, example: Any, roles: Mapping[str, Role], training: bool = False) -> Followed:
    """Pass an example through a module in evaluation mode, or in training, and follow it; the module stays as it is."""
    parameters = planned_parameters(module)
    dtypes = {parameter.dtype for parameter in parameters.values() if parameter.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    device = next(iter(parameters.values())).device

    def copied(leaf: Tensor) -> Tensor:
        return leaf.to(device, dtype if leaf.is_floating_point() else None, copy=True)

    def is_(name: str, *wanted: Role) -> bool:
        return roles.get(name) in wanted

    batch = copied_batch(example, copied)
    gradients = {parameter: parameter.grad for parameter in parameters.values()}
    kept = KeptValues(module.parameters())
    flow = Dataflow(parameters, [name for name in parameters if is_(name, Role.EMBEDDING)], batch, kept)
    try:
        # steps may ask for gradients themselves, as of inputs
        with undisturbed(module, kept=kept), torch.enable_grad():
            module.train(training)
            with flow:
                result = pass_batch(module, batch, "training_step")
            flow.finish(result)
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
    uses: defaultdict[UseKey, list[Use]] = defaultdict(list)
    for use in flow.uses:
        penalty = use.how == "vector" and use.count == 1 and any(parameters[name].numel() > 1 for name in use.names)
        if not penalty:  # one number that is added to the loss
            uses[use.names, use.how].append(use)
    additions = flow.additions(
        lambda name: is_(name, Role.BRANCH_OUT, Role.BRANCH_IN, Role.BRANCH_HIDDEN),
        lambda name: is_(name, Role.BRANCH_OUT),
    )
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    sizes = {name: flow.size(parameter).item() for name, parameter in parameters.items()}
    return Followed({key: tuple(found) for key, found in uses.items()}, additions, shapes, sizes)
