"""What autograd calls the operations of a forward pass, by what they do to data."""

RESHAPES = frozenset(
    "View UnsafeView ReshapeAlias T Transpose Permute Expand Clone Alias ToCopy Squeeze Unsqueeze AsStrided "
    "ViewAsComplex ViewAsReal NativeDropout FusedDropout".split()
)
"""Operations that keep every entry (dropout: on average) and only arrange them."""
PERMUTATIONS = frozenset({"T", "Transpose", "Permute"})
VIEWS = frozenset({"View", "UnsafeView", "ReshapeAlias"})
PARTS = frozenset("Slice Select Split SplitWithSizes Unbind".split())
"""Operations that take a part of a tensor."""
JOINS = frozenset(
    "Cat Stack Sum Mean IndexAdd ScatterAdd Scatter IndexPut IndexCopy Copy CopySlices Where MaskedFill Index "
    "IndexSelect Gather ConstantPadND AvgPool2D MkldnnAdaptiveAvgPool2D AdaptiveAvgPool2D UpsampleNearest2D "
    "UpsampleBilinear2D Roll Flip Neg".split()
)
"""Further linear operations, which arrange, sum or mask."""
ARITHMETIC = frozenset("Add Sub Rsub Mul Div".split())
LINEAR = RESHAPES | PARTS | JOINS | ARITHMETIC
"""Operations that are linear in each operand, but for matrix products and convolutions."""
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
SIZES = frozenset("Rsqrt Sqrt Reciprocal LinalgVectorNorm Norm Std ClampMin Clamp Pow".split())
"""Last operations of the size of data, by which a norm that is written by hand divides."""
SELECTIONS = frozenset({"Index", "IndexSelect"})
LOOKUPS = frozenset("Embedding EmbeddingBag Index IndexSelect Gather".split())
ATTENTION = "ScaledDotProduct"
"""How the names of fused attentions begin."""
CONVOLUTIONS = frozenset({"Convolution", "MkldnnConvolution", "ConvDepthwise2D", "ThnnConv2D"})
WEIGHT_SLOTS: dict[str, dict[int, bool]] = {
    "Mm": {0: False, 1: True},
    "Bmm": {0: False, 1: True},
    "Addmm": {1: False, 2: True},
    "Baddbmm": {1: False, 2: True},
    "Mv": {0: False},
    "Linear": {1: False},
    "GroupedMm": {1: True},
} | {name: {1: False} for name in CONVOLUTIONS}
"""Operands of an operation that can be a matrix of parameters, each with whether it is [inputs, outputs] there."""
BIAS_SLOTS = {"Addmm": 0, "Baddbmm": 0, "Linear": 2} | dict.fromkeys(CONVOLUTIONS, 2)
"""Operand of an operation that is the bias of its matrix."""
