"""Local effects of parameters: how far the output of a parameter's own submodule moves if it had another value.

A submodule is run again on what it was given, with one parameter replaced and all else as it is. What comes before and after
has no part in the difference, but for the multiplier of a branch or readout, which belongs to the matrix that writes there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mlu_lightning.planning import Plan
from mlu_lightning.table import Role
from mlu_lightning.utilities.function_calls import tensors_in
from mlu_lightning.utilities.names import common_module, owner_of


@dataclass(frozen=True)
class Reader:
    """Where the effect of one parameter is read."""

    parameter: str
    owner: str  # the submodule that holds it, whose input it acts on
    module: str  # what is run again: the owner, or the smallest submodule with it and the parameter's multiplier
    role: Role
    multiplied: bool = False  # whether the multiplier of a branch is part of what is read
    before_hooks: bool = False  # whether the output is read before hooks, which have another parameter's multiplier


def find_readers(plan: Plan) -> tuple[Reader, ...]:
    """Find where the effects of parameters can be read.

    Parameters that other matrices in their submodule follow are left out (projections in ``nn.MultiheadAttention``,
    first matrices of stacked experts): :func:`value_effects` is for these.
    """
    multipliers = [multiplier for multiplier in plan.multipliers if multiplier.kind in ("branch", "readout")]
    attached = [(multiplier, multiplier.site) for multiplier in multipliers if multiplier.site is not None]
    of_parameter = {name: (multiplier, site) for multiplier, site in attached for name in multiplier.folds}
    of_owner = {owner_of(name): found for name, found in of_parameter.items()}
    at_site = {(site.module, site.where): multiplier for multiplier, site in attached}
    entries = plan.parameters
    matrices = [name for name, entry in entries.items() if entry.role.is_matrix and entry.role is not Role.EMBEDDING]
    readers = []
    for name, entry in entries.items():
        owner = owner_of(name)
        # a weight may have a gain that its multiplier folds into
        of_gain = of_owner.get(owner, (None, None)) if entry.role is Role.BRANCH_OUT else (None, None)
        multiplier, site = of_parameter.get(name, of_gain)
        module = owner if site is None else common_module([name, f"{site.module}.{site.where}"])
        others = [other for other in matrices if other != name and (not module or other.startswith(f"{module}."))]
        if multiplier is not None or entry.role in _LAST:  # all others in its branch come before it
            others = [other for other in others if entries[other].branch != entry.branch]
        is_vector_of_matrix = not entry.role.is_matrix and [owner_of(other) for other in others] == [owner]
        if not others or is_vector_of_matrix:
            multiplied = multiplier is not None and multiplier.kind == "branch"
            before_hooks = at_site.get((module, "output"), multiplier) != multiplier
            readers.append(Reader(name, owner, module, entry.role, multiplied, before_hooks))
    return tuple(readers)


def local_effects(
    module: nn.Module, readers: tuple[Reader, ...], replacements: Mapping[str, Tensor], run: Callable[[], object]
) -> dict[str, float]:
    """Measure how far outputs move where parameters act, if each on its own had its replacement as a value.

    ``run`` passes a batch through the module; the first call of each submodule counts. Effects of matrices are relative
    to the size of their input.
    """
    of_module: dict[str, list[Reader]] = defaultdict(list)
    for reader in readers:
        of_module[reader.module].append(reader)
    input_sizes: dict[str, float] = {}
    effects: dict[str, float] = {}
    with ExitStack() as stack:
        for owner in dict.fromkeys(reader.owner for reader in readers if reader.role.is_matrix):
            _measure_input(stack, module.get_submodule(owner), owner, input_sizes)
        for name, here in of_module.items():
            _run_again(stack, module.get_submodule(name), name, here, replacements, effects)
        run()
    called = [reader for reader in readers if reader.parameter in effects]
    scales = [input_sizes.get(reader.owner, 1.0) if reader.role.is_matrix else 1.0 for reader in called]
    return {reader.parameter: effects[reader.parameter] / scale for reader, scale in zip(called, scales, strict=True)}


def value_effects(
    plan: Plan, names: Iterable[str], values: Mapping[str, Tensor], replacements: Mapping[str, Tensor]
) -> dict[str, float]:
    """Estimate from values alone how far outputs of parameters would move, if each had its replacement as a value.

    Inputs of size one are taken to be those that the difference was learned from, so its spectral norm counts.
    """
    found = {}
    for name in names:
        parameter, difference = plan.parameters[name], (values[name] - replacements[name]).detach().double()
        inputs, outputs = parameter.fans
        if not parameter.role.is_matrix or difference.ndim < 2 or parameter.role is Role.EMBEDDING:
            found[name] = rms(difference)
        else:
            maps = difference if difference.ndim == 3 else difference.flatten(1)
            if difference.ndim == 3 and inputs * outputs == difference.numel():
                outputs //= len(maps)  # of a block of a block-diagonal matrix
            norms = torch.linalg.matrix_norm(maps, ord=2)
            found[name] = rms(norms) * math.sqrt(inputs / outputs)
    return found


def rms(values: Tensor) -> float:
    """Root mean square of all entries, in float64."""
    return values.detach().double().square().mean().sqrt().item()


def _measure_input(stack: ExitStack, owner: nn.Module, name: str, sizes: dict[str, float]) -> None:
    """Measure the input of a submodule's first call, by a hook that the stack removes."""

    def measure(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        numbers = [tensor for tensor in tensors_in((args, kwargs)) if tensor.is_floating_point()]
        if name not in sizes and numbers:
            sizes[name] = rms(numbers[0]) or 1.0

    # before the hook that multiplies what a readout is given
    stack.enter_context(owner.register_forward_pre_hook(measure, prepend=True, with_kwargs=True))


def _run_again(
    stack: ExitStack,
    submodule: nn.Module,
    name: str,
    readers: list[Reader],
    replacements: Mapping[str, Tensor],
    effects: dict[str, float],
) -> None:
    """Run a submodule again after its first call, with a replacement of each parameter, by hooks that the stack removes."""
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Any] = []
    begun = False

    def keep_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not inputs:
            inputs.append((args, kwargs))

    def keep_output(_: nn.Module, args: Any, output: Any) -> None:
        outputs[:] = [output]

    def run_again(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal begun
        if begun:
            return
        begun = True
        (args, kwargs), after_hooks, before_hooks = inputs[0], _first(output).clone(), _first(outputs[0]).clone()
        for reader in readers:
            local = reader.parameter[len(name) + 1 :] if name else reader.parameter
            again = functional_call(submodule, {local: replacements[reader.parameter]}, args, kwargs)
            now, other = (before_hooks, _first(outputs[0])) if reader.before_hooks else (after_hooks, _first(again))
            effect = rms(now - other)
            # what is lost in rounding is no effect, as of biases of keys, which shift all logits of a softmax
            effects[reader.parameter] = effect if effect > _ROUNDING * torch.finfo(now.dtype).eps * rms(now) else 0.0

    # inputs are kept before other hooks multiply them, because these hooks run again
    stack.enter_context(submodule.register_forward_pre_hook(keep_inputs, prepend=True, with_kwargs=True))
    stack.enter_context(submodule.register_forward_hook(keep_output, prepend=True))
    stack.enter_context(submodule.register_forward_hook(run_again, with_kwargs=True))


def _first(output: Any) -> Tensor:
    return next(tensor for tensor in tensors_in(output) if tensor.is_floating_point())


_ROUNDING = 4
_LAST = (Role.BRANCH_OUT, Role.BRANCH_OUT_BIAS, Role.READOUT, Role.READOUT_BIAS)
