"""Streams and branches in an autograd graph: which additions are residual, and which operations lie between them.

A residual addition adds two tensors of one shape, one of which (the stream) goes into the other (the branch) through a
parameter matrix. Where a stage changes the shape, both are made from the stream, its shortcut without a nonlinearity.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mlu_lightning.discovery.graph import NONLINEAR, Graph, Op
from mlu_lightning.discovery.traversal import Ancestry, between, descendants, in_order

__all__ = ["BranchRegion", "Partition", "StreamRegions", "partition"]


@dataclass(frozen=True)
class BranchRegion:
    """What one branch of a residual addition consists of."""

    end: Op  # operand of the addition that is the branch
    root: Op  # stream that the branch reads
    addition: Op
    ops: tuple[Op, ...]  # in order
    before: Op  # other operand of the addition: the stream or its shortcut
    stream: int
    position: int  # along its stream; branches that read the same root share it


@dataclass
class StreamRegions:
    """Operations of one stream outside of branches."""

    depth: int  # positions at which branches are added
    stem: tuple[Op, ...] = ()  # before the first addition, and on data that is read besides the streams
    trunk: tuple[tuple[Op, ...], ...] = ()  # between two additions, for each pair of them
    shortcuts: tuple[Op, ...] = ()  # around a branch, where a stage changes the shape
    link: tuple[Op, ...] = ()  # between the last addition and branches of another stream that read it
    head: tuple[Op, ...] = ()  # between the last addition and the output; where several streams meet, of the first


@dataclass(frozen=True)
class Partition:
    """All operations of a graph, by the region that they are in."""

    branches: tuple[BranchRegion, ...]  # in the order of their additions
    streams: tuple[StreamRegions, ...]  # the one that reaches the output comes first
    nested: int  # residual additions inside branches, which belong to them


@dataclass(frozen=True)
class _Addition:
    """A residual addition, where its stream was read, the branch, and the operand that is the stream or its shortcut."""

    op: Op
    root: Op
    branch: Op
    stream: Op


def partition(graph: Graph) -> Partition:
    """Divide a graph into streams, branches, stem and head."""
    found = _residual_additions(graph)
    ancestry = Ancestry(graph, graph.ops, {op for addition in found for op in (addition.op, addition.root)})
    inner = _without_outermost(graph, found, ancestry)
    additions = _without_nested(inner, ancestry)
    stops = {op for addition in additions for op in (addition.op, addition.root)}
    head, head_stops = between(graph.roots, stops.__contains__)

    roots = dict.fromkeys(addition.root for addition in additions)
    own = {addition.op for addition in additions}
    behind = {root: between([root], (stops - {root}).__contains__) for root in roots if root not in own}
    stream_of = _streams(additions, {root: hits for root, (_, hits) in behind.items()}, head_stops)
    along: list[dict[Op, int]] = [{} for _ in set(stream_of.values())]  # the position at which each root is read
    for addition in additions:
        along[stream_of[addition.op]].setdefault(addition.root, len(along[stream_of[addition.op]]))

    branches: list[BranchRegion] = []
    context: list[Op] = []
    for addition in additions:
        reads_root = descendants(graph.ops[addition.root.index + 1 : addition.op.index], [addition.root])
        for end in _parallel_ends(graph, addition.branch, stops, reads_root):
            ops, outside = _branch_ops(graph, end, stops, reads_root)
            context.extend(outside)
            number = stream_of[addition.op]
            at = number, along[number][addition.root]
            branches.append(BranchRegion(end, addition.root, addition.op, ops, addition.stream, *at))

    streams = [StreamRegions(len(roots)) for roots in along]
    for addition in additions:
        streams[stream_of[addition.op]].shortcuts += between([addition.stream], stops.__contains__)[0]
    for root, (ops, hits) in behind.items():
        stream = streams[stream_of[root]]
        on_stream = descendants(ops, hits)
        if hits:
            stream.trunk += (tuple(op for op in ops if op in on_stream),)
        # what data are made into that join the stream later, as they do where every block is given its input again
        stream.stem = in_order({*stream.stem, *ops} - on_stream)
    assigned = stops.union(head, *(branch.ops for branch in branches))
    assigned.update(*(ops for stream in streams for ops in (*stream.trunk, stream.shortcuts, stream.stem)))
    aside = _by_stream(between(context, assigned.__contains__)[0], stream_of)
    heads = _by_stream(head, stream_of)
    for number, stream in enumerate(streams):
        stream.link, stream.head = aside.get(number, ()), heads.get(number, ())
    if streams:
        streams[-1].stem += aside.get(None, ()) + heads.get(None, ())
    return Partition(tuple(branches), tuple(streams), nested=len(inner) - len(additions))


def _residual_additions(graph: Graph) -> list[_Addition]:
    """Additions of a stream and a branch, in order."""
    candidates = [op for op in graph.ops if _adds_two(op)]
    chains = {operand: _linear_chain(operand) for op in candidates for operand in op.data}
    ancestry = Ancestry(graph, graph.ops, {op for chain in chains.values() for op in chain})
    found: dict[Op, _Addition] = {}
    for op in candidates:
        first, second = op.data
        for stream, branch in ((first, second), (second, first)):
            root = stream.source
            if root in found and not ancestry.precedes(root, branch):
                # (x + attention(x)) + mlp(x): the second branch reads the root of the first
                root = found[root].root
            if ancestry.feeds_matrix_before(root, branch):
                found[op] = _Addition(op, root, branch, stream)
                break
        else:
            for stream, branch in ((first, second), (second, first)):
                # where the two paths part; x + x³ inside a GELU part where no matrix follows
                root = next((o for o in chains[stream] if ancestry.precedes(o, branch)), stream)
                if ancestry.feeds_matrix_before(root, branch) and _is_nonlinear(branch, root):
                    found[op] = _Addition(op, root, branch, stream)
                    break
    return list(found.values())


def _linear_chain(op: Op) -> list[Op]:
    """What an operation is computed from without a nonlinearity or a second operand, up to another addition."""
    chain = [op]
    while len(op.data) == 1 and op.name not in NONLINEAR:
        op = op.data[0]
        chain.append(op)
    return chain


def _is_nonlinear(branch: Op, root: Op) -> bool:
    """Whether a nonlinearity lies between a root and the end of a branch."""
    ops, _ = between([branch], lambda op: op is root)
    return any(op.name in NONLINEAR and op.index > root.index for op in ops)


def _adds_two(op: Op) -> bool:
    return op.name in ("Add", "Sub") and op.shape != () and [o.shape for o in op.data] == [op.shape] * 2


def _without_outermost(graph: Graph, found: list[_Addition], ancestry: Ancestry) -> list[_Addition]:
    """Additions but those of the data itself and a network with residual additions: losses, skips around all of it."""
    made = descendants(graph.ops, graph.uses)  # what a parameter has a part in
    return [
        addition
        for addition in found
        if addition.root in made
        or not any(inner.root in made and ancestry.precedes(inner.op, addition.branch) for inner in found)
    ]


def _without_nested(found: list[_Addition], ancestry: Ancestry) -> list[_Addition]:
    """Additions that lie in no other one's branch, on the way from the root it reads to its end."""
    kept: list[_Addition] = []
    for addition in reversed(found):
        behind = (outer for outer in kept if ancestry.precedes(outer.root, addition.op))
        if not any(ancestry.precedes(addition.op, o.branch) or o.branch is addition.op for o in behind):
            kept.append(addition)
    return kept[::-1]


def _branch_ops(graph: Graph, end: Op, stops: set[Op], reads_root: set[Op]) -> tuple[tuple[Op, ...], list[Op]]:
    """Operations of a branch, and the data from elsewhere that a matrix of it reads, as cross-attention does an encoder."""
    outside: list[Op] = []

    def operands(op: Op) -> Iterable[Op]:
        if graph.is_matrix(op) and not any(operand in reads_root or operand in stops for operand in op.data):
            outside.extend(op.data)
            return ()
        return op.data

    ops, _ = between([end], stops.__contains__, operands)
    return ops, outside


def _by_stream(ops: tuple[Op, ...], stream_of: dict[Op, int]) -> dict[int | None, tuple[Op, ...]]:
    """Operations by the first of the streams that they come from, None if they come from data alone."""
    first: dict[Op, int | None] = {}
    parts: dict[int | None, tuple[Op, ...]] = {}
    for op in ops:
        streams = [first.get(operand, stream_of.get(operand)) for operand in op.data]
        stream = first[op] = min((stream for stream in streams if stream is not None), default=None)
        parts[stream] = (*parts.get(stream, ()), op)
    return parts


def _parallel_ends(graph: Graph, branch: Op, stops: set[Op], reads_root: set[Op]) -> list[Op]:
    """Ends of the branches that one operand of an addition sums: attention + mlp, unless they share matrices."""
    total = branch.source
    if not _adds_two(total):
        return [branch]
    parts = [_branch_ops(graph, operand, stops, reads_root)[0] for operand in total.data]
    matrices = [{op for op in part if graph.is_matrix(op)} for part in parts]
    if not all(matrices) or matrices[0] & matrices[1]:
        return [branch]
    return [end for operand in total.data for end in _parallel_ends(graph, operand, stops, reads_root)]


def _streams(additions: list[_Addition], behind: dict[Op, set[Op]], head_stops: set[Op]) -> dict[Op, int]:
    """Number the streams: additions that lie behind one another are on one; that of the head comes first."""
    parent: dict[Op, Op] = {}

    def find(op: Op) -> Op:
        while parent.setdefault(op, op) is not op:
            op = parent[op]
        return op

    for addition in additions:
        parent[find(addition.op)] = find(addition.root)
    for root, hits in behind.items():
        for hit in hits:
            parent[find(hit)] = find(root)
    last = {find(a.op): (a.op in head_stops, a.op.index) for a in additions}
    order = sorted(last, key=last.__getitem__, reverse=True)
    return {op: order.index(find(op)) for op in list(parent)}
