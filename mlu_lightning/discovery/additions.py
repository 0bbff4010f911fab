"""Find the residual additions of a forward pass: sums of a stream and what a branch computed from it.

Walking back from one operand, the stream, over operations with a single operand, one comes to where the other one, the
branch, parts from it. In between, a branch has a parameter matrix, or mixes what it reads without parameters (pooling,
Fourier transforms, shifts); x + x³ inside of a GELU does neither. A matrix on the way of the stream is its shortcut.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import takewhile

from mlu_lightning.discovery.graph import (
    ARITHMETIC,
    ATTENTION,
    JOINS,
    NONLINEAR,
    NORMS,
    PARTS,
    POOLS,
    RESHAPES,
    Graph,
    Op,
)
from mlu_lightning.discovery.traversal import Ancestry, between, descendants

_BENDING, _ARRANGED = NONLINEAR - POOLS, RESHAPES | PARTS | JOINS
_SOFTMAXES = frozenset({"Softmax", "SafeSoftmax", "LogSoftmax"})
_ELEMENTWISE = (RESHAPES | PARTS | ARITHMETIC | NONLINEAR | {"Neg", "Where", "MaskedFill"}) - _SOFTMAXES
"""Operations that do not mix tokens or coordinates."""


@dataclass(frozen=True)
class Addition:
    """A residual addition, where its stream was read, the branch, and the operand that is the stream or its shortcut."""

    op: Op
    root: Op
    branch: Op
    stream: Op


def adds_two(op: Op) -> bool:
    """Whether an operation adds two tensors, of which one may stand for several entries of the other."""
    return op.name in ("Add", "Sub") and op.shape != () and len(op.data) == 2


def residual_additions(graph: Graph) -> tuple[list[Addition], list[Op]]:
    """Residual additions in order, and those around each of others, which lie inside of branches and belong to them."""
    candidates = [op for op in graph.ops if adds_two(op)]
    chains = {operand: _chain(operand) for op in candidates for operand in op.data}
    marked = {op for chain in chains.values() for op in chain} | set(candidates)
    search = _Search(graph, chains, Ancestry(graph, graph.ops, marked))
    found = search.additions(candidates)
    whole = search.without_outermost(found)
    parted = search.without_long_skips(whole)
    kept, nested = search.without_nested(parted)
    return search.with_mixing(kept), nested


def _chain(op: Op) -> list[Op]:
    """What an operation is computed from without a nonlinearity or a second tensor, up to another addition."""
    chain = [op]
    while (before := _only_operand(op)) is not None:
        op = before
        chain.append(op)
    return chain


def _only_operand(op: Op, activated: Collection[Op] = ()) -> Op | None:
    """The one tensor that most of an operation is linearly made of, or an activation of one of these; None if none is."""
    if op.name in _BENDING and op.data and op.data[0].source not in activated:
        return None
    if op.name not in ("Cat", "Stack") or len(op.data) == 1:
        return op.data[0] if len(op.data) == 1 else None
    first, *others = ([*_parts_of(operand)] for operand in op.data)
    whole = next((part for part in first if all(part in other for other in others)), None)
    # tokens that a few others are joined with, as a class token is
    return whole or next((o for o in op.data if 2 * math.prod(o.shape) > math.prod(op.shape)), None)


def _parts_of(op: Op) -> Iterator[Op]:
    """An operation, and what it is a part of, or pools, repeats or shifts a part of."""
    yield op
    while len(op.data) == 1 and op.name in _ARRANGED:
        op = op.data[0]
        yield op


def _normed(op: Op) -> Iterator[Op]:
    """An operation, and what it is a norm of."""
    yield op
    while op.name in NORMS or op.is_transparent:
        op = op.data[0]
        yield op


class _Search:
    def __init__(self, graph: Graph, chains: dict[Op, list[Op]], ancestry: Ancestry) -> None:
        self.graph, self.chains, self.ancestry = graph, chains, ancestry
        self.made = descendants(graph.ops, graph.uses)  # what a parameter has a part in
        self.read = set[Op]()  # what goes into a parameter matrix
        self.begins: dict[Op, Op] = {}  # where the stream of each addition begins
        for op in reversed(graph.ops):
            if op in self.read or graph.is_matrix(op):
                self.read.update(op.data)

    def additions(self, candidates: list[Op]) -> list[Addition]:
        """All of them that have a matrix in their branch."""
        found: dict[Op, Addition] = {}
        for op in candidates:
            first, second = op.data
            # differences that no matrix reads are errors and losses
            if (op.name == "Sub" and op not in self.read) or self._is_logits(op) or self._is_gate(op):
                continue
            for stream, branch in ((first, second), (second, first)):
                root = self._root(op, stream, branch, found)
                if root is not None and (op in self.read or root in self.made):
                    found[op] = Addition(op, root, branch, stream)
                    break
        return list(found.values())

    def _root(self, op: Op, stream: Op, branch: Op, found: dict[Op, Addition]) -> Op | None:
        """Where a branch with a matrix parts from its stream, None if that is none."""
        last = stream.source
        if last in found and not self.ancestry.precedes(last, branch):
            # (x + attention(x)) + mlp(x): the second branch reads the root of the first
            before, other = found[last].root, found[last].branch.source
            if other in found and self.ancestry.feeds_matrix_before(other, branch):
                return other  # x + x0 + f(x): the stream is what the skip was added to
            return before if self.ancestry.feeds_matrix_before(before, branch) else None
        chain = self.chains[stream]
        parting = next((o for o in chain if self.ancestry.precedes(o, branch)), None)
        if parting is None:
            return self._root_of_part(op, chain, branch, found)
        root = parting.source  # before what only arranges it, or multiplies it with constants
        if not self.ancestry.feeds_matrix_before(root, branch):
            return None
        if self._is_other_stream(branch, root, found):
            return None
        shortcut = chain[: chain.index(parting)]
        if any(map(self.graph.is_matrix, shortcut)):
            # the shortcut is the side without a nonlinearity, and what no matrix reads are outputs that are summed
            alone = not any(len(self.graph.users[o]) > 1 or o in self.graph.roots for o in shortcut)
            return root if alone and op in self.read and self._is_nonlinear(branch, root) else None
        return root

    def _root_of_part(self, op: Op, chain: list[Op], branch: Op, found: dict[Op, Addition]) -> Op | None:
        """The root where a stream and something else are added first, as in x + t + f(x)."""
        *between_them, total = chain
        partial = total.name == "Add" and total not in found and len(self.graph.users[total]) == 1
        if not partial or self.ancestry.precedes(branch, total) or any(map(self.graph.is_matrix, between_them)):
            return None
        latest_first = sorted(total.data if adds_two(total) else (), key=lambda part: part.index, reverse=True)
        roots = (self._root(op, part, branch, found) for part in latest_first)
        return next((root for root in roots if root is not None), None)

    def _is_other_stream(self, branch: Op, root: Op, found: dict[Op, Addition]) -> bool:
        """Whether what seems to be a branch is a stream, or a norm of one, that does not come from the root."""
        *_, branch = _normed(branch)
        addition = found.get(branch)
        beside = takewhile(lambda op: op.source is not addition.root, self.chains[addition.stream]) if addition else ()
        if addition is None or any(map(self.graph.is_matrix, beside)):
            return False
        begin = min(self._line(branch, found), key=lambda op: op.index)
        return begin.index < root.index or (begin is not root and not self.ancestry.precedes(root, begin))

    def _is_nonlinear(self, branch: Op, root: Op) -> bool:
        """Whether a branch is a nonlinear function of a stream; of data, one of hidden units, or it embeds them, too."""
        ops, _ = between([branch], lambda op: op.index <= root.index)
        hidden = (operand in self.made for op in ops if self.graph.is_matrix(op) for operand in op.data)
        nonlinear = any(op.name in NONLINEAR or op.name.startswith(ATTENTION) for op in ops)
        return nonlinear and (root in self.made or any(hidden))

    def _is_logits(self, op: Op) -> bool:
        users = list(self.graph.users[op])
        for user in users:  # which grows
            users += self.graph.users[user] if user.is_transparent or user.name in ("MaskedFill", "Where") else ()
        return any(user.name in _SOFTMAXES for user in users)

    def _is_gate(self, op: Op) -> bool:
        """Whether nothing but a sigmoid reads a sum, inside of a network."""
        return op in self.read and {user.name for user in self.graph.users[op]} == {"Sigmoid"}

    def without_outermost(self, found: list[Addition]) -> list[Addition]:
        """Additions but those of the data itself and a network with residual additions: skips around all of it."""
        return [
            addition
            for addition in found
            if addition.root in self.made
            or not any(inner.root in self.made and self.ancestry.precedes(inner.op, addition.branch) for inner in found)
        ]

    def without_long_skips(self, found: list[Addition]) -> list[Addition]:
        """Additions but those around others on their own stream and a linear map at most, unless such follow one another."""
        of = {addition.op: addition for addition in found}
        long: dict[Op, Addition] = {}
        for addition in found:
            source = addition.branch
            while source not in of and (before := _only_operand(source, activated=of)) is not None:
                source = before
            inner, begin = of.get(source), addition.root
            if inner is None or inner.root.index < begin.index:
                continue
            line = self._line(inner.root, of, begin.index)
            first = min(line, key=lambda op: op.index)
            if self.graph.is_matrix(first) and len(first.data) == 1:
                line |= self._line(first.data[0], of, begin.index)
            if begin in line:
                long[addition.op] = addition
        chained = {outer for addition in long.values() for outer in self._line(addition.root, of) if outer in long}
        chained |= {op for op, addition in long.items() if not chained.isdisjoint(self._line(addition.root, of))}
        return [addition for addition in found if addition.op not in long or addition.op in chained]

    def _line(self, op: Op, of: dict[Op, Addition], until: int = 0) -> set[Op]:
        """What a stream has come through on its way to an operation, with all that was added to it outside of branches."""
        line, stack = set[Op](), [op]
        while stack:
            op = stack.pop()
            if op in line or op.index < until:
                continue
            line.add(op)
            if op in of:
                stack.append(of[op].root)
            elif op.name in ("Add", "Cat") or (len(op.data) == 1 and not self.graph.is_matrix(op)):
                stack.extend(op.data)
            elif op.is_normalizer:
                stack.append(max(op.data, key=lambda o: math.prod(o.shape)))
        return line

    def without_nested(self, found: list[Addition]) -> tuple[list[Addition], list[Op]]:
        """Additions that lie in no other one's branch, and those around each of others whose stream begins there, too."""
        kept: list[Addition] = []
        nested, of = list[Op](), {addition.op for addition in found}
        around: list[Addition] = []  # of those, which begin before
        for addition in found:
            before = (self.begins[op] for op in _normed(addition.root) if op in self.begins)
            self.begins[addition.op] = next(before, addition.root)
        continued: dict[Op, Op] = {}  # where the streams from each of their roots are added to for the last time
        for addition in reversed(found):
            around = [outer for outer in around if outer.root.index < addition.op.index]
            outer = next((outer for outer in around if self._is_within(addition, outer, of)), None)
            last = continued.get(addition.op)
            if outer is None or not (last in (None, outer.branch) or self.ancestry.precedes(last, outer.branch)):
                kept.append(addition)
                around.append(addition)
                for op in _normed(addition.root):
                    continued.setdefault(op, addition.op)
            elif addition.root is outer.root or self.ancestry.precedes(outer.root, addition.root):
                nested.append(outer.op)
        return kept[::-1], nested

    def _is_within(self, addition: Addition, outer: Addition, of: set[Op]) -> bool:
        """Whether an addition lies in another one's branch, and is not on a stream that was there before."""
        ends = addition.op is outer.branch or self.ancestry.precedes(addition.op, outer.branch)
        if not ends or not self.ancestry.precedes(outer.root, addition.op):
            return False
        root = addition.root
        if root is outer.root or self.ancestry.precedes(outer.root, root):
            begin = self.begins[addition.op]
            earlier = begin is not self.begins[outer.op] and begin.index < outer.root.index
            return not (earlier and self._escapes(addition.op, outer.op))
        return (root not in of or root.index >= outer.root.index) and not self._escapes(addition.op, outer.op)

    def _escapes(self, op: Op, outer: Op) -> bool:
        """Whether what an operation makes is read besides another one that reads it, as two streams read each other."""
        seen, stack = {op}, [op]
        while stack:
            users = self.graph.users[stack.pop()]
            if not users or any(user.index > outer.index for user in users):
                return True
            new = {user for user in users if user is not outer} - seen
            seen |= new
            stack += new
        return False

    def with_mixing(self, found: list[Addition]) -> list[Addition]:
        """Additions, and those on the same streams whose branches mix what they read without a matrix."""
        of = {addition.op: addition for addition in found}
        continued = set[Op]()
        for addition in found:
            op = addition.root
            while op not in of:
                mixing = self._mixing(op)
                if mixing is not None:
                    of[op] = mixing
                    op = mixing.root
                elif len(op.data) == 1 and not self.graph.is_matrix(op):
                    op = op.data[0]
                else:
                    break
            continued.add(op)
        last = [addition.op for addition in found if addition.op not in continued]
        for op in last:  # which grows by what follows
            for user in self.graph.users[op]:
                mixing = None if user in of else self._mixing(user)
                if mixing is not None:
                    of[user] = mixing
                if mixing is not None or user.name in NORMS:
                    last.append(user)
        return sorted(of.values(), key=lambda addition: addition.op.index)

    def _mixing(self, op: Op) -> Addition | None:
        """The residual addition without a matrix that an operation on a stream is, if it is one."""
        if op.name != "Add" or not adds_two(op):
            return None
        first, second = op.data
        for stream, branch in ((first, second), (second, first)):
            root = next((o for o in self.chains[stream] if self.ancestry.precedes(o, branch)), None)
            if root is None or root not in self.made:
                continue
            chain = self.chains[stream]
            arranged = all(o.name in RESHAPES for o in chain[: chain.index(root)])
            # mypy infers no type of a lambda with a default, which keeps this turn's root
            ops, _ = between([branch], lambda o, root=root: o.index <= root.index)  # type: ignore[misc]
            mixes = any(o.name not in _ELEMENTWISE for o in ops) and not any(map(self.graph.is_matrix, ops))
            if arranged and mixes:
                return Addition(op, root, branch, stream)
        return None
