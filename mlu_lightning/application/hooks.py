"""Hooks that multiply in a forward pass: a module's output, its input, or rows of the weight that it holds itself."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mlu_lightning.discovery.structure import Site
from mlu_lightning.planning.entries import Multiplier
from mlu_lightning.utilities.names import planned_part

__all__ = ["attach_hooks", "detach_hooks"]


def attach_hooks(module: nn.Module, active: Iterable[tuple[Multiplier, float]]) -> list[RemovableHandle]:
    """Register a hook for each multiplier; nothing is registered unless all of them have a place of their own.

    Args:
        module: that has the places.
        active: multipliers and their factors; one without a site is passed over.

    Returns:
        A torch handle for each hook.

    Raises:
        ValueError: if the module does not have a place, or if two multipliers share one.
    """
    owners: dict[tuple[int, str, int | None], str] = {}
    sites: list[tuple[nn.Module, Site, float]] = []
    for multiplier, factor in active:
        site = multiplier.site
        if site is None:
            continue
        try:
            target = planned_part(module, site.module)
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
    for target in {id(target): target for target, _, _ in sites}.values():
        _set_apart(target)
    if hooks and "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # makes room: torch keeps a limited number of versions of compiled code
    return hooks


def detach_hooks(module: nn.Module, hooks: Iterable[RemovableHandle]) -> None:
    """Take off what :func:`attach_hooks` did.

    Args:
        module: that was given to it, or a copy of that.
        hooks: torch handles that it returned, or copies of these.

    >>> from mlu_lightning.discovery.structure import Site
    >>> module = nn.ModuleDict({"mlp": nn.Identity()})
    >>> hooks = attach_hooks(module, [(Multiplier("mlp", "branch", 0.5, Site("mlp"), ()), 0.5)])
    >>> module["mlp"](torch.ones(2))
    tensor([0.5000, 0.5000])
    >>> detach_hooks(module, hooks)
    >>> module["mlp"](torch.ones(2))
    tensor([1., 1.])
    """
    for hook in hooks:
        hook.remove()
    for part in module.modules():
        _set_back(part)


_BEFORE = "_mlu_forward"


def _set_apart(module: nn.Module) -> None:
    """Let compiled code tell a module with hooks from one of its class without.

    All modules of a class share what torch.compile makes of it, and whether code that was made for one without hooks
    fits another is by default decided without a look at hooks. What is always looked at is a ``forward`` of its own.
    """
    before = vars(module).get("forward")
    vars(module)[_BEFORE] = before
    vars(module)["forward"] = MethodType(type(module).forward if before is None else _forward_before, module)


def _set_back(module: nn.Module) -> None:
    """Undo :func:`_set_apart`, unless somebody has put another ``forward`` there since."""
    if _BEFORE not in vars(module):
        return
    before = vars(module).pop(_BEFORE)
    if getattr(vars(module).get("forward"), "__func__", None) in (type(module).forward, _forward_before):
        vars(module).pop("forward")
        if before is not None:
            vars(module)["forward"] = before


def _forward_before(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The ``forward`` that somebody had put into a module itself, in a function that no module without hooks has."""
    return vars(module)[_BEFORE](*args, **kwargs)


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
