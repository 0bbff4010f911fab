"""The values of a forward pass as a graph: what came from what, what is a multiple of what, and where streams are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mlu_lightning.observation.operations import NORMS

MOST_ORIGINS = 32  # values of whose multiples one is a sum; of more, it is a value of its own


@dataclass(eq=False)
class Node:
    """A tensor of the pass, without its values."""

    index: int
    op: str
    data: bool = False  # whether it depends on data
    weights: frozenset[str] = frozenset()  # parameters of which it is a function, and of no other data
    plain: bool = False  # whether it is a part of one parameter
    parents: tuple[Node, ...] = ()  # those of its operands that depend on data
    origins: tuple[tuple[Node, float], ...] = ()  # nodes of which it is a multiple, and by what
    multiple: bool = False  # whether it is one of its parent
    viewed: Node | None = None  # whose memory it may share
    used: tuple[str, ...] = ()  # parameters that are used to compute it from data
    residual: tuple[Node, Node] | None = None  # stream and branch of a residual addition
    ends: dict[str, list[float]] = field(default_factory=dict)

    @property
    def root(self) -> Node:
        """What it is a multiple of, up to a bias."""
        node = self
        while node.multiple:
            (node,) = node.parents
        return node


def write_through(before: Node, node: Node) -> None:
    """Let what a part of was written to depend on what was written."""
    whole = before.viewed
    while whole is not None:
        whole.data, whole.multiple = whole.data or node.data, False
        whole.parents += node.parents
        whole.origins = tuple(dict.fromkeys(whole.origins + node.origins))[:MOST_ORIGINS]
        whole = whole.viewed


def nodes_before(node: Node, first: int) -> Iterator[Node]:
    """A node and those before it, up to a number of the first."""
    seen, stack = {node}, [node]
    while stack:
        found = stack.pop()
        yield found
        for parent in found.parents:
            if parent.index >= first and parent not in seen:
                seen.add(parent)
                stack.append(parent)


def depends(node: Node, other: Node) -> bool:
    """Whether a value was computed from another, and is no multiple of it."""
    return node.root is not other and any(found is other for found in nodes_before(node, other.index))


def since_fork(stream: Node, branch: Node) -> float:
    """By what a stream is multiplied after a branch has left it and before the branch is added to it."""
    left = {*nodes_before(branch, stream.root.index)}
    node = stream
    while node not in left and node.multiple:
        (node,) = node.parents
    factors = dict(node.origins)
    ratios = {factor / factors[source] for source, factor in stream.origins if factors.get(source)}
    return ratios.pop() if len(ratios) == 1 else 1.0


def common_factor(node: Node) -> float:
    """By what a value is a multiple of those it comes from, 1 if these differ in it."""
    gains = (source for source, _ in node.origins if source.op in ("mul", "div"))
    # what a gain multiplies is behind it, and the gain's size no constant
    behind = {source for gain in gains for parent in gain.parents for source, _ in parent.origins}
    factors = {factor for source, factor in node.origins if source not in behind}
    return factors.pop() if len(factors) == 1 else 1.0


def operands(addition: Node) -> tuple[Node, Node]:
    """Stream and branch of a residual addition."""
    assert addition.residual is not None
    return addition.residual


def branch_of(addition: Node) -> Iterator[Node]:
    """What leads from what is added to, to what is added."""
    stream, branch = operands(addition)
    return nodes_before(branch, stream.root.index + 1)


def names_in(addition: Node) -> Iterator[str]:
    """Parameters with which what is added was computed."""
    for node in branch_of(addition):
        yield from node.used


def additions_within(addition: Node) -> Iterator[Node]:
    """Residual additions in the branch of another one, to what was computed from its stream."""
    stream = operands(addition)[0].root
    for node in branch_of(addition):
        if node.residual is not None and stream in nodes_before(node.residual[0].root, stream.index):
            yield node


def _last_addition(node: Node) -> Node | None:
    """The residual addition that a value is the sum of, up to norms."""
    node = node.root
    while node.op in NORMS and node.parents:
        node = node.parents[0].root
    return node if node.residual is not None else None


def joins(addition: Node) -> bool:
    """Whether both operands are streams, one of which goes on from the other."""
    stream, branch = operands(addition)
    last = _last_addition(branch)
    return last is not None and last.index > stream.root.index


def stream_before(addition: Node) -> Iterator[Node]:
    """An addition and those before it along its stream."""
    node: Node | None = addition
    while node is not None:
        yield node
        stream, branch = operands(node)
        node = _last_addition(branch if joins(node) else stream)
