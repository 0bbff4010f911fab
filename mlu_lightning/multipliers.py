"""Put a plan's forward multipliers into a module: attached as hooks, or folded into its weights.

Both make the same function. Hooks leave the weights as they are and cost a multiplication per branch; folded weights
cost nothing per step and make a checkpoint that any plain model loads. A run stays the same either way if the
optimizer is scaled for the form that was chosen, which :func:`residual_state` tells (theory.md, section 3).
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mlu_lightning.plan import Plan
from mlu_lightning.planning import Multiplier
from mlu_lightning.structure import Site

__all__ = ["MultiplierHandle", "ResidualState", "attach_multipliers", "fingerprint", "fold", "residual_state"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_STATE = "_mlu_residual_state"


@dataclass(frozen=True)
class ResidualState:
    """How a plan's multipliers were put into a module.

    Args:
        mode: ``"hook"`` or ``"fold"``.
        folded: names of the parameters that hold their multipliers; empty in hook mode.
        fingerprint: :func:`fingerprint` of the plan.

    >>> ResidualState("hook", frozenset(), "5f0c").folded
    frozenset()
    """

    mode: Literal["hook", "fold"]
    folded: frozenset[str]
    fingerprint: str


class MultiplierHandle:
    """Takes attached multipliers off again."""

    def __init__(self, module: nn.Module, hooks: list[RemovableHandle]) -> None:
        """Keep the hooks of one :func:`attach_multipliers`.

        Args:
            module: the module that they were attached to.
            hooks: a torch handle for each of them.
        """
        self._module = module
        self._hooks = hooks
        self._removed = False

    def remove(self) -> None:
        """Remove the hooks; the module is as before :func:`attach_multipliers`. A second call does nothing."""
        if self._removed:
            return
        self._removed = True
        for hook in self._hooks:
            hook.remove()
        self._module.__dict__.pop(_STATE, None)


def attach_multipliers(module: nn.Module, plan: Plan) -> MultiplierHandle:
    """Multiply the module's branches, readouts and attention logits by the plan's factors, with hooks.

    Branches by α/l, readouts by 1/d (theory.md, section 3). Weights and ``state_dict`` keys stay as they are, and
    nothing is attached where the factor is exactly 1. Code that ``torch.compile`` made before is dropped, because it
    would go on without the hooks.

    Args:
        module: the module that the plan was made for; changed in place.
        plan: its plan.

    Returns:
        A handle with ``.remove()``.

    Raises:
        ValueError: if the plan does not fit the module, if multipliers are already in it, or if a hook has no place.

    >>> from mlu_lightning import Plan
    >>> from mlu_lightning.structure import Site
    >>> plan = Plan({}, (), (), (Multiplier("mlp", "branch", 0.5, Site("mlp"), ()),))
    >>> module = nn.ModuleDict({"mlp": nn.Identity()})
    >>> handle = attach_multipliers(module, plan)
    >>> module["mlp"](torch.ones(2))
    tensor([0.5000, 0.5000])
    >>> handle.remove()
    >>> module["mlp"](torch.ones(2))
    tensor([1., 1.])
    """
    module = _uncompiled(module)
    _check_fresh(module, plan)
    active = [(multiplier, plan.forward_multiplier(multiplier)) for multiplier in plan.multipliers]
    active = [(multiplier, factor) for multiplier, factor in active if factor != 1]
    for multiplier, _ in active:
        _check_place(multiplier)
        if multiplier.site is None:
            raise ValueError(
                f"The multiplier of the {multiplier.kind} {multiplier.name!r} cannot be attached as a hook, because no "
                'submodule has it as its output or input. Put it into the weights instead: residual="fold", or '
                "fold(module, plan)."
            )
    hooks = _attach(module, active)
    module.__dict__[_STATE] = ResidualState("hook", frozenset(), fingerprint(plan))
    return MultiplierHandle(module, hooks)


def fold(module: ModuleT, plan: Plan, multiplied: bool = False) -> ModuleT:
    """Multiply the plan's factors into the weights that write to branches, readouts and attention logits.

    The function is that of :func:`attach_multipliers`; ``state_dict`` keys stay as they are. A readout tied to an
    embedding cannot be folded: its multiplier becomes a hook in this mode too (theory.md, section 3).

    Args:
        module: the module that the plan was made for; changed in place.
        plan: its plan.
        multiplied: the weights already hold their multipliers, as those of a folded run's checkpoint do: multiply
            nothing, and attach only the hooks.

    Returns:
        The same module.

    Raises:
        ValueError: if the plan does not fit the module, if multipliers are already in it, if one can be neither folded
            nor attached, or if a parameter cannot be multiplied. Nothing was changed then.

    >>> from mlu_lightning import Plan, Ratios, Role
    >>> from mlu_lightning.planning import ParameterPlan
    >>> module = nn.Linear(2, 2, bias=False)
    >>> before = module.weight.detach().clone()
    >>> weight = ParameterPlan(Role.BRANCH_OUT, (2, 2), (2, 2), Ratios(depth=2.0), base_std=None, fans=(2, 2))
    >>> plan = Plan({"weight": weight}, (), (), (Multiplier("mlp", "branch", 0.5, None, ("weight",)),))
    >>> torch.equal(fold(module, plan).weight, before * 0.5)
    True
    >>> residual_state(module).mode, residual_state(module).folded
    ('fold', frozenset({'weight'}))
    """
    plain = _uncompiled(module)
    _check_fresh(plain, plan)
    factors: dict[str, float] = {}
    attached: list[tuple[Multiplier, float]] = []
    for multiplier in plan.multipliers:
        factor = plan.forward_multiplier(multiplier)
        if factor == 1:
            continue
        _check_place(multiplier)
        if not multiplier.folds:
            attached.append((multiplier, factor))
        for name in multiplier.folds:
            factors[name] = factors.get(name, 1.0) * factor
    parameters = _foldable(plain, factors, multiplied)
    _attach(plain, attached)
    if not multiplied:
        with torch.no_grad():
            for name, factor in factors.items():
                parameters[name].mul_(factor)
    plain.__dict__[_STATE] = ResidualState("fold", frozenset(factors), fingerprint(plan))
    return module


def residual_state(module: nn.Module) -> ResidualState | None:
    """Tell how multipliers were put into a module, None if they were not.

    Args:
        module: any module; a deep copy of one with multipliers has them too.

    >>> residual_state(nn.Linear(2, 2)) is None
    True
    """
    state = _uncompiled(module).__dict__.get(_STATE)
    return state if isinstance(state, ResidualState) else None


def fingerprint(plan: Plan) -> str:
    """Name the numbers of a plan that a training run depends on: equal runs have equal fingerprints.

    Roles, shapes, ratios, multipliers, rules, alpha, batch size and duration count; what only initialization uses
    (``base_std``) and texts do not.

    Args:
        plan: any plan.

    Returns:
        64 hexadecimal digits.

    >>> from mlu_lightning import Plan
    >>> fingerprint(Plan({}, (), (), ())) == fingerprint(Plan({}, (), (), (), alpha=2.0))
    False
    """
    content = {
        "parameters": {
            name: [
                str(parameter.role),
                list(parameter.shape),
                *map(float, astuple(parameter.ratios)),
            ]
            for name, parameter in plan.parameters.items()
        },
        "multipliers": [
            [multiplier.name, multiplier.kind, float(multiplier.value), str(multiplier.site), list(multiplier.folds)]
            for multiplier in plan.multipliers
        ],
        "rules": plan.rules.value,
        "alpha": float(plan.alpha),
        "horizon": [*map(float, astuple(plan.horizon))],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _OutputMultiplier:
    """Forward hook that multiplies a module's output, one element of it, or a part of its last dimension."""

    factor: float
    index: int | None
    part: tuple[int, int] | None
    period: int | None
    where: str

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.index is None:
            return self._multiplied(output)
        if isinstance(output, Mapping):
            key = list(output)[self.index]
            changed: Any = {**output, key: self._multiplied(output[key])}
            return type(output)(**changed)
        if isinstance(output, (tuple, list)):
            elements = [*output]
            elements[self.index] = self._multiplied(elements[self.index])
            # a named tuple takes its elements one by one
            return type(output)(*elements) if hasattr(output, "_fields") else type(output)(elements)
        raise TypeError(self._complaint(f"a {type(output).__name__}, which has no element {self.index}"))

    def _multiplied(self, value: Any) -> Tensor:
        if isinstance(value, Tensor):
            if self.part is None:
                return value * self.factor
            start, stop = self.part
            lots = value if self.period is None else value.reshape(*value.shape[:-1], -1, self.period)
            scaled = torch.cat((lots[..., :start], lots[..., start:stop] * self.factor, lots[..., stop:]), dim=-1)
            return scaled.reshape(value.shape)
        raise TypeError(self._complaint(f"a {type(value).__name__} where the plan has a tensor"))

    def _complaint(self, found: str) -> str:
        return (
            f"The multiplier {self.factor:g} on {self.where} could not be applied: the module returned {found}. Plan "
            "with an example and settings that make the module return what it returns in training."
        )


@dataclass(frozen=True)
class _InputMultiplier:
    """Forward pre-hook that multiplies the first floating-point tensor a module is called with."""

    factor: float
    where: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for position, value in enumerate(args):
            if isinstance(value, Tensor) and value.is_floating_point():
                return (*args[:position], value * self.factor, *args[position + 1 :]), kwargs
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                return args, {**kwargs, name: value * self.factor}
        raise TypeError(
            f"The multiplier {self.factor:g} on {self.where} could not be applied: the module was called without a "
            "floating-point tensor. Plan with an example that calls it as training does."
        )


@dataclass(frozen=True)
class _RowsMultiplier:
    """Forward pre-hook that lets a module compute with some rows of its own weight and bias multiplied.

    During the call products stand in the parameters' place; gradients reach the parameters through them.
    """

    factor: float
    part: tuple[int, int]

    def __call__(self, module: nn.Module, args: Any) -> None:
        start, stop = self.part
        for name, parameter in module.named_parameters(recurse=False):
            rows = torch.cat((parameter[:start], parameter[start:stop] * self.factor, parameter[stop:]))
            module.__dict__[name] = rows


@dataclass(frozen=True)
class _RowsRestored:
    """Forward hook that takes the products of :class:`_RowsMultiplier` away again, also after an error."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        for name, _ in module.named_parameters(recurse=False):
            module.__dict__.pop(name, None)


def _attach(module: nn.Module, active: list[tuple[Multiplier, float]]) -> list[RemovableHandle]:
    """Register a hook for each multiplier; nothing is registered unless all of them have a place of their own."""
    owners: dict[tuple[int, str, int | None], str] = {}
    sites: list[tuple[nn.Module, Site, float]] = []
    for multiplier, factor in active:
        site = multiplier.site
        if site is None:
            continue
        try:
            target = module.get_submodule(site.module)
        except AttributeError:
            raise ValueError(
                f"The plan multiplies the {multiplier.kind} {multiplier.name!r} at {site}, but the module has no "
                f"submodule {site.module!r}. Plan this module again."
            ) from None
        place = (id(target), site.where, site.index)
        if place in owners:
            raise ValueError(
                f"The multipliers of {owners[place]!r} and {multiplier.name!r} have the same place, {site}, so a hook "
                "would multiply both twice. Weights that are shared between branches are not covered by the theory; "
                "give each branch a module of its own."
            )
        owners[place] = multiplier.name
        sites.append((target, site, factor))
    hooks = []
    for target, site, factor in sites:
        # The multiplier acts as a part of its module: next to forward, inside the hooks that others have attached.
        if site.where == "output":
            hook = _OutputMultiplier(factor, site.index, site.part, site.period, str(site))
            hooks.append(target.register_forward_hook(hook, prepend=True))
        elif site.where == "weight":
            assert site.part is not None
            hooks.append(target.register_forward_pre_hook(_RowsMultiplier(factor, site.part)))
            hooks.append(target.register_forward_hook(_RowsRestored(), always_call=True))
        else:
            pre_hook = _InputMultiplier(factor, str(site))
            hooks.append(target.register_forward_pre_hook(pre_hook, with_kwargs=True))
    if hooks and "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # code compiled before does not notice hooks that come later
    return hooks


def _foldable(module: nn.Module, factors: Mapping[str, float], multiplied: bool) -> dict[str, nn.Parameter]:
    """Find the parameters to fold into, and refuse those that cannot be multiplied."""
    # Later names of a shared parameter count too.
    parameters = dict(module.named_parameters(remove_duplicate=False))
    missing = sorted(set(factors) - set(parameters))
    if missing:
        raise ValueError(
            f"The plan folds multipliers into parameters that the module does not have: {', '.join(missing)}. Plan "
            "this module again."
        )
    found = {name: parameters[name] for name in factors}
    unfit = [name for name, parameter in found.items() if parameter.is_meta or not parameter.is_floating_point()]
    if unfit and not multiplied:
        raise ValueError(
            "Multipliers cannot be folded into parameters on the meta device or of an integer type: "
            f"{', '.join(sorted(unfit))}. Give them values before folding, or attach the multipliers as hooks: "
            'residual="hook", or attach_multipliers(module, plan).'
        )
    return found


def _check_place(multiplier: Multiplier) -> None:
    """Refuse a multiplier that can be put nowhere."""
    if not multiplier.folds and multiplier.site is None:
        raise ValueError(
            f"The multiplier of the {multiplier.kind} {multiplier.name!r} can be neither folded, because no parameter "
            "of its own writes it, nor attached, because no submodule has it as its output or input. Let the module "
            "compute it in a submodule of its own (an nn.Identity is enough) and plan again."
        )


def _check_fresh(module: nn.Module, plan: Plan) -> None:
    """Refuse a module that the plan does not fit, or that has multipliers already."""
    plan.check(module)
    state = residual_state(module)
    if state is None:
        return
    which = "this plan" if state.fingerprint == fingerprint(plan) else "another plan"
    how = {"hook": "attached as hooks", "fold": "folded into its weights"}[state.mode]
    advice = {
        "hook": "Remove them first, with .remove() of the handle that attach_multipliers returned.",
        "fold": "Start from a module that was built anew.",
    }[state.mode]
    raise ValueError(
        f"The module already has the multipliers of {which}, {how}; putting them in again would multiply twice. "
        f"{advice}"
    )


def _uncompiled(module: nn.Module) -> nn.Module:
    """Return the module inside a ``torch.compile`` wrapper, which has the names that plans use."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module
