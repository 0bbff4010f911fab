"""Record the dataflow of a forward pass: what every use of a parameter maps or adds, and its constant factors.

Operations are seen where torch dispatches them, so that products, constants and residual additions are the same few
operations in whatever way a module writes them, hooks and functions of weights included. Sizes are kept, values are not:
products with weights are computed for a few rows, which the others repeat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from mlu_lightning.observation.operations import (
    CREATED,
    MATRIX_OPERANDS,
    NORMALIZING,
    OVERWRITING,
    SELECTING,
    VIEWS,
    contraction,
    described,
    end_name,
    of_few_rows,
)
from mlu_lightning.observation.value_graph import (
    MOST_ORIGINS,
    Node,
    additions_within,
    branch_of,
    common_factor,
    depends,
    joins,
    names_in,
    operands,
    since_fork,
    stream_before,
    write_through,
)
from mlu_lightning.utilities.function_calls import tensors_in
from mlu_lightning.utilities.names import name_pattern_of_parts
from mlu_lightning.utilities.state import KeptValues

ADDED = ("addition", "sum")  # where multiplications end at a residual addition, and at a sum of two other values

How = Literal["matrix", "vector", "table"]


@dataclass(frozen=True)
class Use:
    """One use of a parameter, or of a function of parameters, on data."""

    names: tuple[str, ...]
    how: How
    size: float  # root mean square of what is used
    count: int  # entries of what is used
    inputs: int  # products that each output sums over, 1 of what is no matrix
    plain: bool  # whether a parameter itself is used, and not a function of it
    # what input and result are multiplied by, since and until another operation, by the name of the latter
    constants: Mapping[str, float]


@dataclass(frozen=True)
class Addition:
    """A residual addition: to a value, of something that was computed from it."""

    names: frozenset[str]  # parameters of what is added
    stream: float  # root mean square of what is added to
    branch: float  # root mean square of what is added
    constant: float  # by which it is multiplied, since another operation
    normalized: bool  # whether what is added does not depend on the size of what it is added to
    on_stream: bool  # whether it is on the way to an addition of a residual branch that the plan knows

    @property
    def patterns(self) -> frozenset[str]:
        """Names without the numbers in them, the same all along the depth."""
        return frozenset(map(name_pattern_of_parts, self.names))


@dataclass(eq=False)
class _Use:
    names: tuple[str, ...]
    how: How
    size: Tensor
    count: int
    inputs: int
    plain: bool
    source: Node
    begin: float = 1.0
    data: Node | None = None  # what a matrix maps


class Dataflow(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Records the operations of a pass; ``tables`` name parameters that are data themselves, as embeddings."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would go through its compiler for each operation, to say that there is nothing to compile

    def __init__(self, parameters: Mapping[str, Tensor], tables: Iterable[str], data: Any, kept: KeptValues) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._nodes: Any = WeakTensorKeyDictionary()
        self._kept = kept
        self._count = 0
        self._uses: list[_Use] = []
        self._additions: list[tuple[Node, Tensor, Tensor, float]] = []
        self._sizes: dict[tuple[object, ...], Tensor] = {}  # of weights, by where they are
        for leaf in tree_leaves(data):
            if isinstance(leaf, Tensor):
                self._nodes[leaf] = self._source("data", ())
        of_tables = frozenset(tables)
        for name, parameter in parameters.items():
            node = self._new("parameter", weights=frozenset({name}), plain=True)
            if name in of_tables:
                node.data, node.origins = True, ((node, 1.0),)
                self._use(node, "table", parameter, node)
            self._nodes[parameter] = node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, (name, is_mutable) = kwargs or {}, described(func)
        if is_mutable:
            self._kept.keep(func, args, given)
        changed = args[0] if is_mutable and args and isinstance(args[0], Tensor) else None
        updates = changed is not None and self._node(changed).op == "parameter"  # as of a teacher, after its use
        if updates or torch._C._current_autograd_node() is not None:  # or gradients that a step asks for
            return func(*args, **given)
        node = self._result(name, args, given)  # before operands are changed in place
        few = name in ("mm", "addmm") and self._is_weights(args[MATRIX_OPERANDS[name][1]])
        result = of_few_rows(func, name, args, given) if few else func(*args, **given)
        for leaf in tensors_in(result):
            if is_mutable and leaf in self._nodes:
                write_through(self._nodes[leaf], node)
            self._nodes[leaf] = node
        return result

    def finish(self, result: Any) -> None:
        """Note what the pass returned, and whose the constants are that are before a matrix and on a stream as well."""
        for use in self._uses:
            ends = [source.ends for source, _ in (use.data.origins if use.data is not None else ())]
            if ends and use.begin != 1 and all(use.begin in found.get("addition", ()) for found in ends):
                for found in ends:  # they are what made the stream's, which branches read
                    found["matrix"][found["matrix"].index(1.0)] = use.begin
                use.begin = 1.0
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf in self._nodes:
                self._end(self._nodes[leaf], "returned")

    def size(self, weights: Tensor) -> Tensor:
        """Root mean square of a parameter, or a part of it."""
        key = weights.data_ptr(), weights.numel(), weights.dtype
        if key not in self._sizes:
            self._sizes[key] = root_mean_square(weights)
        return self._sizes[key]

    @property
    def uses(self) -> tuple[Use, ...]:
        """Uses of parameters whose results were used, in order."""
        return tuple(
            Use(
                use.names,
                use.how,
                use.size.item(),
                use.count,
                use.inputs,
                use.plain,
                {name: use.begin * _mean_size(factors) for name, factors in use.source.ends.items()},
            )
            for use in self._uses
            if use.source.ends
        )

    def additions(self, in_branch: Callable[[str], bool], writes: Callable[[str], bool]) -> tuple[Addition, ...]:
        """Residual additions in order, but for those of a stream to its own beginning."""
        found = [addition for addition in self._additions if not joins(addition[0])]
        names = {node: frozenset(names_in(node)) for node, *_ in found}
        writing = {node for node, of_branch in names.items() if any(map(writes, of_branch))}
        on_stream, within = set[Node](), set[Node]()
        for node, of_branch in reversed(names.items()):
            if node not in within and any(map(in_branch, of_branch)):
                inner = [other for other in additions_within(node) if other in names]
                if writing.isdisjoint(inner):  # such as the steps of a recurrent unit
                    within.update(inner)
                if node not in on_stream:
                    on_stream.update(stream_before(node))
        return tuple(
            Addition(
                names[node],
                stream.item(),
                branch.item(),
                _mean_size([factor for _, factor in operands(node)[1].origins]) / along,
                any(each.op in NORMALIZING for each in branch_of(node)),
                node in on_stream,
            )
            for node, stream, branch, along in found
        )

    def _result(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        tensors = [*tensors_in(args), *tensors_in(kwargs)]
        nodes = [self._node(tensor) for tensor in tensors]
        if name in CREATED or not nodes:
            return self._new(name)
        if name in OVERWRITING:
            return nodes[1] if len(nodes) > 1 else self._new(name)
        if name in SELECTING and nodes[0].data:
            return self._multiple(name, nodes[:1], viewed=None)
        if name in MATRIX_OPERANDS and (found := self._matrix(name, args, kwargs)) is not None:
            return found
        if name in SELECTING or not any(node.data and not node.weights for node in nodes):
            return self._function(name, nodes[:1] if name in SELECTING else nodes)
        pairs = list(zip(tensors, nodes, strict=True))
        if name in VIEWS:
            return self._multiple(name, [node for node in nodes if node.data], viewed=nodes[0])
        if name in ("add", "sub", "rsub") and isinstance(args[0], Tensor):
            return self._sum(pairs, abs(kwargs.get("alpha", 1)))
        if name in ("mul", "div") and (found := self._product(name, args, pairs)) is not None:
            return found
        return self._other(name, pairs)

    # nodes

    def _node(self, tensor: Tensor) -> Node:
        found: Node | None = self._nodes.get(tensor)
        if found is None:
            found = self._nodes[tensor] = self._new("constant")
        return found

    def _new(self, op: str, **fields: Any) -> Node:
        self._count += 1
        return Node(self._count, op, **fields)

    def _source(self, op: str, parents: Iterable[Node], used: Iterable[str] = ()) -> Node:
        node = self._new(op, data=True, parents=tuple(parents), used=tuple(used))
        node.origins = ((node, 1.0),)
        return node

    def _multiple(self, op: str, parents: Sequence[Node], factor: float = 1.0, viewed: Node | None = None) -> Node:
        """A multiple of one value, or parts of several."""
        origins = dict.fromkeys((source, by * factor) for parent in parents for source, by in parent.origins)
        if len(origins) > MOST_ORIGINS:
            for parent in parents:
                self._end(parent, end_name(op))
            return self._source(op, parents)
        node = self._new(op, data=True, parents=tuple(parents), multiple=len(parents) == 1, viewed=viewed)
        node.origins = tuple(origins)
        return node

    def _use(self, weights: Node, how: How, values: Tensor, source: Node, inputs: int = 1, **of_data: Any) -> None:
        names, size = tuple(sorted(weights.weights)), self.size(values) if weights.plain else root_mean_square(values)
        self._uses.append(_Use(names, how, size, values.numel(), inputs, weights.plain, source=source, **of_data))

    def _end(self, node: Node, name: str, over: float = 1.0) -> None:
        for source, factor in node.origins:
            source.ends.setdefault(name, []).append(factor / over)

    # operations

    def _function(self, name: str, nodes: Sequence[Node]) -> Node:
        weights = frozenset[str]().union(*(node.weights for node in nodes))
        data = [node for node in nodes if node.data]
        view = name in VIEWS and len(nodes) == 1
        if data and view:
            node = self._multiple(name, data)
        elif data:
            for parent in data:
                self._end(parent, end_name(name))
            node = self._source(name, data)
        else:
            node = self._new(name)
        node.weights, node.plain, node.viewed = weights, view and nodes[0].plain, nodes[0] if view else None
        return node

    def _matrix(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node | None:
        first, second, third = MATRIX_OPERANDS[name]
        operands = [args[first], args[second]]
        nodes = [self._node(operand) for operand in operands]
        weight = next((i for i in (1, 0) if nodes[i].weights and not nodes[i].data and nodes[1 - i].data), None)
        if weight is None:  # a table that is a matrix
            weight = next((i for i in (1, 0) if nodes[i].weights and nodes[i].data and not nodes[1 - i].weights), None)
        if weight is None:
            return None
        data, weights = nodes[1 - weight], nodes[weight]
        begin = common_factor(data)
        for source, _ in data.origins:  # the constants in between count here, and not twice
            source.ends.setdefault("matrix", []).append(1.0)
        node = self._source(name, [data] if data.data else [], weights.weights)
        inputs = contraction(name, args, operands[0], operands[weight])
        begin *= abs(kwargs.get("alpha", 1))
        self._use(weights, "matrix", operands[weight], node, inputs, begin=begin, data=data)
        added = args[third] if third is not None and third < len(args) else None
        if isinstance(added, Tensor):
            of_added = self._node(added)
            if of_added.data:
                self._end(of_added, "sum")
                node.parents += (of_added,)
            elif of_added.weights:
                self._use(of_added, "vector", added, node)
                node.used += tuple(of_added.weights)
        return node

    def _sum(self, pairs: list[tuple[Tensor, Node]], alpha: float) -> Node:
        data = [(tensor, node) for tensor, node in pairs if node.data]
        if len(data) == 1:
            node = self._multiple("add", [data[0][1]])
            for values, weights in pairs:
                if weights.weights and not weights.data:
                    source = self._source("add", ())
                    self._use(weights, "vector", values, source)
                    node.origins += ((source, alpha if values is pairs[1][0] else 1.0),)
                    node.used += tuple(weights.weights)
            return node
        older, newer = sorted(data, key=lambda pair: pair[1].root.index)
        parents = [node for _, node in data]
        if older[0].numel() == newer[0].numel() and depends(newer[1], older[1].root):
            along = since_fork(older[1], newer[1])  # at an addition, the size of the branch next to its stream counts
            over = {parent: along / (alpha if parent is pairs[1][1] else 1.0) for parent in parents}
            for parent in parents:
                self._end(parent, "addition", over[parent])
            node = self._source("addition", parents)
            node.residual = older[1], newer[1]
            stream, branch = (root_mean_square(values) / over[parent] for values, parent in (older, newer))
            self._additions.append((node, stream, branch, over[newer[1]]))
            return node
        for parent in parents:
            self._end(parent, "sum")
        return self._multiple("sum", parents)

    def _product(self, name: str, args: tuple[Any, ...], pairs: list[tuple[Tensor, Node]]) -> Node | None:
        """A multiple of data, by a number, a constant or weights; None of anything else."""
        data = [node for _, node in pairs if node.data]
        if len(data) != 1 or (name == "div" and self._node_of(args[0]) is not data[0]):
            return None
        (other,) = [arg for arg in args[:2] if self._node_of(arg) is not data[0]]
        factor = _factor(other, name)
        if not 0 < factor < math.inf:
            return None
        weights = self._node_of(other)
        if weights is None or not weights.weights:
            return self._multiple(name, data, factor)
        node = self._source(name, data, weights.weights)
        self._use(weights, "vector", other, node)
        node.origins += tuple((source, by * factor) for source, by in data[0].origins)[: MOST_ORIGINS - 1]
        return node

    def _is_weights(self, operand: Tensor) -> bool:
        node = self._node(operand)
        return bool(node.weights) and not node.data

    def _node_of(self, operand: Any) -> Node | None:
        return self._node(operand) if isinstance(operand, Tensor) else None

    def _other(self, name: str, pairs: list[tuple[Tensor, Node]]) -> Node:
        data = [node for _, node in pairs if node.data]
        for parent in data:
            self._end(parent, end_name(name))
        node = self._source(name, data)
        for values, weights in pairs:
            if weights.weights and not weights.data:
                self._use(weights, "vector", values, node)
                node.used += tuple(weights.weights)
        return node


def root_mean_square(values: Tensor) -> Tensor:
    """Root mean square of a tensor's entries, in float32 at least."""
    values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    size: Tensor = torch.linalg.vector_norm(values) / math.sqrt(max(1, values.numel()))
    return size


def _mean_size(factors: Sequence[float]) -> float:
    return math.sqrt(sum(factor**2 for factor in factors) / len(factors))


def _factor(operand: Any, name: str) -> float:
    if isinstance(operand, Tensor):
        return root_mean_square(operand if name == "mul" else 1 / operand).item()
    value = abs(operand)
    return float(value if name == "mul" else 1 / value if value else math.inf)
