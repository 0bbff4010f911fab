"""Hooks that multiply in a forward pass: a module's output, its input, or rows of the weight that it holds itself."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mlu_lightning.discovery.structure import Site
from mlu_lightning.planning import Multiplier
from mlu_lightning.utilities.module_copies import OwnHook
from mlu_lightning.utilities.names import planned_part

__all__ = ["attach_hooks", "detach_hooks"]


def attach_hooks(module: nn.Module, acting: Mapping[Multiplier, float]) -> tuple[RemovableHandle, ...]:
    """Register a hook for each multiplier; nothing is registered unless all of them have a site of their own."""
    targets: dict[tuple[nn.Module, str, int | None], tuple[Multiplier, Site, float]] = {}
    for multiplier, factor in acting.items():
        site = multiplier.site
        assert site is not None
        try:
            target = planned_part(module, site.module)
        except AttributeError:
            raise ValueError(
                f"The plan multiplies the {multiplier.kind} {multiplier.name!r} at {site}, but the module has no "
                f"submodule {site.module!r}. Plan this module again."
            ) from None
        key = target, site.where, site.index
        if key in targets:
            raise ValueError(
                f"The multipliers of {targets[key][0].name!r} and {multiplier.name!r} have the same place, {site}, and a "
                "hook would multiply both twice. The theory has no weights that branches share; give each branch a module "
                "of its own."
            )
        targets[key] = multiplier, site, factor
    hooks = []
    for (target, where, _), (_, site, factor) in targets.items():
        # The multiplier acts as a part of its module: next to forward, inside the hooks that others have attached.
        if where == "output":
            hooks.append(target.register_forward_hook(_OutputMultiplier(factor, site), prepend=True))
        elif where == "weight":
            assert site.part is not None
            hooks.append(target.register_forward_pre_hook(_RowsMultiplier(factor, site.part)))
            hooks.append(target.register_forward_hook(_restore_rows, always_call=True))
        else:
            hooks.append(target.register_forward_pre_hook(_InputMultiplier(factor, site), with_kwargs=True))
    for target in dict.fromkeys(target for target, _, _ in targets):
        _set_apart(target)
    if hooks and "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # makes room: torch keeps a limited number of versions of compiled code
    return tuple(hooks)


def detach_hooks(module: nn.Module, hooks: tuple[RemovableHandle, ...]) -> None:
    """Take off what :func:`attach_hooks` did to a module, or to one that this is a copy of."""
    for hook in hooks:
        hook.remove()
    for part in module.modules():
        _set_back(part)


_BEFORE = "_mlu_forward"  # where a part with hooks, and its copies, have the forward that somebody had put into it


def _set_apart(module: nn.Module) -> None:
    """Let compiled code, which modules of a class share, tell one with hooks from one without: by its own ``forward``."""
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
    """Call what somebody had put into a module as its ``forward``, in a function that no module without hooks has."""
    return vars(module)[_BEFORE](*args, **kwargs)


@dataclass(frozen=True)
class _OutputMultiplier(OwnHook):
    """Forward hook that multiplies a module's output, one element of it, or a part of its last dimension."""

    factor: float
    site: Site

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        index = self.site.index
        if index is None:
            return self._multiplied(output)
        if isinstance(output, Mapping):
            key = list(output)[index]
            changed: Any = {**output, key: self._multiplied(output[key])}
            return type(output)(**changed)
        if isinstance(output, (tuple, list)):
            elements = [*output]
            elements[index] = self._multiplied(elements[index])
            # a named tuple takes its elements one by one
            return type(output)(*elements) if hasattr(output, "_fields") else type(output)(elements)
        raise self._error(f"a {type(output).__name__}, which has no element {index}")

    def _multiplied(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise self._error(f"a {type(value).__name__} where the plan has a tensor")
        if self.site.part is None:
            return value * self.factor
        start, stop = self.site.part
        period = self.site.period
        blocks = value if period is None else value.reshape(*value.shape[:-1], -1, period)
        scaled = torch.cat((blocks[..., :start], blocks[..., start:stop] * self.factor, blocks[..., stop:]), dim=-1)
        return scaled.reshape(value.shape)

    def _error(self, found: str) -> TypeError:
        return TypeError(
            f"The multiplier {self.factor:g} on {self.site} could not be applied: the module returned {found}. Plan "
            "with an example and settings that make the module return what it returns in training."
        )


@dataclass(frozen=True)
class _InputMultiplier(OwnHook):
    """Forward pre-hook that multiplies the first floating-point tensor a module is called with."""

    factor: float
    site: Site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for position, value in enumerate(args):
            if isinstance(value, Tensor) and value.is_floating_point():
                return (*args[:position], value * self.factor, *args[position + 1 :]), kwargs
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                return args, {**kwargs, name: value * self.factor}
        raise TypeError(
            f"The multiplier {self.factor:g} on {self.site} could not be applied: the module was called without a "
            "floating-point tensor. Plan with an example that calls it as training does."
        )


@dataclass(frozen=True)
class _RowsMultiplier(OwnHook):
    """Forward pre-hook that puts products in the place of a module's own parameters, with some rows multiplied."""

    factor: float
    part: tuple[int, int]

    def __call__(self, module: nn.Module, args: Any) -> None:
        start, stop = self.part
        for name, parameter in module.named_parameters(recurse=False):
            rows = torch.cat((parameter[:start], parameter[start:stop] * self.factor, parameter[stop:]))
            module.__dict__[name] = rows


def _restore_rows(module: nn.Module, args: Any, output: Any) -> None:
    """Take the products of :class:`_RowsMultiplier` away again, also after an error, in a forward hook."""
    for name, _ in module.named_parameters(recurse=False):
        module.__dict__.pop(name, None)
