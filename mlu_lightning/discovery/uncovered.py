"""Refuse, or warn of, what discovery cannot see in a module or the theory does not cover."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

from mlu_lightning.discovery.constants import Constants
from mlu_lightning.discovery.graph import LINEAR, NORMS, Graph, Op
from mlu_lightning.discovery.parameter_facts import Region
from mlu_lightning.discovery.recurrence import feeds_back
from mlu_lightning.discovery.residual import Partition
from mlu_lightning.table import Variant
from mlu_lightning.utilities.names import common_module, owner_of


def require_no_reentrance(module: nn.Module, graph: Graph) -> None:
    """Refuse activation checkpointing that runs a part without a graph until gradients are needed."""
    if any(op.name == "CheckpointFunction" for op in graph.ops):
        raise ValueError(
            f"{type(module).__name__} uses reentrant activation checkpointing, inside of which nothing can be seen in the "
            "forward pass. Give use_reentrant=False to torch.utils.checkpoint.checkpoint, which the module then trains "
            'with, too (gradient_checkpointing_kwargs={"use_reentrant": False} of a Hugging Face model), or switch '
            "checkpointing on after the module was planned, and give MLUCallback(plan=...)."
        )


def require_residual_branches(module: nn.Module, partition: Partition) -> None:
    """Refuse a module without residual branches."""
    if not partition.branches:
        raise ValueError(
            f"{type(module).__name__} has no residual branches: no tensor is added to another one that it was computed "
            "from through a weight matrix. The MLU parameterization is one of residual networks; if the module is one, "
            "check that the example runs its residual blocks."
        )


def require_recurrence_in_branches(module: nn.Module, graph: Graph, partition: Partition) -> None:
    """Refuse a recurrent layer outside of every residual branch."""
    parts = ((*p.trunk, p.stem, *(o.ops for o in p.own), p.shortcuts, p.link, p.head) for p in partition.streams)
    found = sorted({name for regions in parts for ops in regions for name in feeds_back(graph, ops)})
    if found:
        raise _recurrent(module, found)


def _recurrent(module: nn.Module, names: list[str]) -> ValueError:
    owner = common_module(names) or "the module itself"
    return ValueError(
        f"{type(module).__name__} has a recurrent layer outside of every residual branch: {owner} ({names[0]} is "
        "applied to its own output). A state that a sequence runs through adds nothing to a residual stream, so there "
        "are no numbers to plan it by, and no role to give in overrides. Put it into a residual branch, as in "
        "x + out(rnn(norm(x))), or plan the residual part of the module alone."
    )


def require_sums(module: nn.Module, graph: Graph, partition: Partition) -> None:
    """Refuse a stream that gates mix between its additions, as in a recurrent unit along the depth."""
    for stream in partition.streams:
        gates = [gate for ops in stream.trunk if (gate := _gate(graph, ops)) is not None]
        if len(gates) > 1 or (gates and stream.depth < 4):
            names = [use.parameter for use in graph.matrices(gates[0])]
            uses = (u for op in graph.uses for u in graph.matrices(op) if owner_of(u.parameter) == owner_of(names[0]))
            again = [name for name, count in Counter(use.parameter for use in uses).items() if count > 1]
            if again:
                raise _recurrent(module, again)
            raise ValueError(
                f"{type(module).__name__} multiplies its stream by what {owner_of(names[0])} makes of the stream, between "
                "additions: such gates keep a part of the stream in every block and forget another, as a recurrent unit "
                "does in time. The MLU parameterization is one of sums along the depth, so there are no numbers to plan "
                "gates by, and no role to give in overrides. Let blocks add what they make to the stream, without gates."
            )


def _gate(graph: Graph, ops: tuple[Op, ...]) -> Op | None:
    """A matrix between two additions by whose outputs the stream itself is multiplied."""
    inside, linear, made = set(ops), set[Op](), dict[Op, Op]()
    for op in ops:
        if graph.is_matrix(op):
            made[op] = op
            continue
        plain = [operand for operand in op.data if operand in linear or operand not in inside]
        matrix = next((made[operand] for operand in op.data if operand in made), None)
        if matrix is None:
            if op.name in LINEAR | NORMS or op.is_normalizer:
                linear.add(op)
        elif plain and len(op.data) == 2 and op.name in ("Mul", "Bmm"):
            return matrix
        else:
            made[op] = matrix
    return None


def warnings_about(
    partition: Partition, regions: list[Region], constants: Constants, variants: set[Variant | None], idle: list[str]
) -> Iterator[str]:
    """Say what the theory does not cover; ``variants`` are of all parameters, ``idle`` those without tokens."""
    if Variant.POST_NORM in variants:
        yield (
            "the stream is normalized after its additions (post-norm), which the theory does not cover: the learning "
            "rates of these norms are divided by the ratio of their number, because their effects compound"
        )
    if Variant.EVERY_BLOCK in variants:
        yield (
            "the stream goes through a matrix or a gain of its own beside the branch of every block, which the theory does "
            "not cover: their learning rates are divided by the ratio of their number, because their effects compound"
        )
    if constants.of_streams != 1:
        yield (
            f"the stream is multiplied by {constants.of_streams:.4g} from each addition to the next, without a norm on it, "
            "so that what blocks add fades or grows with every further block: the theory covers sums along the depth"
        )
    if constants.has_unknown:
        yield (
            "the module multiplies by buffers or frozen parameters of one entry that are on the meta device, where they "
            "have no value: they are taken to be what the base has. If they depend on the shape, as sqrt(D) on embeddings "
            "does, build the module and its base on a real device to plan them"
        )
    branches = [region.branch for region in regions if region.branch is not None]
    unread = [common_module(b.matrix_names) for b in branches if b.experts is not None and b.experts.active is None]
    if unread:
        yield (
            "the number of experts that a token is sent to cannot be read in the graph, so that the hidden units of one "
            f"expert are counted, which is right as long as that number is the base's: {', '.join(unread)}"
        )
    if idle:
        names = ", ".join(idle)
        yield f"experts that no token of the example was sent to are planned as the experts beside them: {names}"
    in_time = {branch.region.addition for branch in branches if branch.is_recurrent}  # the steps of a recurrence
    if nested := sum(op not in in_time for op in partition.nested):
        yield f"{nested} residual additions inside other residual branches are taken for parts of these"
