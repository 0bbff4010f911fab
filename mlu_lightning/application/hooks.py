"""Hooks that multiply in a forward pass: a module's output, its input, or rows of the weight that it holds itself."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.compiler import is_compiling
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.hooks import RemovableHandle

from mlu_lightning.application.applied import residual_state
from mlu_lightning.application.state_mark import is_state_hook, mark_states, state_hooks, unmark_states
from mlu_lightning.discovery.structure import Site
from mlu_lightning.planning import Multiplier
from mlu_lightning.utilities.module_copies import OwnHook
from mlu_lightning.utilities.names import planned_part


def attach_hooks(module: nn.Module, acting: Mapping[Multiplier, float]) -> tuple[RemovableHandle, ...]:
    """Register a hook for each multiplier, and mark state dicts; nothing is done unless all have a site of their own."""
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
            kind = _WholeMultiplier if site.index is None and site.part is None else _OutputMultiplier
            hooks.append(target.register_forward_hook(kind(factor, site), prepend=True))
        elif where == "weight":
            hooks.append(target.register_forward_pre_hook(_RowsMultiplier(factor, site)))
            hooks.append(target.register_forward_hook(_restore_rows, always_call=True))
        else:
            hooks.append(target.register_forward_pre_hook(_InputMultiplier(factor, site), with_kwargs=True))
    distinct = dict.fromkeys(target for target, _, _ in targets)
    for target in distinct:
        _set_apart(target)
    if hooks and "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # makes room: torch keeps a limited number of versions of compiled code
    return (*hooks, *mark_states(module, distinct))


def detach_hooks(module: nn.Module, hooks: tuple[RemovableHandle, ...]) -> None:
    """Take off what :func:`attach_hooks` did to a module, or to one that this is a copy of, also if it was interrupted."""
    for handle in hooks:  # some may be of parts that were exchanged
        handle.remove()
    within = (part for part in module.modules() if part is not module)  # which may have a plan of their own
    handles = [handle for applied in filter(None, map(residual_state, within)) for handle in applied.hooks]
    others = {(id(handle.hooks_dict_ref()), handle.id) for handle in handles}
    for part in module.modules():
        for found in (*_hook_dicts(part), *state_hooks(part)):
            for key, hook in [*found.items()]:
                own = isinstance(hook, _Multiplier) or hook is _restore_rows or is_state_hook(hook)
                if own and (id(found), key) not in others:
                    del found[key]
                if isinstance(hook, _RowsMultiplier):
                    _restore_rows(part, (), None)
        _set_back(part)
    unmark_states(module)


def sites_seen(handles: Iterable[RemovableHandle]) -> set[Site]:
    """Sites whose hooks have multiplied in passes with gradients."""
    hooks = _multipliers(handles)
    # modules of one class share compiled code, which has the hook of the first one
    compiled = {hook.kind for hook in hooks if hook.seen.compiled}
    return {hook.site for hook in hooks if hook.seen.called or hook.kind in compiled}


def track(handles: Iterable[RemovableHandle], on: bool = True) -> None:
    """Let hooks note their products in the passes to come, or forget these and note no more."""
    for hook in _multipliers(handles):
        hook.seen.track(on)


def products(handles: Iterable[RemovableHandle]) -> dict[Site, list[Node]]:
    """What hooks have multiplied since they were tracked, but for those through which gradients have gone already."""
    found = {hook.site: hook.seen for hook in _multipliers(handles)}
    return {site: [*seen.products] for site, seen in found.items() if not seen.passed}


def _multipliers(handles: Iterable[RemovableHandle]) -> list[_Multiplier]:
    found = ((handle.hooks_dict_ref() or {}).get(handle.id) for handle in handles)
    return [hook for hook in found if isinstance(hook, _Multiplier)]


def hooks_in(module: nn.Module) -> Iterator[tuple[int, int]]:
    """Hooks that multiply in a module, whoever attached them, by the ``id`` of their dict and their key in it."""
    dicts = (hooks for part in module.modules() for hooks in _hook_dicts(part))
    return ((id(hooks), key) for hooks in dicts for key, hook in hooks.items() if isinstance(hook, _Multiplier))


def _hook_dicts(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return module._forward_hooks, module._forward_pre_hooks


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


class _Seen:
    """Whether a hook was called in a pass with gradients, or when code with it was compiled for one, and its products."""

    def __init__(self) -> None:
        self.called = self.compiled = False
        self.passed = False  # whether gradients have gone through a product since it was tracked
        self.products: dict[Node, RemovableHandle] = {}
        self.tracks = False

    def note(self, product: Tensor) -> Tensor:
        if is_compiling():
            self._note_compiled()
        elif not self.called or self.tracks:
            self._note(product)
        return product

    def track(self, on: bool) -> None:
        for handle in self.products.values():
            handle.remove()
        self.tracks, self.passed, self.products = on, False, {}

    def _note(self, product: Tensor) -> None:
        self.called |= torch.is_grad_enabled()
        node = product.grad_fn
        if self.tracks and node is not None:
            self.products[node] = node.register_prehook(self._pass)

    def _pass(self, gradients: Any) -> None:
        self.passed = True

    def _note_compiled(self) -> None:
        self.compiled |= torch.is_grad_enabled()

    # what torch.compiler.assume_constant_result sets, whose import is slow: it is called as code is compiled, and not later
    _note_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Multiplier(OwnHook):
    factor: float
    site: Site
    seen: _Seen = field(default_factory=_Seen, compare=False)

    @property
    def kind(self) -> tuple[float, Site]:
        """What hooks in the same compiled code have in common."""
        return self.factor, replace(self.site, module="")


@dataclass(frozen=True)
class _OutputMultiplier(_Multiplier):
    """Forward hook that multiplies a module's output, one element of it, or a part of its last dimension."""

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
            return self.seen.note(value * self.factor)
        start, stop = self.site.part
        period = self.site.period
        blocks = value if period is None else value.reshape(*value.shape[:-1], -1, period)
        scaled = torch.cat((blocks[..., :start], blocks[..., start:stop] * self.factor, blocks[..., stop:]), dim=-1)
        return self.seen.note(scaled.reshape(value.shape))

    def _error(self, found: str) -> TypeError:
        return TypeError(
            f"The multiplier {self.factor:g} on {self.site} could not be applied: the module returned {found}. Plan "
            "with an example and settings that make the module return what it returns in training."
        )


@dataclass(frozen=True)
class _WholeMultiplier(_OutputMultiplier):
    """Forward hook that multiplies all of an output, and a linear layer's where it is, as long as nobody else has it.

    No gradient needs that layer's output as it was. There is one of these for each branch, and Python is what it costs.
    """

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if (
            is_compiling()  # which makes one operation of it and what comes next
            or type(output) is not Tensor
            or getattr(module.forward, "__func__", None) is not nn.Linear.forward
            or output._is_view()
            or next(iter(module._forward_hooks.values())) is not self  # others have seen it
            or _global_forward_hooks
        ):
            return self._multiplied(output)
        product, seen = output.mul_(self.factor), self.seen
        return product if seen.called and not seen.tracks else seen.note(product)


@dataclass(frozen=True)
class _InputMultiplier(_Multiplier):
    """Forward pre-hook that multiplies the first floating-point tensor a module is called with."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for position, value in enumerate(args):
            if isinstance(value, Tensor) and value.is_floating_point():
                return (*args[:position], self.seen.note(value * self.factor), *args[position + 1 :]), kwargs
        for name, value in kwargs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                return args, {**kwargs, name: self.seen.note(value * self.factor)}
        raise TypeError(
            f"The multiplier {self.factor:g} on {self.site} could not be applied: the module was called without a "
            "floating-point tensor. Plan with an example that calls it as training does."
        )


@dataclass(frozen=True)
class _RowsMultiplier(_Multiplier):
    """Forward pre-hook that puts products in the place of a module's own parameters, with some rows multiplied."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        assert self.site.part is not None
        start, stop = self.site.part
        for name, parameter in module.named_parameters(recurse=False):
            rows = torch.cat((parameter[:start], parameter[start:stop] * self.factor, parameter[stop:]))
            module.__dict__[name] = self.seen.note(rows)


def _restore_rows(module: nn.Module, args: Any, output: Any) -> None:
    """Take the products of :class:`_RowsMultiplier` away again, also after an error, in a forward hook."""
    for name, _ in module.named_parameters(recurse=False):
        module.__dict__.pop(name, None)
