"""What in a module discovery cannot see or the theory does not cover: refused, or said in a warning."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

from torch import nn

from mlu_lightning.discovery.constants import Constants
from mlu_lightning.discovery.graph import PARTS, RESHAPES, Graph, Op
from mlu_lightning.discovery.parameter_facts import Region
from mlu_lightning.discovery.residual import Partition
from mlu_lightning.discovery.traversal import Ancestry, descendants
from mlu_lightning.table import Variant
from mlu_lightning.utilities.names import common_module

__all__ = ["require_no_reentrance", "require_residual_branches", "warnings_about"]

_FUSED = ("Rnn", "Lstm", "Gru", "Scan")
_ELEMENTWISE = frozenset("Sub Add Mul Neg MaskedFill Where ConstantPadNd Tril Triu".split())
_STEPS = 3
"""Steps that tell a recurrence from a sum of products."""


def require_no_reentrance(module: nn.Module, graph: Graph) -> None:
    """Refuse activation checkpointing that runs a part without a graph until gradients are needed."""
    if any(op.name == "CheckpointFunction" for op in graph.ops):
        raise ValueError(
            f"{type(module).__name__} uses reentrant activation checkpointing, inside of which nothing can be seen in the "
            "forward pass. Give use_reentrant=False to torch.utils.checkpoint.checkpoint, which the module then trains "
            'with, too (gradient_checkpointing_kwargs={"use_reentrant": False} of a Hugging Face model), or switch '
            "checkpointing on after the module was planned, and give MLUCallback(plan=...)."
        )


def require_residual_branches(module: nn.Module, graph: Graph, partition: Partition) -> None:
    """Refuse a module without residual branches, or with recurrent ones."""
    if not partition.branches:
        raise ValueError(
            f"{type(module).__name__} has no residual branches: no tensor is added to another one that it was computed "
            "from through a weight matrix. The MLU parameterization is one of residual networks; if the module is one, "
            "check that the example runs its residual blocks."
        )
    recurrent = ((branch, how) for branch in partition.branches if (how := _recurrence(graph, branch.ops)) is not None)
    found: dict[str, str] = {}
    for branch, how in recurrent:
        found.setdefault(common_module(use.parameter for op in branch.ops for use in graph.matrices(op)), how)
    if found:
        (first, how), *others = found.items()
        more = f" and {len(others)} more" if others else ""
        raise ValueError(
            f"{type(module).__name__} has recurrent or state-space branches, which the theory does not cover: "
            f"{first or 'the module itself'}{more} ({how}). There are no numbers to plan it by: the MLU "
            "parameterization is one of residual branches whose units do not feed back into themselves from token to "
            "token, such as perceptrons, attention and convolutions."
        )


def warnings_about(
    partition: Partition, regions: list[Region], constants: Constants, variants: set[Variant | None], idle: list[str]
) -> Iterator[str]:
    """Say what the theory does not cover; ``variants`` are of all parameters, ``idle`` those without tokens."""
    if Variant.POST_NORM in variants:
        yield (
            "the stream is normalized after its additions (post-norm), which the theory does not cover: the learning "
            "rates of these norms are divided by the depth ratio, because their effects compound"
        )
    if constants.of_streams != 1:
        yield (
            f"the stream is multiplied by {constants.of_streams:.4g} from each addition to the next, without a norm on it, "
            "so that what blocks add fades or grows with every further block: the theory covers sums along the depth"
        )
    branches = (region.branch for region in regions if region.branch is not None)
    unread = [common_module(b.matrix_names) for b in branches if b.experts is not None and b.experts.active is None]
    if unread:
        yield (
            "the number of experts that a token is sent to cannot be read in the graph, so that the hidden units of one "
            f"expert are counted, which is right as long as that number is the base's: {', '.join(unread)}"
        )
    if idle:
        names = ", ".join(idle)
        yield f"experts that no token of the example was sent to are planned as the experts beside them: {names}"
    if partition.nested:
        yield f"{partition.nested} residual additions inside other residual branches are taken for parts of these"


def _recurrence(graph: Graph, ops: tuple[Op, ...]) -> str | None:
    """Say in what way a branch is recurrent, None if it is not."""
    fused = next((op.name for op in ops if any(part in op.name for part in _FUSED)), None)
    if fused is not None:
        return f"it calls {fused}"
    matrices = Ancestry(graph, ops)
    for op in filter(graph.is_matrix, ops):  # as in a recurrent cell that is called for every token
        before = {use.parameter for matrix in matrices.of(op) for use in graph.matrices(matrix)}
        again = before & {use.parameter for use in graph.matrices(op)}
        if again:
            return f"{min(again)} is applied to its own output"
    if _is_scan(ops, matrices):
        return "a state is multiplied and added to step by step"
    if _is_cumulative_decay(ops):
        return "a state decays by the exponential of a cumulative sum"
    return None


def _is_scan(ops: tuple[Op, ...], matrices: Ancestry) -> bool:
    """Whether sums are multiplied and added to again and again: s ← a s + b, with another a but no further matrix."""
    multipliers: dict[Op, frozenset[Op]] = {}
    for op in ops:
        if op.name != "Add":
            continue
        steps = [frozenset[Op]()]
        for product in (operand.source for operand in op.data if operand.source.name == "Mul"):
            for state, multiplier in permutations((factor.source for factor in product.data), 2):
                if state in multipliers and state.shape == op.shape and matrices.of(state) == matrices.of(op):
                    steps.append(multipliers[state] | {multiplier})
        multipliers[op] = max(steps, key=len)
    return max(map(len, multipliers.values()), default=0) >= _STEPS


def _is_cumulative_decay(ops: tuple[Op, ...]) -> bool:
    """Whether data is summed up along an axis and exponentiated, or multiplied up, as in a scan over chunks."""
    elementwise = (op for op in ops if op.name in RESHAPES | PARTS | _ELEMENTWISE)
    summed = descendants(elementwise, [op for op in ops if op.name == "Cumsum"])
    exponents = (operand for op in ops if op.name == "Exp" for operand in op.data)
    return any(op.name in ("Cumprod", "Logcumsumexp") for op in ops) or not summed.isdisjoint(exponents)
