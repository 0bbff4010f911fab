"""What a parameter does where it acts: how far the output of its own submodule moves if it had another value.

A submodule is run again on what it was given, with one parameter replaced and everything else as it is. So neither what
comes before nor what comes after has a part in the difference, except for the multiplier of a branch or readout, which
belongs to the matrix that writes there and is part of it, and of no other parameter of the submodule that it acts on.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mlu_lightning.planning.plan import Plan
from mlu_lightning.table import Role
from mlu_lightning.utilities.function_calls import tensors_in

__all__ = ["Reader", "find_readers", "local_effects", "rms", "value_effects"]


@dataclass(frozen=True)
class Reader:
    """Where the effect of one parameter is read.

    Args:
        parameter: its name.
        owner: the submodule that holds it, whose input it acts on.
        module: the submodule that is run again: the owner, or the smallest one with the owner and the parameter's
            multiplier in it.
        role: of the parameter.
        multiplied: whether the multiplier of a branch is part of what is read.
        before_hooks: whether what is read is what the submodule returns before hooks, which have another's multiplier.

    >>> Reader("mlp.write.weight", "mlp.write", "mlp", Role.BRANCH_OUT, multiplied=True).module
    'mlp'
    """

    parameter: str
    owner: str
    module: str
    role: Role
    multiplied: bool = False
    before_hooks: bool = False


def find_readers(plan: Plan) -> tuple[Reader, ...]:
    """Say where the effects of parameters can be read.

    Those in whose submodule other matrices come after them are left out, such as the projections of queries, keys and
    values in ``nn.MultiheadAttention``, or what a stack of experts reads with: see :func:`value_effects` for these.

    Args:
        plan: of the module; its numbers do not matter.

    >>> from mlu_lightning.models import ResNet
    >>> model = ResNet(depth=1, hidden=8, embedding=6, inputs=3, outputs=2)
    >>> plan = Plan.from_model(model, (torch.ones(5, 3), torch.ones(5, 2)), base=model)
    >>> [(reader.parameter, reader.module) for reader in find_readers(plan)][1:]
    [('blocks.0.read.weight', 'blocks.0.read'), ('blocks.0.write.weight', 'blocks.0'), ('readout.weight', 'readout')]
    """
    sites = {
        name: multiplier
        for multiplier in plan.multipliers
        if multiplier.kind in ("branch", "readout") and multiplier.site is not None
        for name in multiplier.folds
    }
    multiplied = {
        (multiplier.site.module, multiplier.site.where): multiplier
        for multiplier in plan.multipliers
        if multiplier.kind in ("branch", "readout") and multiplier.site is not None
    }
    matrices = [name for name, one in plan.parameters.items() if one.role.is_matrix and one.role is not Role.EMBEDDING]
    found = []
    for name, parameter in plan.parameters.items():
        owner, multiplier = name.rpartition(".")[0], sites.get(name)
        module = owner
        if multiplier is not None and multiplier.site is not None:
            module = _common(owner, multiplier.site.module)
        others = [other for other in matrices if other != name and _is_in(other, module)]
        if multiplier is not None or parameter.role in _LAST:  # all others in its branch come before it
            others = [other for other in others if plan.parameters[other].branch != parameter.branch]
        alone = not others or (
            not parameter.role.is_matrix and [other.rpartition(".")[0] for other in others] == [owner]
        )
        if alone:
            branch = multiplier is not None and multiplier.kind == "branch"
            others_at_end = multiplied.get((module, "output"), multiplier) != multiplier
            found.append(Reader(name, owner, module, parameter.role, branch, others_at_end))
    return tuple(found)


def local_effects(
    module: nn.Module, readers: tuple[Reader, ...], others: Mapping[str, Tensor], run: Callable[[], object]
) -> dict[str, float]:
    """Measure how far outputs move where parameters act, if each had another value on its own.

    Args:
        module: whose parameters they are.
        readers: where to read.
        others: another value of each parameter, by name.
        run: passes a batch through the module; each submodule's first call counts.

    Returns:
        By parameter name, the root mean square of the difference of the output [same unit as the output], over that of
        what the parameter's submodule was given where the parameter is a matrix and is given numbers; without those
        whose submodule was not called.

    >>> layer = nn.Sequential(nn.Linear(2, 3))
    >>> reader = Reader("0.weight", "0", "0", Role.BRANCH_IN)
    >>> other = {"0.weight": layer[0].weight.detach() + 1.0}
    >>> found = local_effects(layer, (reader,), other, lambda: layer(torch.ones(1, 2)))  # two inputs, each of them 1
    >>> round(found["0.weight"], 4)
    2.0
    """
    of_module: dict[str, list[Reader]] = defaultdict(list)
    for reader in readers:
        of_module[reader.module].append(reader)
    sizes: dict[str, float] = {}
    moved: dict[str, float] = {}
    with ExitStack() as stack:
        for owner in dict.fromkeys(reader.owner for reader in readers if reader.role.is_matrix):
            stack.enter_context(_sized(module.get_submodule(owner), owner, sizes))
        for name, here in of_module.items():
            stack.enter_context(_rerun(module.get_submodule(name), name, here, others, moved))
        run()
    return {
        reader.parameter: moved[reader.parameter] / (sizes.get(reader.owner, 1.0) if reader.role.is_matrix else 1.0)
        for reader in readers
        if reader.parameter in moved
    }


def value_effects(
    plan: Plan, names: Iterable[str], values: Mapping[str, Tensor], others: Mapping[str, Tensor], aligned: bool
) -> dict[str, float]:
    """Say from values alone how far the outputs of parameters would move, if each had another value.

    Args:
        plan: of the module.
        names: of the parameters.
        values: of each parameter, by name.
        others: another value of each.
        aligned: whether inputs are what the difference responds to most, as those are that it was learned from; then it
            is the spectral norm between root mean squares. Otherwise inputs are random, as to a matrix that was drawn.

    Returns:
        By parameter name, the root mean square of the difference of the output, for an input of root mean square one.

    >>> from mlu_lightning.models import ResNet
    >>> model = ResNet(depth=1, hidden=8, embedding=6, inputs=3, outputs=2)
    >>> plan = Plan.from_model(model, (torch.ones(5, 3), torch.ones(5, 2)), base=model)
    >>> ones, zeros = {"blocks.0.read.weight": torch.ones(8, 6)}, {"blocks.0.read.weight": torch.zeros(8, 6)}
    >>> round(value_effects(plan, ones, ones, zeros, aligned=True)["blocks.0.read.weight"], 4)  # six inputs, each of them 1
    6.0
    """
    found = {}
    for name in names:
        parameter, difference = plan.parameters[name], (values[name] - others[name]).detach().double()
        inputs, outputs = parameter.fans
        if not parameter.role.is_matrix or difference.ndim < 2 or parameter.role is Role.EMBEDDING:
            found[name] = rms(difference)
        elif aligned:
            maps = difference if difference.ndim == 3 else difference.flatten(1)
            norms = torch.linalg.matrix_norm(maps, ord=2)
            found[name] = rms(norms) * math.sqrt(inputs / outputs)
        else:
            found[name] = rms(difference) * math.sqrt(inputs)
    return found


def rms(values: Tensor) -> float:
    """Root mean square of all entries, in float64.

    Args:
        values: of any shape.

    >>> rms(torch.tensor([3.0, -3.0]))
    3.0
    """
    return values.detach().double().square().mean().sqrt().item()


@contextmanager
def _sized(owner: nn.Module, name: str, sizes: dict[str, float]) -> Iterator[None]:
    """Measure what a submodule is given in its first call."""

    def given(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        numbers = [tensor for tensor in tensors_in((args, kwargs)) if tensor.is_floating_point()]
        if name not in sizes and numbers:
            sizes[name] = rms(numbers[0]) or 1.0

    # before the hook that multiplies what a readout is given
    handle = owner.register_forward_pre_hook(given, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _rerun(
    submodule: nn.Module, name: str, readers: list[Reader], others: Mapping[str, Tensor], moved: dict[str, float]
) -> Iterator[None]:
    """Run a submodule again after its first call, for each of its parameters."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    returned: list[Any] = []
    begun = False

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not given:
            given.append((args, kwargs))

    def early(_: nn.Module, args: Any, output: Any) -> None:
        returned[:] = [output]

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal begun
        if begun:
            return
        begun = True
        (args, kwargs), whole, part = given[0], _first(output).clone(), _first(returned[0]).clone()
        for reader in readers:
            local = reader.parameter[len(name) + 1 :] if name else reader.parameter
            again = functional_call(submodule, {local: others[reader.parameter]}, args, kwargs)
            now, other = (part, _first(returned[0])) if reader.before_hooks else (whole, _first(again))
            effect = rms(now - other)
            # what is lost in rounding is no effect, as of biases of keys, which shift all logits of a softmax
            moved[reader.parameter] = effect if effect > _ROUNDING * torch.finfo(now.dtype).eps * rms(now) else 0.0

    # what was given is kept before other hooks multiply it, because these hooks run again
    handles = (
        submodule.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        submodule.register_forward_hook(early, prepend=True),
        submodule.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Tensor:
    return next(tensor for tensor in tensors_in(output) if tensor.is_floating_point())


_ROUNDING = 4
_LAST = (Role.BRANCH_OUT, Role.BRANCH_OUT_BIAS, Role.READOUT, Role.READOUT_BIAS)


def _is_in(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")


def _common(one: str, other: str) -> str:
    """Longest module name that has both in it."""
    shared = []
    for part, same in zip(one.split("."), other.split("."), strict=False):
        if part != same:
            break
        shared.append(part)
    return ".".join(shared)
