"""Functions of parameters that become weights: what these are proportional to, by their values at a few points.

What counts is how the weight's size and its steps follow those of a parameter. Weight norm g·v/|v|: each entry of the
weight follows its own of v, whose size does not matter, and g multiplies it; a rounding that keeps the scale is
proportional to its parameter; softplus is neither.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import dropwhile

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from mlu_lightning.discovery.graph import PARTS, RESHAPES, Graph, Use
from mlu_lightning.discovery.structure import Along, WeightFunction
from mlu_lightning.discovery.trace import Trace
from mlu_lightning.discovery.weight_programs import Program
from mlu_lightning.utilities.names import name_pattern

_PRODUCTS = frozenset({"Mv", "Mm", "Bmm"})
"""Products that may be with constants, as with the vectors that spectral norm keeps."""
_TOLERANCE = 0.05  # part of a weight that may be there for other reasons, such as the eps of a norm
_OPERATIONS = 6  # operations that a message names


def has_functions(graph: Graph) -> bool:
    """Whether matrices may be functions of parameters, and not parameters that are only arranged."""
    return any(use.is_computed for uses in graph.uses.values() for use in uses) or any(
        op.name in _PRODUCTS and not op.data for op in graph.uses
    )


def matrices_of_constants(graph: Graph) -> frozenset[Node]:
    """What matrices make of constants, as of sines and cosines of positions, where that was taken for a weight."""
    uses = (use for uses in graph.uses.values() for use in uses)
    unread = (use for use in uses if use.function is not None and use.function.problem is not None)
    rests = ([*dropwhile(lambda step: step.name in RESHAPES | PARTS, use.path)] for use in unread)
    made = (rest for rest in rests if rest and rest[0].name in ("Mm", "Bmm") and None in rest[0].operands)
    return frozenset(step.node for rest in made for step in rest)


def with_functions(graph: Graph, trace: Trace) -> Graph:
    """Read the functions of a graph, in a pass that kept their programs; a gain becomes a use of its own kind."""
    known: dict[object, WeightFunction] = {}
    return replace(
        graph,
        uses={
            op: tuple(_read(use, uses, trace, known) if use.is_computed else use for use in uses)
            for op, uses in graph.uses.items()
        },
    )


def _read(use: Use, beside: tuple[Use, ...], trace: Trace, known: dict[object, WeightFunction]) -> Use:
    operand = use.path[-1]
    number = next(output for op, output in filter(None, use.op.operands) if op is operand)
    program = trace.programs.get((operand.node, number))
    names = [other.parameter for other in beside if other.is_computed and other.path[-1] is operand]
    key = operand, number
    if key not in known:
        called = _called(use.parameter, trace.copy, program)
        known[key] = (
            WeightFunction(called, problem="it cannot be followed")
            if program is None
            else _function(called, program, use, known)
        )
    function = known[key]
    if use.parameter == function.gain:
        return replace(use, kind="gain", shape=use.stored, shared=False, function=function)
    return replace(use, shared=function.problem is not None and len(names) > 1, function=function)


def _function(called: str, program: Program, use: Use, known: dict[object, WeightFunction]) -> WeightFunction:
    if any(leaf.is_meta for leaf in program.leaves):
        return WeightFunction(called, problem="it has no values on the meta device, from which it could be read")
    values = {name: _some(value) for name, value in program.values.items()}
    weight = program.run(values)
    sizes = (("", _rms(weight)), *((name, _rms(value)) for name, value in values.items()))
    # along the depth, functions differ in sizes alone
    alike = tuple((name_pattern(name), value.shape) for name, value in values.items()), program.operations
    if alike not in known:
        known[alike] = _kind(called, program, values, weight, use)
    kind, of_kind = known[alike], dict(zip(map(name_pattern, values), values, strict=True))

    def here(name: str | None) -> str | None:
        return None if name is None else of_kind[name_pattern(name)]

    return replace(kind, entries=here(kind.entries), gain=here(kind.gain), sizes=sizes)


def _kind(called: str, program: Program, values: Mapping[str, Tensor], weight: Tensor, use: Use) -> WeightFunction:
    degrees = {name: _degree(program, values, weight, name) for name in values}
    entries = [name for name in values if _is_entrywise(program, values, weight, name)]
    others = [name for name in values if name not in entries]
    gains = (degrees[name] == 1 and values[name].numel() <= max(weight.shape) for name in others)  # no matrices
    if len(entries) != 1 or len(others) > 1 or not all(gains):
        return WeightFunction(called, problem="its entries mix those of parameters, as a product of matrices does")
    found = WeightFunction(called, entries[0], degrees[entries[0]])
    gain = next(iter(others), None)
    return found if gain is None else replace(found, gain=gain, along=_along(program, values, weight, gain, use))


def _degree(program: Program, values: Mapping[str, Tensor], weight: Tensor, name: str) -> int | None:
    """Power of a parameter's size that a weight is proportional to, 0 or 1."""
    doubled = program.run({**values, name: values[name] * 2})
    near = (k for k in (0, 1) if _rms(doubled - 2**k * weight) <= _TOLERANCE * 2**k * _rms(weight))
    return next(near, None)


def _is_entrywise(program: Program, values: Mapping[str, Tensor], weight: Tensor, name: str) -> bool:
    """Whether one entry of the weight takes most of a change of one entry of a parameter."""
    if values[name].numel() < weight.numel():
        return False
    changes = [_changed(program, values, weight, name, place).square() for place in _places(values[name].numel())]
    return sum(float(change.max()) for change in changes) > 0.5 * sum(float(change.sum()) for change in changes)


def _along(program: Program, values: Mapping[str, Tensor], weight: Tensor, name: str, use: Use) -> Along:
    """What an entry of a gain multiplies: all of an output, all that reads an input, or something else."""
    entries = values[name].numel()
    change = _changed(program, values, weight, name, entries // 2).abs()
    changed = change > 1e-3 * change.max()
    for along, axis in zip(("outputs", "inputs"), use.axes, strict=True):
        reached = int(changed.movedim(axis, 0).flatten(1).any(1).sum()) if changed.ndim > 1 else int(changed.sum())
        if entries > 1 and reached * entries == weight.shape[axis]:
            return "outputs" if along == "outputs" else "inputs"
    return "bounded"


def _changed(program: Program, values: Mapping[str, Tensor], weight: Tensor, name: str, place: int) -> Tensor:
    """Change of the weight with the sign of one entry of a parameter, which leaves all sizes as they are."""
    value = values[name].clone()
    value.view(-1)[place].neg_()
    return program.run({**values, name: value}) - weight


def _places(entries: int, most: int = 9) -> Iterable[int]:
    return sorted({(2 * i + 1) * entries // (2 * most) for i in range(most)})


def _some(value: Tensor) -> Tensor:
    """Values of a parameter, or others where all are zero, at which nothing can be read."""
    if bool(value.any()):
        return value.contiguous()
    generator = torch.Generator().manual_seed(0)
    return torch.randn(value.shape, generator=generator).to(value)


def _rms(value: Tensor) -> float:
    return math.sqrt(float(value.abs().double().square().mean()))


def _called(parameter: str, module: nn.Module, program: Program | None) -> str:
    """Name a function by the class of a parametrization, a hook, or the module that has the parameter."""
    owner = module.get_submodule(parameter.rpartition(".")[0])
    parts: list[object] = [owner]
    if isinstance(owner, nn.utils.parametrize.ParametrizationList):
        parts = [*owner]
    else:
        parts = [hook for hook in owner._forward_pre_hooks.values() if hasattr(hook, "compute_weight")] or parts
    words = (re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", type(part).__name__.strip("_")).lower() for part in parts)
    operations = () if program is None else program.operations
    more = ", …" if len(operations) > _OPERATIONS else ""
    listed = f" ({', '.join(operations[:_OPERATIONS])}{more})" if operations else ""
    return " and ".join(words) + listed
