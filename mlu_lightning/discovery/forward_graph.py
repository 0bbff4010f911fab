"""Build the graph of a traced module from autograd's nodes, with every use of a parameter."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from typing import Any

from torch.autograd.graph import Node

from mlu_lightning.discovery.axes import joined_along, kept_axes
from mlu_lightning.discovery.graph import (
    BIAS_SLOTS,
    CONVOLUTIONS,
    LOOKUPS,
    NORMS,
    PARTS,
    PRODUCTS,
    RESHAPES,
    SELECTIONS,
    USE_KINDS,
    WEIGHT_SLOTS,
    Graph,
    Op,
    Use,
    UseKind,
    Value,
)
from mlu_lightning.discovery.trace import Trace
from mlu_lightning.discovery.traversal import descendants
from mlu_lightning.utilities.autograd_nodes import nodes_below


def build_graph(trace: Trace, of_constants: frozenset[Node] = frozenset()) -> Graph:
    """Turn autograd's nodes into operations; ``of_constants`` are products of parameters with constants, and no weights."""
    nodes = tuple(nodes_below(trace.roots))
    weights = _weights(nodes, trace) - of_constants
    ops, by_node = _operations(nodes, trace.parameters, frozenset(), weights)
    begins = stream_parameters(ops)
    if begins:
        ops, by_node = _operations(nodes, trace.parameters, begins, weights)
    lead_on = {by_node[node] for node in trace.roots}  # not what was only there to be joined and taken apart again
    for op in reversed(ops):
        if op in lead_on:
            lead_on.update(op.data)
    uses = {op: found for op in ops if op.from_data and op in lead_on and (found := tuple(_uses(op)))}
    uses |= {op: tuple(replace(use, kind="penalty") for use in uses[op]) for op in _penalties(ops) if op in uses}
    return Graph(ops, uses, by_node, tuple(by_node[node] for node in trace.roots))


def _operations(
    nodes: tuple[Node, ...], names: dict[int, str], begins: frozenset[str], weights: set[Node]
) -> tuple[tuple[Op, ...], dict[Node, Op]]:
    """Operations, and the last one of each node; parameters in ``begins`` are data, and ``weights`` are not."""
    ops: list[Op] = []
    by_node: dict[Node, Op] = {}
    for node in nodes:
        name = _plain_name(node)
        children = node.next_functions
        if name == "Copy":  # it overwrites the first
            children = (None, 0), children[1]
        operands = tuple(None if child is None else (by_node[child], i) for child, i in children)
        values = tuple(operand for operand in operands if operand is not None and operand[0].from_data)
        leaf = getattr(node, "variable", None) if not operands else None
        parameter = names.get(id(leaf)) if leaf is not None else None
        is_data = parameter is None or parameter in begins
        if operands:
            is_data = bool(values) or (node not in weights and _takes_data(name, operands, values))
        shapes, data = tuple(tuple(meta.shape) for meta in node._input_metadata), tuple(op for op, _ in values)
        ops += _written_out(Op(len(ops), name, shapes, operands, values, data, is_data, parameter, node))
        by_node[node] = ops[-1]
    return tuple(ops), by_node


def _written_out(op: Op) -> Iterator[Op]:
    """An operation, or the products and additions that it is of what was stacked before."""
    joined, weights = _summands(op)
    if not joined:
        yield op
        return
    index = count(op.index)

    def step(name: str, *operands: Value | None, **saved: object) -> Op:
        values = tuple(value for value in operands if value is not None and value[0].from_data)
        node: Any = SimpleNamespace(_sequence_nr=op.node._sequence_nr, **saved)
        data = tuple(operand for operand, _ in values)
        shapes = ((),) if name == "Select" else op.shapes
        made = replace(op, index=next(index), name=name, shapes=shapes, operands=operands, values=values, data=data)
        return replace(made, from_data=bool(values), node=node)

    steps: list[Op] = []
    total = joined[0]
    for number, value in enumerate(joined):
        if weights is not None:
            weight = step("Select", weights, _saved_dim=0, _saved_index=number)
            steps += [weight, step("Mul", value, (weight, 0))]
            value = steps[-1], 0
        if number:
            steps.append(step("Add", total, value, _saved_alpha=1))
        total = (steps[-1], 0) if number else value
    if op.name == "Mean":
        steps.append(step("Div", total, None, _saved_other=len(joined)))
    bias = BIAS_SLOTS.get(op.name, len(op.operands))
    if bias < len(op.operands) and op.operands[bias] is not None:
        steps.append(step("Add", total, op.operands[bias], _saved_alpha=1))
    yield from steps


def _summands(op: Op) -> tuple[tuple[Value, ...], Value | None]:
    """Values that an operation sums, each of which is as large as their sum, and parameters that weigh them; or none."""
    if len(op.values) != 1 or None in op.values:
        return (), None
    (value,) = op.values
    axes = len(value[0].shapes[value[1]])
    weights: Value | None = None
    if op.name in ("Sum", "Mean", "Nansum"):
        summed = [axis for axis in range(axes) if axis not in kept_axes(op, axes)]
        while value[0].is_transparent and value[0].shape == value[0].data[0].shape:
            value = value[0].values[0]
        others = [operand for operand in value[0].operands if operand is not None and operand not in value[0].values]
        if value[0].name == "Mul" and len(value[0].data) == len(others) == 1:
            (weights,), value = others, value[0].values[0]
    elif op.name in WEIGHT_SLOTS and op.name not in CONVOLUTIONS:
        factors = op.operands[op.name in ("Addmm", "Baddbmm") :][:2]
        summed = [axes - 1 if factors[0] == value else axes - 2]
        weights = next((operand for operand in factors if operand != value), None)
    else:
        return (), None
    joined = joined_along(value, summed[0]) if len(summed) == 1 else ()
    size = math.prod(op.shape)
    fits = len(joined) > 1 and all(math.prod(o.shapes[i]) == size for o, i in joined)
    fits = fits and (weights is None or math.prod(weights[0].shapes[weights[1]]) == len(joined))
    return (joined, weights) if fits else ((), None)


def _weights(nodes: tuple[Node, ...], trace: Trace) -> set[Node]:
    """What is computed from parameters and constants before it is the matrix of data, as in spectral norm."""
    found: set[Node] = set()
    for node in nodes if trace.programs else ():
        slots = WEIGHT_SLOTS.get(_plain_name(node), {})
        operands = [node.next_functions[slot] for slot in slots if slot < len(node.next_functions)]
        computed = [operand for operand in operands if operand in trace.programs]
        if (node, 0) not in trace.programs and len(computed) < max(2, len(operands)):
            stack = [operand for operand, _ in computed if operand is not None]
            while stack:
                step = stack.pop()
                if step not in found and step.next_functions:
                    found.add(step)
                    stack += [child for child, _ in step.next_functions if child is not None]
    return found


def _penalties(ops: tuple[Op, ...]) -> list[Op]:
    """Operations on parameters and constants in terms of a loss of which others depend on data."""
    if not ops:
        return []
    depends: set[Op] = set()
    mapped: set[Op] = set()
    for op in ops:
        is_data = not op.operands and op.from_data
        maps = op.from_data and op.name in WEIGHT_SLOTS
        # a matrix of what another one has made of constants is a network's, of noise or of what was detached
        again = any(operand in mapped for operand in op.data)
        if is_data or op.name in LOOKUPS or (maps and again) or any(operand in depends for operand in op.data):
            depends.add(op)
        if maps or again:
            mapped.add(op)
    counted: set[Op] = set()
    users = {operand for op in ops for operand in op.data}
    stack = [op for op in ops if op not in users]
    while stack:
        op = stack.pop()
        if op not in counted:
            counted.add(op)
            is_loss = op.name in ("Add", "Sub") and op.shape == ()
            terms = [operand for operand in op.data if operand in depends] if is_loss else []
            stack.extend(terms or op.data)
    return [op for op in ops if op not in counted]


def _plain_name(node: Node) -> str:
    name = node.name().rsplit("::", 1)[-1]
    return name.partition("Backward")[0] or name


def _takes_data(name: str, operands: tuple[Value | None, ...], values: tuple[Value, ...]) -> bool:
    stack = operands[0]
    # matrices may be taken from a parameter that holds one for each expert
    selects = name in SELECTIONS and stack is not None and not stack[0].from_data and len(stack[0].shape) > 2
    if name in LOOKUPS and not selects:
        return True  # indices are data that need no gradient
    if values:
        return True
    factors = _FACTORS.get(name, (0,) if name in WEIGHT_SLOTS else ())
    return any(operands[slot] is None for slot in factors if slot < len(operands))  # a parameter multiplies a constant


_FACTORS = dict.fromkeys(("Mm", "Bmm", "Mv"), (0, 1)) | dict.fromkeys(("Addmm", "Baddbmm"), (1, 2))
"""Operands between which a matrix operation takes its product, if that is not the first one and a weight."""


def _uses(op: Op) -> Iterator[Use]:
    """Uses of parameters by an operation on data, through operations on parameters alone."""
    weights = WEIGHT_SLOTS.get(op.name, {})
    kinds: dict[int | None, UseKind] = {BIAS_SLOTS.get(op.name): "bias", **dict.fromkeys(weights, "matrix")}
    if op.parameter is not None:
        yield Use(op.parameter, op, "lookup", (), op.shape, op.shape)  # as of one-hot data
    for slot, operand in enumerate(op.operands):
        if operand is None or operand[0].from_data:
            continue
        leaves = list(_leaves(operand[0], ()))
        shape = operand[0].shapes[operand[1]] if operand[1] < len(operand[0].shapes) else operand[0].shape
        kind = kinds.get(slot, USE_KINDS.get(op.name, "other"))
        if op.is_recurrent_layer:
            kind = "matrix" if len(shape) > 1 else "bias"
        for leaf, path in leaves:
            if kind == "add" and math.prod(shape) == 1 < math.prod(leaf.shape):
                kind = "penalty"  # all of a parameter in one number
            inputs_first = weights.get(slot, False)
            yield Use(leaf.parameter or "", op, kind, path, shape, leaf.shape, inputs_first, shared=len(leaves) > 1)


def stream_parameters(ops: tuple[Op, ...]) -> frozenset[str]:
    """Parameters that are data: a class token, latents, learned queries or prompts.

    They go through a norm or a matrix of other parameters before they meet data, and not to be a matrix or a bias there; or
    what they were joined with data to be is added to them.
    """
    found: set[str] = set()
    joined: dict[tuple[str, tuple[object, ...]], list[Op]] = defaultdict(list)  # by the entries that are used
    for op in ops:
        if not op.from_data:
            continue
        for slot, operand in enumerate(op.operands):
            if operand is None or operand[0].from_data:
                continue
            weights = slot in WEIGHT_SLOTS.get(op.name, ()) or slot == BIAS_SLOTS.get(op.name)
            if math.prod(operand[0].shape) == 1:
                continue  # a penalty
            made = list(_made_of(operand[0]))
            inner = {other.name for other in made}
            # an attention between parameters makes what further ones weigh by it
            is_query = op.name in PRODUCTS and all(map(_compares_maps, made))
            if (not weights or is_query) and inner & _MAPS:
                found.update(_inputs(operand[0]))
            elif op.name in ("Add", "Cat") and len(inner - RESHAPES - PARTS) == 1 and len(op.shape) > 1:
                use = next(use for use in _uses(op) if use.parameter in {other.parameter for other in made})
                joined[use.parameter, use.part].append(op)
    for (name, _), uses in joined.items():
        sums = [op for op in uses if op.name == "Add" and name not in found]
        if sums and len(uses) > 1:
            after = descendants(ops[uses[0].index :], uses[:1])
            # positions are added to sums, again in every block
            found.update(name for op in sums if any(o in after and _sum_behind(o).name != "Add" for o in op.data))
    return frozenset(found)


def _sum_behind(op: Op) -> Op:
    while op.name in NORMS or op.is_transparent or op.name == "CopySlices":
        op = op.data[0]
    return op


_MAPS = NORMS | (WEIGHT_SLOTS.keys() - {"GroupedMm"})


def _compares_maps(op: Op) -> bool:
    """Whether an operation on parameters is no product, or one of what matrices or norms make of them."""
    operands = [operand for operand in op.operands if operand is not None]
    return op.name not in PRODUCTS or all(any(o.name in _MAPS for o in _made_of(made)) for made, _ in operands)


def _made_of(op: Op) -> Iterator[Op]:
    yield op
    for operand in op.operands:
        if operand is not None:
            yield from _made_of(operand[0])


def _inputs(op: Op) -> Iterator[str]:
    """Parameters that go into matrices and norms of other parameters."""
    if op.parameter is not None:
        yield op.parameter
    slots = {"Addmm": (1,), "Baddbmm": (1,)} | dict.fromkeys(_MAPS - {"Addmm", "Baddbmm"}, (0,))
    for operand in (op.operands[slot] for slot in slots.get(op.name, range(len(op.operands)))):
        if operand is not None:
            yield from _inputs(operand[0])


def _leaves(op: Op, path: tuple[Op, ...]) -> Iterator[tuple[Op, tuple[Op, ...]]]:
    """Parameters that an operation is made of, and the operations from each of them on."""
    if op.parameter is not None:
        yield op, path
    for operand in op.operands:
        if operand is not None:
            yield from _leaves(operand[0], (op, *path))
