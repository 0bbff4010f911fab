"""What a parameter does where it acts: how far the output of its own submodule moves if it had another value.

A submodule is run again on what it was given, with one parameter replaced and everything else as it is. So neither what
comes before nor what comes after has a part in the difference, except for the multiplier of a branch or readout, which
belongs to the matrix that writes there and is part of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from mlu_lightning.plan import Plan
from mlu_lightning.rehearsal import tensors_in
from mlu_lightning.rules import Role

__all__ = ["Reader", "find_readers", "local_effects", "rms"]


@dataclass(frozen=True)
class Reader:
    """Where the effect of one parameter is read.

    Args:
        parameter: its name.
        owner: the submodule that holds it, whose input it acts on.
        module: the submodule that is run again: the owner, or the smallest one with the owner and the parameter's
            multiplier in it.
        role: of the parameter.

    >>> Reader("mlp.write.weight", "mlp.write", "mlp", Role.BRANCH_OUT).module
    'mlp'
    """

    parameter: str
    owner: str
    module: str
    role: Role


def find_readers(plan: Plan) -> tuple[Reader, ...]:
    """Say where the effect of every parameter can be read.

    Parameters whose submodule has matrices of several maps in it, such as the projections of
    ``nn.MultiheadAttention`` or a stack of experts, are left out: what one of them does cannot be told from what the
    others do there.

    Args:
        plan: of the module; its numbers do not matter.

    >>> from mlu_lightning.models import ResNet
    >>> model = ResNet(depth=1, hidden=8, embedding=6, inputs=3, outputs=2)
    >>> plan = Plan.from_model(model, (torch.ones(5, 3), torch.ones(5, 2)), base=model)
    >>> [(reader.parameter, reader.module) for reader in find_readers(plan)][1:]
    [('blocks.0.read.weight', 'blocks.0.read'), ('blocks.0.write.weight', 'blocks.0'), ('readout.weight', 'readout')]
    """
    sites = {
        name: multiplier.site
        for multiplier in plan.multipliers
        if multiplier.kind in ("branch", "readout") and multiplier.site is not None
        for name in multiplier.folds or (multiplier.name,)
    }
    matrices: dict[str, int] = defaultdict(int)
    for name, parameter in plan.parameters.items():
        matrices[name.rpartition(".")[0]] += parameter.role.is_matrix
    found = []
    for name, parameter in plan.parameters.items():
        owner = name.rpartition(".")[0]
        if matrices[owner] > 1:
            continue
        site = sites.get(name)
        module = owner if site is None else _common(owner, site.module)
        found.append(Reader(name, owner, module, parameter.role))
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
        reader.parameter: moved[reader.parameter] / sizes.get(reader.owner, 1.0)
        for reader in readers
        if reader.parameter in moved
    }


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
    begun = False

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not given:
            given.append((args, kwargs))

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal begun
        if begun:
            return
        begun = True
        (args, kwargs), now = given[0], _first(output).clone()
        for reader in readers:
            local = reader.parameter[len(name) + 1 :] if name else reader.parameter
            other = _first(functional_call(submodule, {local: others[reader.parameter]}, args, kwargs))
            moved[reader.parameter] = rms(now - other)

    # what was given is kept before other hooks multiply it, because these hooks run again
    handles = (
        submodule.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        submodule.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Tensor:
    return next(tensor for tensor in tensors_in(output) if tensor.is_floating_point())


def _common(one: str, other: str) -> str:
    """Longest module name that has both in it."""
    shared = []
    for part, same in zip(one.split("."), other.split("."), strict=False):
        if part != same:
            break
        shared.append(part)
    return ".".join(shared)
