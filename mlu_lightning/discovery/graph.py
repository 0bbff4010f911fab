"""The graph of a forward pass as plain values: operations by autograd's names, and uses of parameters."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, permutations
from typing import Literal

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import Node

from mlu_lightning.discovery.structure import WeightFunction
from mlu_lightning.discovery.trace import TracedTensor

RESHAPES = frozenset(
    "View UnsafeView ReshapeAlias T Transpose Permute Expand Clone Alias Copy ToCopy Squeeze Unsqueeze AsStrided "
    "ViewAsComplex ViewAsReal NativeDropout FusedDropout".split()
)
"""Operations that keep every entry (dropout: on average) and only arrange them."""
PERMUTATIONS = frozenset({"T", "Transpose", "Permute"})
VIEWS = frozenset({"View", "UnsafeView", "ReshapeAlias"})
PARTS = frozenset("Slice Select Split SplitWithSizes Unbind".split())  # operations that take a part of a tensor
JOINS = frozenset(
    "Cat Stack Sum Mean IndexAdd ScatterAdd Scatter IndexPut IndexCopy CopySlices Where MaskedFill Index "
    "IndexSelect Gather ConstantPadNd AvgPool2D AvgPool3D MkldnnAdaptiveAvgPool2D AdaptiveAvgPool2D AdaptiveAvgPool3D "
    "UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleNearestExact1D UpsampleNearestExact2D "
    "UpsampleNearestExact3D UpsampleLinear1D UpsampleBilinear2D UpsampleTrilinear3D UpsampleBicubic2D ReflectionPad1D "
    "ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D PixelShuffle PixelUnshuffle "
    "ChannelShuffle Im2Col Col2Im Unfold Repeat Roll Flip Rot90 Tril Triu Neg FftR2C FftC2C FftC2R".split()
)
"""Further linear operations, which arrange, sum or mask."""
ARITHMETIC = frozenset("Add Sub Rsub Mul Div".split())
LINEAR = RESHAPES | PARTS | JOINS | ARITHMETIC
"""Operations that are linear in each operand, but for matrix products and convolutions."""
NONLINEAR = frozenset(
    "Relu Gelu Silu Tanh Sigmoid Softmax SafeSoftmax LogSoftmax Softplus Elu Celu Selu LeakyRelu Hardtanh Hardswish "
    "Hardsigmoid Mish Erf Exp Expm1 Log Log1P Pow Rsqrt Sqrt Clamp ClampMin ClampMax Abs Sin Cos Threshold Glu "
    "LogSigmoid Maximum Minimum Max Amax Topk Sort Reciprocal Prelu PreluKernel RreluWithNoise Softsign Atan Sinh Cosh "
    "Square Hardshrink Softshrink Exp2 Log2 Log10 Asinh Acosh Atanh Tan Logit Erfc Logsumexp Logaddexp Logcumsumexp Fmax "
    "Fmin Median Prod Cummax Xlogy Sinc Atan2 Hypot "
    "NllLoss NllLossNd NllLoss2D MseLoss SmoothL1Loss HuberLoss BinaryCrossEntropy BinaryCrossEntropyWithLogits".split()
)
POOLS = frozenset({"Max", "Amax"})
"""Nonlinear operations that a shortcut may have, too, where a stage takes the largest of several tokens."""
NORMS = frozenset(
    "NativeLayerNorm FusedRmsNorm RmsNorm NativeGroupNorm NativeBatchNorm CudnnBatchNorm MiopenBatchNorm "
    "BatchNorm NativeBatchNormLegit".split()
)
CHANNEL_NORMS = NORMS - {"NativeLayerNorm", "FusedRmsNorm", "RmsNorm"}
"""Those of which a parameter is for channels, the second axis."""
SIZES = frozenset("Rsqrt Sqrt Reciprocal LinalgVectorNorm Norm Std ClampMin Clamp Pow".split())
"""Last operations of the size of data, by which a norm that is written by hand divides."""
SELECTIONS = frozenset({"Index", "IndexSelect"})
LOOKUPS = frozenset("Embedding EmbeddingBag Index IndexSelect Gather".split())
ATTENTION = "ScaledDotProduct"  # how the names of fused attentions begin
PRODUCTS = frozenset({"Bmm", "Baddbmm"})
CONVOLUTIONS = frozenset({"Convolution", "MkldnnConvolution", "ConvDepthwise2D", "ThnnConv2D"})
WEIGHT_SLOTS: dict[str, dict[int, bool]] = {
    **{name: {0: False, 1: True} for name in ("Mm", "Bmm")},
    **{name: {1: False, 2: True} for name in ("Addmm", "Baddbmm")},
    **{name: {1: False} for name in ("Linear", *CONVOLUTIONS)},
    "Mv": {0: False},
    "GroupedMm": {1: True},
}
"""Operands of an operation that can be a matrix of parameters, each with whether it is [inputs, outputs] there."""
BIAS_SLOTS = {"Addmm": 0, "Baddbmm": 0, "Linear": 2} | dict.fromkeys(CONVOLUTIONS, 2)
"""Operand of an operation that is the bias of its matrix."""


@dataclass(frozen=True, eq=False, repr=False)
class Op:
    """One operation of the forward pass."""

    index: int  # place in a topological order, operands first
    name: str  # what autograd calls it, without ``Backward`` and number
    shapes: tuple[tuple[int, ...], ...]  # of its outputs
    operands: tuple[Value | None, ...]  # in autograd's order, None for constants
    values: tuple[Value, ...]  # those of the operands that data enters
    data: tuple[Op, ...]  # their operations
    from_data: bool  # whether data enters it, or only parameters and constants do
    parameter: str | None  # its name, if it is a parameter
    node: Node

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first output."""
        return self.shapes[0]

    @cached_property
    def source(self) -> Op:
        """What it is made of by operations that only arrange, compute with constants, drop out or cast."""
        op = self
        while op.is_transparent:
            op = op.data[0]
        return op

    @cached_property
    def is_recurrent_layer(self) -> bool:
        """Whether it is a whole recurrent layer, whose matrices are those of the input and of the state in turn."""
        return any(part in self.name for part in ("Rnn", "Lstm", "Gru"))

    @property
    def is_transparent(self) -> bool:
        """Whether it only arranges data, or computes them with constants."""
        if not self.data:
            return False
        alone = len(self.data) == 1 and sum(operand is not None for operand in self.operands) == 1
        return self.name in RESHAPES or (alone and (self.name in ARITHMETIC or self.name == "Neg"))

    @property
    def is_normalizer(self) -> bool:
        """Whether it divides data by a size of that data: a norm, whole or its last step written by hand."""
        if self.name not in ("Mul", "Div") or len(self.data) != 2:
            return self.name in NORMS
        return any(
            size.source.name in SIZES
            and ((1,) in (size.source.shape[-1:], self.shape[-1:]) or self._is_size(size.source, normed.source))
            for size, normed in permutations(self.data)
        )

    def _is_size(self, size: Op, normed: Op) -> bool:
        """Whether one operand is computed from the other alone, with fewer entries, as a norm over channels is."""
        op = size
        while op is not normed and len({*op.data}) == 1:
            op = op.data[0]
        return op is normed and math.prod(size.shape) < math.prod(self.shape)

    def saved(self, name: str) -> object:
        """What autograd keeps of it by that name; None if it keeps nothing, or that was changed in place since."""
        try:
            return getattr(self.node, f"_saved_{name}", None)
        except RuntimeError:
            return None

    @property
    def full_factors(self) -> tuple[Op, ...]:
        """Data that it multiplies, without factors of which one number stands for many entries, such as weights."""
        size = math.prod(self.shape)
        return tuple(op for op in self.data if 2 * math.prod(op.shape) > size) or self.data


Value = tuple[Op, int]  # an operation and the number of its output
UseKind = Literal["matrix", "bias", "gain", "lookup", "norm", "add", "mul", "penalty", "other"]
"""What a parameter is to an operation; ``"bias"`` is that of a matrix in one operation, ``"gain"`` multiplies a matrix, and
``"penalty"`` is a term of the loss."""
USE_KINDS: dict[str, UseKind] = {
    **dict.fromkeys(("Add", "Sub", "Rsub", "Cat", "Where"), "add"),
    **dict.fromkeys(("Mul", "Div", "Prelu", "PreluKernel"), "mul"),
    **dict.fromkeys(NORMS, "norm"),
    **dict.fromkeys(LOOKUPS, "lookup"),
}


TAKEN = ("dim", "index", "start", "end")  # what autograd keeps of an operation that takes a part of a tensor


JOINED = frozenset({"Cat", "Stack"})  # operations whose result holds what several parameters are


def _keeps_entries(op: Op) -> bool:
    """Whether an operation only arranges or selects entries, or multiplies them by a number."""
    if op.name in RESHAPES | PARTS | SELECTIONS | {"Neg"}:
        return True
    if op.name not in ("Mul", "Div") or sum(operand is not None for operand in op.operands) != 1:
        return False
    others = map(op.saved, ("self", "other"))
    return all(other.numel() == 1 for other in others if isinstance(other, Tensor))


@dataclass(frozen=True)
class Use:
    """One use of a parameter by an operation on data."""

    parameter: str
    op: Op
    kind: UseKind
    path: tuple[Op, ...]  # operations on parameters alone between the two, from the parameter on
    shape: tuple[int, ...]  # of the operand that the parameter has become
    stored: tuple[int, ...]  # shape of the parameter itself
    inputs_first: bool = False  # whether the operand, a matrix, is [inputs, outputs]
    shared: bool = False  # whether other parameters make up the operand too
    function: WeightFunction | None = None  # that a matrix is of parameters

    @property
    def is_computed(self) -> bool:
        """Whether it is a matrix that is computed from parameters, not only arranged or multiplied by a number."""
        return self.kind == "matrix" and not all(step.name in JOINED or _keeps_entries(step) for step in self.path)

    @property
    def is_carried(self) -> bool:
        """Whether a gain is what multiplies the operand."""
        return self.kind == "matrix" and self.function is not None and self.function.gain is not None

    @property
    def homogeneous(self) -> bool:
        """Whether multiplying the parameter multiplies the operand."""
        if self.function is not None:
            return self.kind == "gain" or (self.function.degree == 1 and not self.is_carried)
        return not self.shared and all(map(_keeps_entries, self.path))

    @property
    def selected(self) -> tuple[int, ...]:
        """Shape of what one use selects of the parameter, before it is arranged to meet data."""
        picked = any(step.name in SELECTIONS | {"Select", "Unbind"} for step in self.path)
        return self.shape if picked else self.stored

    @property
    def part(self) -> tuple[object, ...]:
        """Which entries of the parameter it takes, as far as is known: the same for uses of the same entries."""
        taken: list[object] = []
        for step, user in pairwise((*self.path, self.op)):
            if step.name in PARTS:
                output = next(number for op, number in filter(None, user.operands) if op is step)
                taken += [step.name, output, *map(step.saved, TAKEN)]
        indices = self.op.saved("indices") if self.kind == "lookup" else None
        if isinstance(indices, Tensor) and indices.numel() == 1:
            known = indices.constant if isinstance(indices, FakeTensor) else indices
            taken.append(None if known is None else known.item())
        return tuple(taken)

    @property
    def is_vector(self) -> bool:
        """Whether the operand has several entries along one axis at most, of its own and not for each of many samples."""
        shapes = (self.shape, self.stored, *(step.shape for step in self.path))
        own = min(shapes, key=math.prod)
        return math.prod(own) <= max(own, default=1)

    @property
    def is_section(self) -> bool:
        """Whether it is one of several sections of the parameter, such as the queries' rows of in_proj_weight."""
        cut = any(step.name in ("Slice", "Split", "SplitWithSizes") for step in self.path)
        return cut and len(self.shape) == len(self.stored)

    @property
    def stored_inputs_first(self) -> bool:
        """Whether the parameter itself is stored [inputs, outputs]."""
        turns = sum(step.name in PERMUTATIONS for step in self.path)
        return self.inputs_first == (turns % 2 == 0)

    @property
    def axes(self) -> tuple[int, int]:
        """Axes of outputs and inputs of a matrix."""
        if self.op.name in CONVOLUTIONS:
            return (1, 0) if getattr(self.op.node, "_saved_transposed", False) else (0, 1)
        return (-1, -2) if self.inputs_first else (-2, -1)

    @property
    def fans(self) -> tuple[int, int]:
        """Inputs and outputs; vectors and tables that are looked up have one input."""
        if self.kind == "lookup":
            return 1, self.shape[-1]
        if self.kind != "matrix":
            # a table of positions that is added whole is [positions, D]
            return 1, self.shape[-1] if sum(size > 1 for size in self.shape) > 1 else math.prod(self.shape)
        if self.op.name in CONVOLUTIONS:
            first, second = self.shape[:2]
            if getattr(self.op.node, "_saved_transposed", False):
                groups: int = getattr(self.op.node, "_saved_groups", 1)
                return first // groups, second * groups
            return second, first
        first, second = self.shape[-2:] if len(self.shape) > 1 else (1, self.shape[-1])
        inputs, outputs = (first, second) if self.inputs_first else (second, first)
        return inputs, math.prod(self.stored) // inputs if self.is_section else outputs


@dataclass(frozen=True)
class Graph:
    """All operations of a forward pass."""

    ops: tuple[Op, ...]  # in topological order, operands first
    uses: dict[Op, tuple[Use, ...]]  # by the operation on data; a stream that begins as a parameter is one itself
    by_node: dict[Node, Op]
    roots: tuple[Op, ...]  # what the forward pass returned

    def matrices(self, op: Op) -> tuple[Use, ...]:
        """Uses of parameters as a matrix by an operation."""
        return tuple(use for use in self.uses.get(op, ()) if use.kind == "matrix")

    def kinds(self, op: Op) -> set[UseKind]:
        """What parameters are to an operation."""
        return {use.kind for use in self.uses.get(op, ())}

    def is_matrix(self, op: Op) -> bool:
        """Whether an operation multiplies data with a parameter matrix."""
        return op in self._with_matrix

    @cached_property
    def _with_matrix(self) -> frozenset[Op]:
        return frozenset(op for op in self.uses if "matrix" in self.kinds(op))

    def values(self, tensors: Iterable[TracedTensor]) -> Iterator[tuple[int | None, Value]]:
        """Indices of the tensors that have a part in what the forward pass returned, and the values that they hold."""
        found = ((tensor, self.by_node.get(tensor.node)) for tensor in tensors)
        return ((tensor.index, (op, tensor.output)) for tensor, op in found if op is not None)

    @cached_property
    def users(self) -> dict[Op, list[Op]]:
        """Operations that each operation's outputs enter as data, in order."""
        users: dict[Op, list[Op]] = {op: [] for op in self.ops}
        lead_on = {*self.roots}  # not what was only there to be joined and taken apart again
        for op in reversed(self.ops):
            if op in lead_on:
                lead_on.update(op.data)
        for op in (op for op in self.ops if op in lead_on):
            for operand in dict.fromkeys(op.data):
                users[operand].append(op)
        return users

    @cached_property
    def uses_of(self) -> dict[str, list[Use]]:
        """Uses of each parameter."""
        found: dict[str, list[Use]] = defaultdict(list)
        for uses in self.uses.values():
            for use in uses:
                found[use.parameter].append(use)
        return found
