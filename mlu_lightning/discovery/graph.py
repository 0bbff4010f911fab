"""The autograd graph of a rehearsal as plain values: operations in order, and every use of a parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch.autograd.graph import Node

from mlu_lightning.discovery.trace import Rehearsal

__all__ = ["Graph", "Op", "Use", "build_graph", "full_factors", "is_normalizer", "transparent_source"]

RESHAPES = frozenset(
    "View UnsafeView ReshapeAlias T Transpose Permute Expand Clone Alias ToCopy Squeeze Unsqueeze AsStrided "
    "ViewAsComplex ViewAsReal NativeDropout FusedDropout".split()
)
"""Operations that keep every entry (dropout: on average) and only arrange them."""
PARTS = frozenset("Slice Select Split SplitWithSizes Unbind".split())
"""Operations that take a part of a tensor."""
JOINS = frozenset(
    "Cat Stack Sum Mean IndexAdd ScatterAdd Scatter IndexPut IndexCopy Copy CopySlices Where MaskedFill Index "
    "IndexSelect Gather ConstantPadND AvgPool2D MkldnnAdaptiveAvgPool2D AdaptiveAvgPool2D UpsampleNearest2D "
    "UpsampleBilinear2D Roll Flip Neg".split()
)
"""Further linear operations, which arrange, sum or mask."""
ARITHMETIC = frozenset("Add Sub Rsub Mul Div".split())
NONLINEAR = frozenset(
    "Relu Gelu Silu Tanh Sigmoid Softmax SafeSoftmax LogSoftmax Softplus Elu Celu Selu LeakyRelu Hardtanh Hardswish "
    "Hardsigmoid Mish Erf Exp Expm1 Log Log1P Pow Rsqrt Sqrt Clamp ClampMin ClampMax Abs Sin Cos Threshold Glu "
    "LogSigmoid Maximum Minimum Max Amax Topk Sort Reciprocal Prelu Softsign Atan Sinh Cosh Square "
    "NllLoss NllLossNd NllLoss2D MseLoss SmoothL1Loss HuberLoss BinaryCrossEntropy BinaryCrossEntropyWithLogits".split()
)
NORMS = frozenset(
    "NativeLayerNorm FusedRmsNorm RmsNorm NativeGroupNorm NativeBatchNorm CudnnBatchNorm MiopenBatchNorm "
    "BatchNorm NativeBatchNormLegit".split()
)
LOOKUPS = frozenset("Embedding EmbeddingBag Index IndexSelect Gather".split())
_SELECTS = frozenset({"Index", "IndexSelect"})
_PICKS = _SELECTS | {"Select", "Unbind"}
ATTENTION = "ScaledDotProduct"
CONVOLUTIONS = frozenset({"Convolution", "MkldnnConvolution", "ConvDepthwise2D", "ThnnConv2D"})
_WEIGHT_SLOTS: dict[str, dict[int, bool]] = {
    # operation: {operand: whether inputs come first in it}
    "Mm": {0: False, 1: True},
    "Bmm": {0: False, 1: True},
    "Addmm": {1: False, 2: True},
    "Baddbmm": {1: False, 2: True},
    "Mv": {0: False},
    "Linear": {1: False},
    "GroupedMm": {1: True},
} | {name: {1: False} for name in CONVOLUTIONS}
_BIAS_SLOTS = {"Addmm": 0, "Baddbmm": 0, "Linear": 2} | dict.fromkeys(CONVOLUTIONS, 2)
_TRANSPOSES = frozenset({"T", "Transpose", "Permute"})


@dataclass(frozen=True, eq=False, repr=False)
class Op:
    """One operation of the forward pass.

    Args:
        index: place in a topological order, operands first.
        name: what autograd calls it, without ``Backward`` and number.
        shapes: of its outputs.
        operands: (operation, output of it) or None for a constant, in autograd's order.
        from_data: whether data enters it, or only parameters and constants do.
        parameter: name of the parameter, if it is one.
        node: autograd's node.
    """

    index: int
    name: str
    shapes: tuple[tuple[int, ...], ...]
    operands: tuple[tuple[Op, int] | None, ...]
    from_data: bool
    parameter: str | None
    node: Node

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first output."""
        return self.shapes[0]

    @property
    def data(self) -> list[Op]:
        """Operands that data enters."""
        return [operand[0] for operand in self.operands if operand is not None and operand[0].from_data]


@dataclass(frozen=True)
class Use:
    """One use of a parameter by an operation on data.

    Args:
        parameter: its name.
        op: the operation.
        kind: ``"matrix"``, ``"bias"`` (of a matrix), ``"lookup"``, ``"norm"``, ``"add"``, ``"mul"``, or ``"other"``.
        path: operations on parameters alone between the two, from the parameter on.
        shape: of the operand that the parameter has become.
        stored: shape of the parameter.
        inputs_first: for matrices, whether the operand is [inputs, outputs].
        shared: whether other parameters make up the operand too.
    """

    parameter: str
    op: Op
    kind: str
    path: tuple[Op, ...]
    shape: tuple[int, ...]
    stored: tuple[int, ...]
    inputs_first: bool = False
    shared: bool = False

    @property
    def homogeneous(self) -> bool:
        """Whether multiplying the parameter multiplies the operand."""
        return not self.shared and all(step.name in RESHAPES | PARTS | _SELECTS | {"Neg"} for step in self.path)

    @property
    def taken(self) -> tuple[int, ...]:
        """Shape of what is taken of the parameter in one use, before it is arranged to meet data."""
        return self.shape if any(step.name in _PICKS for step in self.path) else self.stored

    @property
    def is_section(self) -> bool:
        """Whether it is one of several parts, side by side, of the parameter, such as the queries' part of in_proj."""
        return len(self.shape) == len(self.stored) and any(
            step.name in ("Slice", "Split", "SplitWithSizes") for step in self.path
        )

    @property
    def stored_inputs_first(self) -> bool:
        """Whether the parameter itself is stored [inputs, outputs]."""
        turns = sum(step.name in _TRANSPOSES for step in self.path)
        return self.inputs_first == (turns % 2 == 0)


@dataclass(frozen=True)
class Graph:
    """All operations of a rehearsal.

    Args:
        ops: in topological order, operands first.
        uses: uses of parameters by operation index.
        by_node: operation of an autograd node.
        roots: what the forward pass returned.
    """

    ops: tuple[Op, ...]
    uses: dict[int, tuple[Use, ...]]
    by_node: dict[Node, Op]
    roots: tuple[Op, ...]

    def matrices(self, op: Op) -> tuple[Use, ...]:
        """Uses of parameters as a matrix by an operation."""
        return tuple(use for use in self.uses.get(op.index, ()) if use.kind == "matrix")

    def is_matrix(self, op: Op) -> bool:
        """Whether an operation multiplies data with a parameter matrix."""
        return bool(self.matrices(op))


def build_graph(rehearsal: Rehearsal) -> Graph:
    """Turn autograd's nodes into operations.

    Args:
        rehearsal: a forward pass.
    """
    by_node: dict[Node, Op] = {}
    for node in _topological(rehearsal.roots):
        operands = tuple(None if child is None else (by_node[child], i) for child, i in node.next_functions)
        name = _plain_name(node)
        leaf = getattr(node, "variable", None) if not operands else None
        parameter = rehearsal.parameters.get(id(leaf)) if leaf is not None else None
        by_node[node] = Op(
            index=len(by_node),
            name=name,
            shapes=tuple(tuple(meta.shape) for meta in node._input_metadata),
            operands=operands,
            from_data=_takes_data(name, operands) if operands else parameter is None,
            parameter=parameter,
            node=node,
        )
    ops = tuple(by_node.values())
    uses = {op.index: tuple(_uses(op)) for op in ops if op.from_data}
    return Graph(
        ops, {i: found for i, found in uses.items() if found}, by_node, tuple(by_node[n] for n in rehearsal.roots)
    )


def transparent_source(op: Op) -> Op:
    """Walk back over operations that only arrange, scale by constants, drop out or cast.

    Args:
        op: where to start.
    """
    while True:
        if op.data and (op.name in RESHAPES or (op.name in ARITHMETIC | {"Neg"} and _single(op))):
            op = op.data[0]
        else:
            return op


def full_factors(op: Op) -> list[Op]:
    """Data that an operation multiplies, without factors that one number stands for many entries of, such as weights.

    Args:
        op: a product.
    """
    size = math.prod(op.shape)
    return [operand for operand in op.data if 2 * math.prod(operand.shape) > size] or op.data


def is_normalizer(op: Op) -> bool:
    """Whether an operation divides data by a size of that data: a norm, whole or its last step written by hand."""
    if op.name in NORMS:
        return True
    if op.name not in ("Mul", "Div") or len(op.data) != 2:
        return False
    sizes = ("Rsqrt", "Sqrt", "Reciprocal", "LinalgVectorNorm", "Norm", "Std", "ClampMin", "Clamp", "Pow")
    sources = ((transparent_source(operand), operand) for operand in op.data)
    return any(source.name in sizes and (1,) in (source.shape[-1:], operand.shape[-1:]) for source, operand in sources)


def _single(op: Op) -> bool:
    """Whether data is the only thing but constants that enters an operation."""
    return len(op.data) == 1 and sum(operand is not None for operand in op.operands) == 1


def _topological(roots: tuple[Node, ...]) -> Iterator[Node]:
    """Nodes below the roots, operands before the operations that use them."""
    done: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(root, False) for root in reversed(roots)]
    while stack:
        node, expanded = stack.pop()
        if node in done:
            continue
        if expanded:
            done.add(node)
            yield node
        else:
            stack.append((node, True))
            stack.extend((child, False) for child, _ in node.next_functions if child is not None and child not in done)


def _plain_name(node: Node) -> str:
    name = node.name().rsplit("::", 1)[-1]
    return name.split("Backward")[0] if "Backward" in name and not name.startswith("Backward") else name


def _takes_data(name: str, operands: tuple[tuple[Op, int] | None, ...]) -> bool:
    if name in LOOKUPS and not _selects_matrices(name, operands):
        return True  # indices are data that need no gradient
    if any(operand is not None and operand[0].from_data for operand in operands):
        return True
    factors = [operands[slot] for slot in _data_slots(name) if slot < len(operands)]
    return any(factor is None for factor in factors)  # so is a constant that a parameter matrix multiplies


def _selects_matrices(name: str, operands: tuple[tuple[Op, int] | None, ...]) -> bool:
    """Whether a lookup takes matrices from a parameter that holds one for each expert."""
    stack = operands[0] if operands else None
    return name in _SELECTS and stack is not None and not stack[0].from_data and len(stack[0].shape) > 2


def _data_slots(name: str) -> tuple[int, ...]:
    """Operands between which a matrix operation takes its product."""
    if name in ("Mm", "Bmm", "Mv"):
        return (0, 1)
    if name in ("Addmm", "Baddbmm"):
        return (1, 2)
    return (0,) if name in _WEIGHT_SLOTS else ()


def _uses(op: Op) -> Iterator[Use]:
    """Uses of parameters by an operation on data, through operations on parameters alone."""
    for slot, operand in enumerate(op.operands):
        if operand is None or operand[0].from_data:
            continue
        leaves = list(_leaves(operand[0], ()))
        shape = operand[0].shapes[operand[1]] if operand[1] < len(operand[0].shapes) else operand[0].shape
        inputs_first = _WEIGHT_SLOTS.get(op.name, {}).get(slot)
        for leaf, path in leaves:
            name = leaf.parameter or ""
            kind = _use_kind(op, slot)
            yield Use(name, op, kind, path, shape, leaf.shape, bool(inputs_first), shared=len(leaves) > 1)


def _leaves(op: Op, path: tuple[Op, ...]) -> Iterator[tuple[Op, tuple[Op, ...]]]:
    """Parameters that an operation is made of, and the operations from each of them on."""
    if op.parameter is not None:
        yield op, path
    for operand in op.operands:
        if operand is not None:
            yield from _leaves(operand[0], (op, *path))


def _use_kind(op: Op, slot: int) -> str:
    if slot in _WEIGHT_SLOTS.get(op.name, {}):
        return "matrix"
    if _BIAS_SLOTS.get(op.name) == slot:
        return "bias"
    if op.name in LOOKUPS:
        return "lookup"
    if op.name in NORMS:
        return "norm"
    if op.name in ("Mul", "Div", "Prelu"):
        return "mul"
    if op.name in ("Add", "Sub", "Rsub", "Cat", "Where"):
        return "add"
    return "other"
