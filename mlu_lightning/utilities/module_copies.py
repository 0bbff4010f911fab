"""Copies of modules and batches to run beside the originals, with fake tensors or shared memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import chain
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map


class OwnHook:
    """A hook that this package has put into a module, and that a copy of it does not have."""


def copied_module(module: nn.Module, fake: FakeTensorMode | None) -> nn.Module:
    """Copy a module with parameters that are fake, or share memory with the originals, and require a gradient.

    Buffers and frozen parameters of one entry are constants: fake ones keep their value (NaN on meta).
    """
    memo: dict[int, Any] = {}
    with nullcontext() if fake is None else fake:
        for parameter in module.parameters():
            stand_in = parameter.detach() if fake is None else fake_tensor(parameter, fake)
            learned = parameter.is_floating_point() and not is_constant(parameter)
            memo[id(parameter)] = nn.Parameter(stand_in, requires_grad=learned)
        if fake is not None:
            for buffer in module.buffers():
                memo[id(buffer)] = fake_tensor(buffer, fake)
        for submodule in module.modules():
            # such as a weight that a hook has computed, and will compute anew
            for value in vars(submodule).values():
                if isinstance(value, Tensor) and not value.is_leaf:
                    memo[id(value)] = value.detach() if fake is None else fake_tensor(value, fake)
    for tensor in chain(module.parameters(), module.buffers()):
        _set_constant(memo.get(id(tensor)), tensor)
    try:
        twin = copy.deepcopy(module, memo).train()
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"{type(module).__name__} cannot be copied ({error}), and planning runs a copy, so that the module itself "
            "stays as it is. Plan it before it holds open files, locks or results of a forward pass, or keep these "
            "outside of the module."
        ) from error
    # functions that a copy makes anew, as compiled parts do, mean it already
    memo |= {id(part): part for part in chain(twin.modules(), twin.parameters(), twin.buffers())}
    for copied in twin.modules():
        for hooks in (copied._forward_hooks, copied._forward_pre_hooks):
            for number in [number for number, hook in hooks.items() if isinstance(hook, OwnHook)]:
                del hooks[number]
        _rebind(vars(copied), memo)
    for original, copied in zip(module.modules(), twin.modules(), strict=True):
        # the Trainer is shared, not copied: it holds the data, the loggers and the module itself
        trainer = vars(original).get("_trainer")
        if trainer is not None:
            vars(copied)["_trainer"] = trainer
        # compiled methods are kept on the instance, are the original's, and would run that
        compiled = ["_compiled_call_impl"]
        if vars(original).get("_compiler_ctx") is not None:
            compiled += ["forward", "training_step", "validation_step", "test_step", "predict_step"]
        for name in compiled:
            vars(copied).pop(name, None)
    return twin


def is_constant(tensor: Tensor) -> bool:
    """Whether a tensor holds one number that no loss changes."""
    return tensor.numel() == 1 and not tensor.requires_grad and tensor.is_floating_point()


def _set_constant(stand_in: Tensor | None, tensor: Tensor) -> None:
    if isinstance(stand_in, FakeTensor) and is_constant(tensor) and not isinstance(tensor, FakeTensor):
        unknown = torch.full(tensor.shape, math.nan).to(tensor.dtype)
        stand_in.constant = unknown if tensor.is_meta else tensor.detach().cpu().clone()


def copied_batch(batch: Any, stand_in: Callable[[Tensor], Tensor]) -> Any:
    """Copy a batch with a stand-in for every tensor, whatever object holds it; what cannot be copied is shared."""

    def copied(leaf: Any) -> Any:
        try:
            return copy.deepcopy(leaf)
        except (TypeError, copy.Error):
            return leaf  # such as a generator

    with _StandIns(stand_in):
        return tree_map(copied, batch)


def fake_tensor(tensor: Tensor, fake: FakeTensorMode) -> Tensor:
    """Make a tensor of the same shape without memory."""
    with torch._C._DisableTorchDispatch():  # the mode may be on, for which this is an operation
        memory = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return FakeTensor(fake, memory, torch.device("cpu") if tensor.is_meta else tensor.device)


class _StandIns(TorchFunctionMode):
    """Has tensors copied as their stand-ins, one for each."""

    def __init__(self, stand_in: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stand_in = stand_in
        self.made: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **kwargs or {})
        if id(args[0]) not in self.made:
            self.made[id(args[0])] = self.stand_in(args[0])
        return self.made[id(args[0])]


def _rebind(values: dict[Any, Any] | list[Any], copies: dict[int, Any]) -> None:
    """Give copied containers functions that mean the copies too, because functions themselves are shared by copies."""
    for key, value in list(values.items() if isinstance(values, dict) else enumerate(values)):
        if isinstance(value, (dict, list)):
            _rebind(value, copies)
        elif isinstance(value, (FunctionType, partial)):
            values[key] = _rebound(value, copies)


def _rebound(value: Any, copies: dict[int, Any]) -> Any:
    """What a copied function has in place of something that the original closes over."""
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, MethodType) or (isinstance(value, (list, tuple, dict)) and _holds_modules(value)):
        return copy.deepcopy(value, copies)
    if isinstance(value, partial):
        return partial(_rebound(value.func, copies), *value.args, **value.keywords)
    if not isinstance(value, FunctionType) or not (value.__closure__ or value.__defaults__ or value.__kwdefaults__):
        return value
    cells = tuple(CellType() for _ in value.__closure__ or ())
    function = FunctionType(value.__code__, value.__globals__, value.__name__, closure=cells)
    copies[id(value)] = function  # before what it closes over, which may be itself
    function.__dict__.update(value.__dict__)
    for cell, original in zip(cells, value.__closure__ or (), strict=True):
        try:
            cell.cell_contents = _rebound(original.cell_contents, copies)
        except ValueError:
            continue  # a variable that has no value yet
    function.__defaults__ = value.__defaults__ and tuple(_rebound(default, copies) for default in value.__defaults__)
    defaults = value.__kwdefaults__
    function.__kwdefaults__ = defaults and {name: _rebound(default, copies) for name, default in defaults.items()}
    return function


def _holds_modules(values: list[Any] | tuple[Any, ...] | dict[Any, Any]) -> bool:
    items = values.values() if isinstance(values, dict) else values
    return any(isinstance(item, (nn.Module, Tensor)) for item in items)
