"""Where a multiplier can go: the output of a module (as a hook), or parameters into which it can be folded."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from mlu_lightning.discovery.attention import Attention
from mlu_lightning.discovery.graph import (
    ARITHMETIC,
    ATTENTION,
    JOINS,
    NORMS,
    PARTS,
    RESHAPES,
    Graph,
    Op,
    Use,
    full_factors,
    is_normalizer,
    transparent_source,
)
from mlu_lightning.discovery.structure import Logits, Site
from mlu_lightning.discovery.trace import Call, Rehearsal
from mlu_lightning.utilities.names import planned_part

__all__ = ["Sites"]


@dataclass(frozen=True)
class Sites:
    """Places for multipliers in one rehearsed module.

    Args:
        rehearsal: a forward pass.
        graph: its graph.
    """

    rehearsal: Rehearsal
    graph: Graph

    def branch(self, ends: list[Op], name: str, owner: str) -> Site | None:
        """A module whose output, multiplied, multiplies a branch and nothing else.

        Args:
            ends: last operation of the branch in each of its calls.
            name: of the branch; a module of that name is preferred.
            owner: module of the matrix that writes; second choice.
        """
        makers = [self._makers(self._proportional(end), len(ends)) for end in ends]
        found = [site for site in makers[0] if all(site in others for others in makers)]
        return min(found, key=lambda site: (site.module != name, site.module != owner, len(site.module)), default=None)

    def readout(self, matrices: list[Op]) -> Site | None:
        """A place to multiply what a readout matrix reads, so that its bias is not multiplied.

        Args:
            matrices: every operation with the matrix.
        """
        if not all(matrix.data for matrix in matrices):
            return None
        source = {matrix: transparent_source(matrix.data[0]) for matrix in matrices}
        for name, calls in self._calls.items():
            reads = [self._matrix_of(call, source) for call in calls]
            if len(reads) == len(matrices) and None not in reads:
                return Site(name, "input")
        # a tied table is used without a module of its own: multiply what makes its input, if nothing else reads that
        if any(self._lasting_readers(source[matrix]) != {matrix} for matrix in matrices):
            return None
        makers = [self._makers([op], len(matrices)) for op in source.values()]
        return next((site for site in makers[0] if all(site in others for others in makers)), None)

    def logits(self, attention: Attention, calls: int) -> Logits:
        """Where the queries of an attention can be multiplied: after their norm, which would undo it, if they have one.

        Args:
            attention: in the first of its calls.
            calls: number of calls of the branch.
        """
        queries = attention.queries
        size = math.prod(queries.shape)
        behind = self._behind(queries)
        alone = [
            op
            for op in behind
            if math.prod(op.shape) == size
            and self._is_proportional(queries, op)
            and not self._depends(attention.keys, op)
            and not self._depends(attention.values, op)
        ]
        factors = self._factors(queries) or []
        folds = self.folds([queries]) if calls == 1 and all(use.op in alone for use in factors) else ()
        sites = (*self._makers(alone, calls), *self._parts(queries, behind, calls), *self._query_rows(behind))
        return Logits(next(iter(sites), None), folds)

    def _behind(self, queries: Op) -> list[Op]:
        """What queries are made of by linear operations, nearest first."""
        reached: dict[Op, None] = {}
        stack = [queries]
        while stack:
            op = stack.pop()
            if op not in reached:
                reached[op] = None
                if op.name in RESHAPES | PARTS | JOINS | ARITHMETIC and not is_normalizer(op):
                    stack.extend(op.data)
        return sorted(reached, key=lambda op: -op.index)

    def _is_proportional(self, op: Op, to: Op) -> bool:
        """Whether multiplying the output of one operation multiplies that of another."""
        if op is to:
            return True
        if op.index < to.index or is_normalizer(op):
            return False
        if op.name in ("Mul", "Div"):
            numerators = op.data if op.name == "Mul" else [o[0] for o in op.operands[:1] if o is not None]
            return any(self._is_proportional(operand, to) for operand in numerators)
        if op.name not in RESHAPES | PARTS | JOINS | ARITHMETIC or not op.data:
            return False
        if op.name in ARITHMETIC | {"Cat", "Stack"} and len(op.data) < len(op.operands):
            return False  # a constant or a parameter is joined, which would not be multiplied
        return all(self._is_proportional(operand, to) for operand in op.data)

    def _depends(self, op: Op, on: Op) -> bool:
        """Whether one operation's output is made of another's."""
        seen: set[Op] = set()
        stack = [op]
        while stack:
            op = stack.pop()
            if op is on:
                return True
            if op not in seen and op.index > on.index:
                seen.add(op)
                stack.extend(op.data)
        return False

    def _parts(self, queries: Op, behind: list[Op], calls: int) -> Iterator[Site]:
        """Modules that return queries together with keys and values, side by side in their last dimension."""
        taken: dict[Op, set[int]] = defaultdict(set)
        for op in behind:
            for operand, output in filter(None, op.operands):
                taken[operand].add(output)
        for part in behind:
            entries = _entries(part, *taken[part]) if len(taken[part]) == 1 else None
            if entries is None or not self._is_proportional(queries, part):
                continue
            op = part.data[0]
            length = op.shape[-1]
            while True:
                period = None if op.shape[-1] == length else length
                yield from (replace(site, part=entries, period=period) for site in self._makers([op], calls))
                if not _keeps_lots(op, length):
                    break
                op = op.data[0]

    def _query_rows(self, behind: list[Op]) -> Iterator[Site]:
        """The rows of queries in the projection that ``nn.MultiheadAttention`` holds for all three."""
        for op in behind:
            for use in self.graph.matrices(op):
                name, _, attribute = use.parameter.rpartition(".")
                owner = planned_part(self.rehearsal.copy, name)
                if isinstance(owner, nn.MultiheadAttention) and attribute == "in_proj_weight":
                    yield Site(name, "weight", part=(0, owner.embed_dim))

    def folds(self, ends: list[Op]) -> tuple[str, ...]:
        """Parameters whose multiplication multiplies all of the operations and nothing else, empty if there is none.

        Args:
            ends: last operation of a branch in each of its calls.
        """
        # what is read twice, as by a rotation of positions, is used once
        ways: list[set[Op]] = [set() for _ in ends]
        found = [list(dict.fromkeys(self._factors(end, way) or [])) for end, way in zip(ends, ways, strict=True)]
        if any(self._leaves(end, way) for end, way in zip(ends, ways, strict=True)):
            return ()
        names = [tuple(dict.fromkeys(use.parameter for use in uses)) for uses in found]
        together = [use for uses in found for use in uses]
        counts = Counter(use.parameter for use in together)
        alone = all(len(self._uses[use.parameter]) == counts[use.parameter] and use.homogeneous for use in together)
        return names[0] if alone and len(set(names)) == 1 else ()

    def _leaves(self, end: Op, way: set[Op]) -> bool:
        """Whether anything else reads what lies on the way from parameters to the end of a branch."""
        inside = any(reader not in way for op in way if op is not end for reader in self._readers[op])
        return inside or len(self._readers[end]) > 1

    def _factors(self, op: Op, way: set[Op] | None = None) -> list[Use] | None:
        """Uses of parameters that an operation's output is proportional to, taken together.

        Args:
            op: the operation.
            way: is given the operations between the parameters and it.
        """
        way = set() if way is None else way
        way.add(op)
        uses = list(self.graph.uses.get(op.index, ()))
        if self.graph.is_matrix(op) or op.name in NORMS:
            return uses or None
        if is_normalizer(op):
            return None
        if op.name in ("Mul", "Div"):
            for operand in full_factors(op):
                further: set[Op] = set()
                factors = self._factors(operand, further)
                if factors is not None:
                    way |= further
                    return factors
            return uses or None
        if op.name == "Bmm" or op.name.startswith(ATTENTION):
            values = op.operands[1 if op.name == "Bmm" else 2]
            return self._factors(values[0], way) if values is not None else None
        if op.name in ("Add", "Sub") and None in op.operands:
            return None  # a constant is added, which no parameter multiplies
        if op.name in RESHAPES | PARTS | JOINS | ARITHMETIC and op.data:
            parts = [self._factors(operand, way) for operand in op.data]
            return None if None in parts else uses + [use for part in parts for use in part or ()]
        return None

    def _proportional(self, end: Op) -> list[Op]:
        """The end of a branch, and what it is proportional to, as far back as nothing else reads that."""
        chain: list[Op] = []
        op = end
        while len(self._readers[op]) == 1:
            chain.append(op)
            operands = op.data
            if op.name == "Mul" and len(operands) == 2 and not is_normalizer(op):
                # the factor that holds what is written, such as an expert's output beside its weight
                operands = [operand for operand in full_factors(op) if self._factors(operand) is not None]
            if len(operands) != 1 or op.name not in RESHAPES | JOINS | ARITHMETIC - {"Add", "Sub", "Rsub"}:
                break
            op = operands[0]
        return chain

    def _matrix_of(self, call: Call, source: dict[Op, Op]) -> Op | None:
        """The readout matrix that a call of a module is, from its first input to its only output."""
        if len(call.outputs) != 1 or not call.inputs:
            return None
        given = self.graph.by_node.get(call.inputs[0].node)
        made = self.graph.by_node.get(call.outputs[0].node)
        if given is None or made is None:
            return None  # nothing that reaches the loss
        read, made = transparent_source(given), transparent_source(made)
        before_bias = transparent_source(made.data[0]) if made.name == "Add" and len(made.data) == 1 else made
        return next((matrix for matrix in (made, before_bias) if source.get(matrix) is read), None)

    def _lasting_readers(self, source: Op) -> set[Op]:
        """Operations that read another one's output, not counting those that only arrange it."""
        readers = self._readers[source]
        arranged = {reader for reader in readers if transparent_source(reader) is source}
        return (readers - arranged).union(*(self._lasting_readers(reader) for reader in arranged))

    def _makers(self, ops: Iterable[Op], calls: int = 1) -> list[Site]:
        """Modules that are called so many times and return one of the operations' outputs, in the order of ``ops``."""
        return [
            Site(call.module, "output", index)
            for op in ops
            for call, index in self._made_by[op]
            if len(self._calls[call.module]) == calls
        ]

    @cached_property
    def _uses(self) -> dict[str, list[Use]]:
        uses: dict[str, list[Use]] = defaultdict(list)
        for found in self.graph.uses.values():
            for use in found:
                uses[use.parameter].append(use)
        return uses

    @cached_property
    def _readers(self) -> dict[Op, set[Op]]:
        readers: dict[Op, set[Op]] = defaultdict(set)
        for op in self.graph.ops:
            for operand in op.data:
                readers[operand].add(op)
        return readers

    @cached_property
    def _calls(self) -> dict[str, list[Call]]:
        calls: dict[str, list[Call]] = defaultdict(list)
        for call in self.rehearsal.calls:
            calls[call.module].append(call)
        return calls

    @cached_property
    def _made_by(self) -> dict[Op, list[tuple[Call, int | None]]]:
        made: dict[Op, list[tuple[Call, int | None]]] = defaultdict(list)
        for call in self.rehearsal.calls:
            for passed in call.outputs:
                if passed.node in self.graph.by_node:
                    made[self.graph.by_node[passed.node]].append((call, passed.index))
        return made


def _entries(part: Op, output: int) -> tuple[int, int] | None:
    """First and last (exclusive) entry of its operand's last dimension that one output of an operation takes."""
    if len(part.data) != 1:
        return None
    shape = part.data[0].shape
    if any(taken[:-1] != shape[:-1] for taken in part.shapes) or part.shapes[output][-1] == shape[-1]:
        return None
    if part.name in ("Split", "SplitWithSizes"):
        start = sum(taken[-1] for taken in part.shapes[:output])
    elif part.name == "Slice" and getattr(part.node, "_saved_step", None) == 1:
        start = getattr(part.node, "_saved_start", 0) % 2**64
        start = start - 2**64 + shape[-1] if start >= 2**63 else start
    else:
        return None
    return start, start + part.shapes[output][-1]


def _keeps_lots(op: Op, length: int) -> bool:
    """Whether an operation leaves every lot of so many neighbours in the last dimension together, and in order."""
    if len(op.data) != 1:
        return False
    before, after = op.data[0].shape, op.shape
    if op.name in ("View", "UnsafeView", "ReshapeAlias"):
        return bool(before) and before[-1] % length == 0 and after[-1] % length == 0
    if op.name == "Transpose":
        moved = {getattr(op.node, name) % 2**64 for name in ("_saved_dim0", "_saved_dim1")}
        return not moved & {len(after) - 1, 2**64 - 1}
    return op.name in ("Clone", "Alias", "ToCopy")
