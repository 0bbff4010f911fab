"""Streams and branches in an autograd graph: which operations lie between residual additions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mlu_lightning.discovery.additions import Addition, adds_two, residual_additions
from mlu_lightning.discovery.graph import ATTENTION, PRODUCTS, Graph, Op
from mlu_lightning.discovery.traversal import between, descendants, in_order


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


@dataclass(frozen=True)
class BlockContext:
    """What is made of data for some branches of a stream, as each block's own embedding of a time step is."""

    ops: tuple[Op, ...]  # in order
    position: int  # of the first branch that reads it
    repeats: int  # how many such blocks there are along the stream


@dataclass
class StreamRegions:
    """Operations of one stream outside of branches."""

    depth: int  # positions at which branches are added
    stem: tuple[Op, ...] = ()  # before the first addition, and on data that is read besides the streams
    trunk: tuple[tuple[Op, ...], ...] = ()  # between two additions, for each pair of them
    shortcuts: tuple[Op, ...] = ()  # around a branch, where a stage changes the shape
    link: tuple[Op, ...] = ()  # between the last addition and branches of another stream that read it
    own: tuple[BlockContext, ...] = ()  # what some of its blocks alone make of data that is read besides the streams
    head: tuple[Op, ...] = ()  # between the last addition and the output; where several streams meet, of the first


@dataclass(frozen=True)
class Partition:
    """All operations of a graph, by the region that they are in."""

    branches: tuple[BranchRegion, ...]  # in the order of their additions
    streams: tuple[StreamRegions, ...]  # the one that reaches the output comes first
    apart: frozenset[Op]  # what losses are computed from without any stream
    nested: tuple[Op, ...]  # additions around others inside of their branches, which belong to them


def partition(graph: Graph) -> Partition:
    """Divide a graph into streams, branches, stem and head."""
    additions, nested = residual_additions(graph)
    stops = {op for addition in additions for op in (addition.op, addition.root)}
    head, head_stops = between(graph.roots, stops.__contains__)

    roots = dict.fromkeys(addition.root for addition in additions)
    own = {addition.op for addition in additions}
    behind = {root: between([root], (stops - {root}).__contains__) for root in roots if root not in own}
    stream_of = _streams(additions, {root: hits for root, (_, hits) in behind.items()}, head_stops)
    position = _positions(graph, additions, stream_of)

    branches: list[BranchRegion] = []
    context: dict[Op, int] = {}  # what branches read besides their streams, with the numbers of these branches, as bits
    reads = {a: descendants(graph.ops[a.root.index + 1 : a.op.index], [a.root]) for a in additions}
    owner: dict[Op, Op] = {}  # the first root that the inside of a branch reads
    for addition in additions:
        within = reads[addition] - stops
        # mypy infers no type of a lambda with a default, which keeps this turn's operations
        inside, _ = between([addition.branch], lambda op, within=within: op not in within)  # type: ignore[misc]
        owner |= {op: addition.root for op in inside if op not in owner}
    for addition in additions:
        reads_root = reads[addition]

        def stops_at(op: Op, root: Op = addition.root, reads_root: set[Op] = reads_root) -> bool:
            # what another branch has made of its own stream alone is handed on, as logits are from block to block
            return op in stops or (op not in reads_root and owner.get(op, root) is not root)

        for end in _parallel_ends(graph, addition.branch, stops_at, reads_root):
            ops, outside = _branch_ops(graph, end, stops_at, reads_root)
            context |= {op: context.get(op, 0) | 1 << len(branches) for op in outside}
            number = stream_of[addition.op]
            at = number, position[addition.op]
            branches.append(BranchRegion(end, addition.root, addition.op, ops, addition.stream, *at))

    depths = (max(position[a.op] + 1 for a in additions if stream_of[a.op] == n) for n in set(stream_of.values()))
    streams = [StreamRegions(depth) for depth in depths]
    for addition in additions:
        ops, _ = between([addition.stream], stops.__contains__)
        stream = streams[stream_of[addition.op]]
        stream.shortcuts += tuple(op for op in ops if op in reads[addition])
        stream.stem += tuple(op for op in ops if op not in reads[addition])
    for root, (ops, hits) in behind.items():
        stream = streams[stream_of[root]]
        on_stream = descendants(ops, hits)
        if hits:
            stream.trunk += (tuple(op for op in ops if op in on_stream),)
        # what data are made into that join the stream later, as they do where every block is given its input again
        stream.stem = in_order({*stream.stem, *(op for op in ops if op not in on_stream)})
    assigned = stops.union(head, *(branch.ops for branch in branches))
    assigned.update(*(ops for stream in streams for ops in (*stream.trunk, stream.shortcuts, stream.stem)))
    beside, _ = between(context, assigned.__contains__)
    aside = _by_stream(beside, stream_of)
    aside[None] = _assign_own(aside.get(None, ()), beside, context, branches, streams)
    heads = _by_stream(head, stream_of)
    for number, stream in enumerate(streams):
        stream.link, stream.head = aside.get(number, ()), heads.get(number, ())
    if streams:
        streams[-1].stem += aside[None] + heads.get(None, ())
    return Partition(tuple(branches), tuple(streams), frozenset(heads.get(None, ())), tuple(nested))


def _branch_ops(
    graph: Graph, end: Op, stops: Callable[[Op], bool], reads_root: set[Op]
) -> tuple[tuple[Op, ...], list[Op]]:
    """Operations of a branch, and the data from elsewhere that a matrix of it reads, as cross-attention does an encoder."""

    def reads(op: Op) -> bool:
        return op in reads_root or stops(op)

    def further(op: Op) -> Iterable[Op]:
        return op.data if not graph.is_matrix(op) or any(map(reads, op.data)) else ()

    def joins(op: Op) -> bool:
        return graph.is_matrix(op) or op.name.startswith(ATTENTION) or (op.name in PRODUCTS and len(op.data) > 1)

    ops, _ = between([end], stops, further)
    # what is joined with the stream before matrices of the branch read both, such as tokens that a class token attends to,
    # has been made elsewhere
    read = (operand for op in ops if graph.is_matrix(op) and any(map(reads, op.data)) for operand in op.data)
    joined = (op for op in between(read, lambda op: joins(op) or stops(op))[0] if op.name == "Cat")
    others = [operand for op in joined if any(map(reads, op.data)) for operand in op.data if not reads(operand)]
    elsewhere = between(others, lambda op: graph.is_matrix(op) or reads(op))[1] - reads_root
    ops, _ = between([end], lambda op: op in elsewhere or stops(op), further)
    foreign = (op for op in ops if graph.is_matrix(op) and not any(map(reads, op.data)))
    return ops, [*elsewhere, *(operand for op in foreign for operand in op.data)]


def _assign_own(
    ops: tuple[Op, ...],
    beside: tuple[Op, ...],
    context: dict[Op, int],
    branches: list[BranchRegion],
    streams: list[StreamRegions],
) -> tuple[Op, ...]:
    """Give streams what is made of data for some of their branches, as for others beside them, and return the rest."""
    readers = dict(context)
    groups: dict[int, list[Op]] = {}
    made_of_data = set(ops)
    for op in reversed(beside):
        if op in made_of_data:
            groups.setdefault(readers[op], []).append(op)
        for operand in op.data:
            readers[operand] = readers.get(operand, 0) | readers[op]
    rest: list[Op] = []
    for bits, group in groups.items():
        read_by = [branch for number, branch in enumerate(branches) if bits >> number & 1]
        positions = {(branch.stream, branch.position) for branch in read_by}
        stream = streams[read_by[0].stream]
        # of one block alone where other blocks have others; what is alone may be for all blocks
        if len({number for number, _ in positions}) == 1 and any(not bits & others for others in groups):
            stream.own += (BlockContext(in_order(group), min(positions)[1], stream.depth // len(positions)),)
        else:
            rest += group
    return in_order(rest)


def _by_stream(ops: tuple[Op, ...], stream_of: dict[Op, int]) -> dict[int | None, tuple[Op, ...]]:
    """Operations by the first of the streams that they come from, None if they come from data alone."""
    first: dict[Op, int | None] = {}
    parts: dict[int | None, tuple[Op, ...]] = {}
    for op in ops:
        streams = [first.get(operand, stream_of.get(operand)) for operand in op.data]
        stream = first[op] = min((stream for stream in streams if stream is not None), default=None)
        parts[stream] = (*parts.get(stream, ()), op)
    return parts


def _parallel_ends(graph: Graph, branch: Op, stops: Callable[[Op], bool], reads_root: set[Op]) -> list[Op]:
    """Ends of the branches that one operand of an addition sums: attention + mlp, unless they share matrices."""
    total = branch.source
    if not adds_two(total):
        return [branch]
    parts = [_branch_ops(graph, operand, stops, reads_root)[0] for operand in total.data]
    matrices = [{op for op in part if graph.is_matrix(op)} for part in parts]
    if not all(matrices) or matrices[0] & matrices[1]:
        return [branch]
    return [end for operand in total.data for end in _parallel_ends(graph, operand, stops, reads_root)]


def _positions(graph: Graph, additions: list[Addition], stream_of: dict[Op, int]) -> dict[Op, int]:
    """How many additions of its stream each one comes after; of streams that are joined, side by side, the most."""
    position: dict[Op, int] = {}
    for number in set(stream_of.values()):
        own = {addition.op: addition for addition in additions if stream_of[addition.op] == number}
        passed: dict[Op, int] = {}
        for op in graph.ops:
            operands = (own[op].root, own[op].branch) if op in own else op.data
            passed[op] = max((passed[operand] for operand in operands), default=0)
            if op in own:
                position[op] = passed[op]
                passed[op] += 1
    return position


def _streams(additions: list[Addition], behind: dict[Op, set[Op]], head_stops: set[Op]) -> dict[Op, int]:
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
