"""How each optimizer of torch uses the numbers in its parameter groups, and hence by what they are multiplied.

Every rule has one aim: where a weight and its updates are c times and its gradients g times those of the base (theory.md,
section 3), the optimizer does c times what it does at the base, at every step.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mlu_lightning.planning import ParameterPlan, Plan
from mlu_lightning.planning.horizon import Forgetting, Horizon
from mlu_lightning.table import TABLES, OptimizerFamily, Parameterization, Scale

Group = dict[str, Any]
Factor = float | tuple[float, ...] | Forgetting  # of a number in a group, of the numbers in a tuple, or of betas
Family = OptimizerFamily | str | Sequence[OptimizerFamily | str]  # for all groups of an optimizer, or for each of them


@dataclass(frozen=True)
class UpdateRule:
    """How an optimizer uses the numbers in its parameter groups."""

    family: OptimizerFamily
    numbers: Callable[[Group, str, ParameterPlan, Scale], Mapping[str, Factor]]
    """Factors of a group's numbers for one parameter, by name, as planned, and with its scale."""
    at_step: Callable[[Group, Group, Mapping[str, Factor], int], None] | None = None
    """Changes the multiplied group for one step, given the user's group, that, its factors, and the step's number from 1."""

    def family_of(self, group: Group) -> OptimizerFamily:
        """Column of the table for one group: Adam's decay is decoupled if the group says so."""
        if self.family is OptimizerFamily.ADAM and group.get("decoupled_weight_decay", False):
            return OptimizerFamily.ADAMW
        return self.family

    def factors(self, group: Group, name: str, plan: Plan, scale: Scale) -> dict[str, Factor]:
        """Factors for one parameter, without those that are 1 or that the group has no number for."""
        parameter = plan.parameters[name]
        if not TABLES[plan.parameterization].scales_optimizer:
            # also where it looks at shapes (Muon) or sizes (Adafactor) itself
            parameter, scale = (
                replace(parameter, base_shape=parameter.shape),
                replace(scale, std=plan.matched.of(name).std),
            )
        numbers = dict(self.numbers(group, name, parameter, scale))
        if not plan.horizon.is_identity:
            _check_horizon(plan.horizon, group, self.family_of(group))
            numbers["betas"] = plan.horizon.forgetting
            plan.horizon.forgetting(group["betas"])  # refuses those that would become negative
        return {key: factor for key, factor in numbers.items() if key in group and factor not in (1.0, (1.0, 1.0))}


def update_rules(optimizer: Optimizer, family: Family | None = None) -> list[UpdateRule]:
    """Find the rule of every parameter group of an optimizer, from its class or, elsewhere, from a declared family."""
    name = _torch_class(optimizer)
    if name == "LBFGS":
        raise TypeError(
            "LBFGS cannot be scaled: it takes one step for all parameters together, so none has a learning rate of its own. "
            "Use another optimizer, for example AdamW or SGD."
        )
    groups = len(optimizer.param_groups)
    if name in _RULES:
        return [_RULES[name]] * groups
    of_dadaptation = {"d0", "growth_rate", "numerator_weighted"}
    if any("d" in group and group.keys() & of_dadaptation for group in optimizer.param_groups):
        raise TypeError(
            f"{type(optimizer).__name__} estimates one learning rate for all of its parameters together, as Prodigy and "
            "D-Adaptation do, so none has one of its own. Use another optimizer, for example AdamW at the learning rate "
            "that this one finds at the base."
        )
    if family is None:
        raise TypeError(
            f"How {type(optimizer).__name__} uses its learning rate, eps and weight decay is not known: it is not an "
            "optimizer of torch.optim, or it has a step of its own. Use one of torch.optim, or say which column of the "
            'MLU table it follows, with family=... of MLUCallback or scale_optimizer: "sgd" (update proportional to the '
            'gradient, to which decay is added), "adam" (update independent of its size, decay added to it), "adamw" (the '
            'same with decoupled decay) or "muon" (update of unit spectral norm, decoupled decay), or a list with one for '
            "each parameter group."
        )
    families = [family] * groups if isinstance(family, str) else [*family]
    if len(families) != groups:
        raise ValueError(
            f"family={families} names {len(families)} families, and {type(optimizer).__name__} has {groups} parameter "
            "groups. Give one for each group, in their order, or one for all of them. Where families differ, a group that "
            "is added during the run would have none: let the optimizer have it from the start, frozen if need be."
        )
    columns = [OptimizerFamily(each) for each in families]
    return [UpdateRule(column, _declared_muon if column is OptimizerFamily.MUON else _declared) for column in columns]


def is_known(optimizer: Optimizer) -> bool:
    """Whether an optimizer's step is one of torch's, which is known to take its numbers from its groups."""
    return _torch_class(optimizer) in _RULES


def multiplied(value: Any, factor: Factor) -> Any:
    """Multiply a number of a group, or each in a tuple; a tensor stays a tensor, None stays None, 1 changes nothing."""
    if isinstance(factor, Forgetting):
        return factor(value)
    if isinstance(factor, tuple):
        return tuple(multiplied(part, by) for part, by in zip(value, factor, strict=True))
    return value if value is None or factor == 1.0 else value * factor


def divided(value: Any, factor: Factor) -> Any:
    """Undo :func:`multiplied`."""
    if isinstance(factor, Forgetting):
        return factor.undone(value)
    if isinstance(factor, tuple):
        return tuple(divided(part, by) for part, by in zip(value, factor, strict=True))
    return value if value is None or factor == 1.0 else value / factor


def _torch_class(optimizer: Optimizer) -> str | None:
    """Name of the class of ``torch.optim`` whose step the optimizer has, None if it has another."""
    for base in type(optimizer).__mro__:
        if issubclass(base, Optimizer) and base is not Optimizer and f"{base.__module__}.".startswith("torch.optim."):
            return base.__name__ if inspect.unwrap(type(optimizer).step) is inspect.unwrap(base.step) else None
    return None


def _plain(group: Group, name: str, parameter: ParameterPlan, scale: Scale) -> dict[str, Factor]:
    return {"lr": scale.lr, "eps": scale.eps, "weight_decay": scale.weight_decay}


def _declared(group: Group, name: str, parameter: ParameterPlan, scale: Scale) -> dict[str, Factor]:
    for key in ("lr", "eps", "weight_decay"):
        if (key == "lr" or key in group) and not isinstance(group.get(key), (int, float, Tensor)):
            raise ValueError(
                f"A parameter group of the optimizer has {key}={group.get(key)!r}, which is not a number, so it cannot "
                f"be multiplied as {name} needs. Only optimizers whose groups have lr, and perhaps eps and "
                "weight_decay, as numbers can be scaled by naming their family."
            )
    return _plain(group, name, parameter, scale)


def _declared_muon(group: Group, name: str, parameter: ParameterPlan, scale: Scale) -> dict[str, Factor]:
    """Numbers of a Muon of others, which is taken to have no shape factor of its own."""
    _check_muon(name, parameter)
    return _declared(group, name, parameter, scale)


def _asgd(group: Group, name: str, parameter: ParameterPlan, scale: Scale) -> dict[str, Factor]:
    """ASGD's lambd is a decay, also in its schedule 1/(1 + lambd·lr·t)^alpha, which so stays the base's."""
    return {"lr": scale.lr, "lambd": scale.weight_decay, "weight_decay": scale.weight_decay}


def _rprop(group: Group, name: str, parameter: ParameterPlan, scale: Scale) -> dict[str, Factor]:
    """Rprop bounds its steps, which are of the size of the learning rate."""
    return {"lr": scale.lr, "step_sizes": (scale.lr, scale.lr)}


def _adagrad(group: Group, name: str, parameter: ParameterPlan, scale: Scale) -> dict[str, Factor]:
    """Adagrad puts its initial accumulator into the state when it is constructed, where no factor reaches it."""
    if group.get("initial_accumulator_value", 0) != 0 and scale.eps != 1.0:
        raise ValueError(
            f"Adagrad's initial_accumulator_value is {group['initial_accumulator_value']:g}, a squared gradient, which of "
            f"{name} is of another size than at the base, but is in the optimizer's state already. Leave it at 0."
        )
    return _plain(group, name, parameter, scale)


def _adadelta(group: Group, name: str, parameter: ParameterPlan, scale: Scale) -> dict[str, Factor]:
    """Adadelta's eps is a squared gradient below the fraction, and a squared update, before lr, above it."""
    return {"lr": scale.lr / scale.eps, "eps": scale.eps * scale.eps, "weight_decay": scale.weight_decay}


def _radam_step(group: Group, scaled: Group, factors: Mapping[str, Factor], step: int) -> None:
    """RAdam's first steps, as long as its rectification is undefined, are proportional to the gradient."""
    beta2 = float(scaled["betas"][1])
    if 2 / (1 - beta2) - 1 - 2 * step * beta2**step / (1 - beta2**step) > 5:
        return
    gradient = factors.get("eps", 1.0)
    scaled["lr"] = divided(scaled["lr"], gradient)
    if group.get("decoupled_weight_decay", False):
        scaled["weight_decay"] = multiplied(scaled["weight_decay"], gradient)


def _adafactor(group: Group, name: str, parameter: ParameterPlan, scale: Scale) -> dict[str, Factor]:
    """Adafactor's step is relative to the weight's root mean square, which is taken to stay that of initialization."""
    # eps[0] bounds squared gradients from below, and eps[1] that root mean square
    relative = scale.lr / scale.std
    return {"lr": relative, "eps": (scale.eps * scale.eps, scale.std), "weight_decay": 1 / relative}


def _adafactor_step(group: Group, scaled: Group, factors: Mapping[str, Factor], step: int) -> None:
    """Adafactor takes the smaller of lr and 1/sqrt(step): multiply that, and leave lr·weight_decay as is."""
    if "eps" in factors and group["eps"][0] is None:  # which is the machine precision of the parameters
        scaled["eps"] = multiplied((torch.finfo(group["params"][0].dtype).eps, group["eps"][1]), factors["eps"])
    relative, limit = factors.get("lr", 1.0), step**-0.5
    if relative == 1.0:
        return
    wanted = multiplied(min(group["lr"], limit), relative)
    if wanted > limit:
        raise ValueError(
            f"Adafactor takes no steps above 1/sqrt(step), which is {limit:g} at step {step}, but the plan asks for "
            f"{float(wanted):g} for some parameters (lr is {float(group['lr']):g}). Use a smaller lr, let a scheduler "
            "lower it as 1/sqrt(step), or use another optimizer."
        )
    if group["lr"] > limit:
        scaled["lr"] = wanted
        scaled["weight_decay"] = group["weight_decay"] * (group["lr"] / wanted)


def _muon(group: Group, name: str, parameter: ParameterPlan, scale: Scale) -> dict[str, Factor]:
    """torch's Muon multiplies lr by a function of the shape, except in the decay lr·weight_decay: divide it out."""
    _check_muon(name, parameter)
    rows, columns = parameter.shape
    if parameter.base_shape is None:
        inputs, outputs = parameter.ratios.inputs, parameter.ratios.outputs
        by_row, by_column = (inputs, outputs) if parameter.transposed else (outputs, inputs)
        base_rows, base_columns = rows / by_row, columns / by_column
    else:
        base_rows, base_columns = parameter.base_shape
    if group["adjust_lr_fn"] == "match_rms_adamw":
        own = math.sqrt(max(rows, columns)) / math.sqrt(max(base_rows, base_columns))
    else:
        own = math.sqrt(max(1.0, rows / columns)) / math.sqrt(max(1.0, base_rows / base_columns))
    return {"lr": scale.lr / own, "eps": scale.eps, "weight_decay": scale.weight_decay * own}


def _check_horizon(horizon: Horizon, group: Group, family: OptimizerFamily) -> None:
    """Refuse groups for which Complete(d)P has no rule: it is AdamW's."""
    ratios = f"batch_ratio={horizon.batch_ratio:g} and token_ratio={horizon.token_ratio:g}"
    if "betas" not in group or "momentum_decay" in group:
        raise ValueError(
            f"{ratios} change how fast an optimizer's averages forget, and those of this optimizer are not given by "
            "betas alone. Use AdamW, or leave the ratios at 1 and tune the learning rate for this batch size and duration."
        )
    if family is OptimizerFamily.ADAM and group.get("weight_decay", 0) != 0:
        raise ValueError(
            f"{ratios} have a rule for decoupled weight decay only, and the decay of this optimizer, "
            f"{group['weight_decay']:g}, is added to the gradient. Use AdamW, or weight_decay=0."
        )


def _check_muon(name: str, parameter: ParameterPlan) -> None:
    if not TABLES[Parameterization.MLU].rows[parameter.role].spectral:
        raise ValueError(
            f"Muon was given {name}, whose role is {parameter.role}. Its update of unit spectral norm is for matrices "
            "between layers, not for embeddings, readouts, norms and biases. Give these to an AdamW next to Muon."
        )


_RULES: dict[str, UpdateRule] = {
    "SGD": UpdateRule(OptimizerFamily.SGD, _plain),
    "ASGD": UpdateRule(OptimizerFamily.SGD, _asgd),
    "Adam": UpdateRule(OptimizerFamily.ADAM, _plain),
    "AdamW": UpdateRule(OptimizerFamily.ADAMW, _plain),
    "NAdam": UpdateRule(OptimizerFamily.ADAM, _plain),
    "RAdam": UpdateRule(OptimizerFamily.ADAM, _plain, _radam_step),
    "Adamax": UpdateRule(OptimizerFamily.ADAM, _plain),
    "RMSprop": UpdateRule(OptimizerFamily.ADAM, _plain),
    "Adagrad": UpdateRule(OptimizerFamily.ADAM, _adagrad),
    "Adadelta": UpdateRule(OptimizerFamily.ADAM, _adadelta),
    "Rprop": UpdateRule(OptimizerFamily.ADAM, _rprop),
    "SparseAdam": UpdateRule(OptimizerFamily.ADAM, _plain),
    "Adafactor": UpdateRule(OptimizerFamily.ADAMW, _adafactor, _adafactor_step),
    "Muon": UpdateRule(OptimizerFamily.MUON, _muon),
}
