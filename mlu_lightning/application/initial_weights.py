"""Detect initial weights that are changed, exchanged or left out between initialization and the first step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mlu_lightning.application.applied import folded_parameters
from mlu_lightning.application.initialization import planned_stds
from mlu_lightning.application.plan_names import plan_names
from mlu_lightning.planning import Plan
from mlu_lightning.table import Role
from mlu_lightning.utilities.names import listed
from mlu_lightning.utilities.samples import samples


class InitialWeights:
    """Weights as ``initialize`` has set them, or a checkpoint, and which of them somebody has changed since."""

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self._module, self._plan = module, plan
        self._changed: dict[str, str] = {}  # names, and what may have done it
        self._before = samples(trained_parameters(module, plan))

    def look(self, who: str) -> None:
        """Look whether weights are what they were; if they are not, it was somebody since the last time."""
        planned = _planned(self._module, self._plan)
        watched = {name: planned[name] for name in self._before if name in planned}  # frozen since, too
        now = samples(watched | trained_parameters(self._module, self._plan))
        for name, found in now.items():
            if name in self._before and not self._before[name].is_of(found):
                self._changed.setdefault(name, who)
        self._before |= now

    @property
    def changed(self) -> dict[str, str]:
        """Names of weights that were changed and are trained, and what may have done it."""
        trained = trained_parameters(self._module, self._plan)
        return {name: who for name, who in self._changed.items() if name in trained}

    @property
    def changed_while_frozen(self) -> dict[str, Tensor]:
        """Parameters that were changed and are not trained yet."""
        names = self._changed.keys() - self.changed.keys()
        return {name: p for name, p in _planned(self._module, self._plan).items() if name in names}


def trained_parameters(module: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Parameters of a plan that are trained: others, such as those of a teacher, are somebody's own business."""
    roles = plan.roles
    return {
        name: parameter
        for name, parameter in _planned(module, plan).items()
        if parameter.requires_grad and roles.get(name, Role.FROZEN) is not Role.FROZEN
    }


def kept_as_built(module: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Parameters that required no gradient as their scale was set, and so have another than that of their plan."""
    parameters, folded, kept = _planned(module, plan), folded_parameters(module), {}
    for name, target in planned_stds(plan).items():
        parameter = parameters.get(name)
        if parameter is not None and not parameter.requires_grad and target and not parameter.is_meta:
            built = float(parameter.detach().float().square().mean().sqrt())
            ratio = built / target / (plan.folded_factors[name] if name in folded else 1.0)
            if ratio and not 0.8 < ratio < 1.25:  # there are less entries than in its group
                kept[name] = parameter
    return kept


def refuse_changed(changed: Mapping[str, str]) -> None:
    """Stop a run whose initial weights are not those that were set."""
    if changed:
        who = " or ".join(dict.fromkeys(changed.values()))
        raise ValueError(
            f"Initial weights that MLUCallback has set were changed before the first step: {listed(changed)}. It was done "
            f"{who}. Draw or load weights before MLUCallback sets their scale: in __init__, setup or configure_model of the "
            "module, or in setup of a callback that comes before it, and fit a module that was built anew; or, if these are "
            "to be trained as they are, give MLUCallback init=None."
        )


def refuse_exchanged(module: nn.Module, plan: Plan) -> None:
    """Stop a run whose module has not the parameters that were planned, nor others of the same shapes in their place."""
    found = _planned(module, plan)
    whole = not any("_fsdp_wrapped_module" in name for name, _ in module.named_parameters())  # FSDP1 leaves shards
    exchanged = [
        name if name not in found else f"{name} (now {list(found[name].shape)}, planned {list(entry.shape)})"
        for name, entry in plan.parameters.items()
        if entry.role is not Role.FROZEN
        and (name not in found or (whole and tuple(found[name].shape) != tuple(entry.shape)))
    ]
    if exchanged:
        raise ValueError(
            f"Parameters were planned that are not in the module as its training starts: {listed(exchanged)}. They were "
            "tied to others, given another shape, or made a function of others (weight_norm, parametrize) since, so what is "
            "in their place has neither the plan's scale nor its learning rates. Do so before MLUCallback plans the module: "
            "in __init__, setup or configure_model of it, or in setup of a callback that comes before."
        )


def _planned(module: nn.Module, plan: Plan) -> dict[str, Tensor]:
    names = plan_names(module, plan)
    return {names[id(parameter)]: parameter for parameter in module.parameters()}
