"""Find where a multiplier can go: on a module's output, as a hook, or into parameters."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from torch import nn

from mlu_lightning.discovery.attention import Attention
from mlu_lightning.discovery.graph import (
    ARITHMETIC,
    ATTENTION,
    JOINS,
    LINEAR,
    NORMS,
    POOLS,
    RESHAPES,
    VIEWS,
    Graph,
    Op,
    Use,
)
from mlu_lightning.discovery.structure import Logits, Site
from mlu_lightning.discovery.trace import ModuleCall, Trace
from mlu_lightning.discovery.traversal import in_order, walk_back
from mlu_lightning.utilities.names import planned_part

_HOMOGENEOUS = POOLS | {"Relu", "LeakyRelu"}
"""Nonlinear operations that a positive factor goes through."""
_PASSES = RESHAPES | JOINS | _HOMOGENEOUS | {"Mul", "Div", "Bmm", "Select", "Slice"}


@dataclass(frozen=True)
class MultiplierSites:
    """Sites and parameters for multipliers in a traced module."""

    trace: Trace
    graph: Graph
    within: frozenset[Op]  # operations of branches
    known: dict[Op, tuple[list[Use], set[Op]] | None] = field(default_factory=dict)  # what parameters make each of

    def branch(self, ends: list[Op], name: str, owner: str) -> Site | None:
        """A module whose output is a branch in each of its calls: of its name, or the owner of the matrix that writes."""
        found = self._common([[*self._sites_before(end, len(ends))] for end in ends])
        return min(found, key=lambda site: (site.module != name, site.module != owner, len(site.module)), default=None)

    def _sites_before(self, end: Op, calls: int) -> Iterator[Site]:
        """Modules that return what the end of a branch is proportional to, alone or beside what gates it."""
        yield from self._output_sites(self._proportional(end), calls)
        linear = walk_back([end], lambda op: op.data if op.name in LINEAR and op in self.within else ())
        yield from self._parts(end, [op for op in in_order(linear)[::-1] if op.name in LINEAR], calls)
        gated = (op for op in linear if op.name == "Glu" and op.shape[:-1] == op.data[0].shape[:-1])
        for op in filter(partial(self._is_proportional, end), gated):
            yield from (replace(site, part=(0, op.shape[-1])) for site in self._output_sites(op.data, calls))

    def readout(self, matrices: list[Op]) -> Site | None:
        """A site to multiply what a readout matrix reads in all its uses, so that its bias is not multiplied."""
        if not all(matrix.data for matrix in matrices):
            return None
        source = {matrix: matrix.data[0].source for matrix in matrices}
        for name, calls in self._calls.items():
            reads = [self._matrix_of(call, source) for call in calls]
            if len(reads) == len(matrices) and None not in reads:
                return Site(name, "input")
        # a tied table is used without a module of its own: multiply what makes its input, if nothing else reads that
        if any(self._lasting_users(source[matrix]) != {matrix} for matrix in matrices):
            return None
        return next(self._common([self._output_sites([op], len(matrices)) for op in source.values()]), None)

    def gains(self, matrices: list[Op]) -> tuple[str, ...]:
        """Parameters of norms that are all of the size of what readout matrices read, and of nothing else."""
        reads, found = [matrix.data[0] for matrix in matrices if matrix.data], list[Op]()
        for read in reads:
            behind = walk_back([read], lambda op: () if op.name in NORMS or self.graph.uses.get(op) else op.data)
            ends = [op for op in behind if op.name in NORMS or self.graph.uses.get(op)]
            if len(ends) != 1 or not self._is_proportional(read, ends[0]):
                return ()
            found += ends
        after = [*walk_back(found, lambda op: () if op in matrices else self.graph.users[op])]
        alone = len(reads) == len(matrices) and all(self.graph.users[op] or op in matrices for op in after)
        return self.folds([*dict.fromkeys(found)]) if alone else ()

    def logits(self, attention: Attention, calls: int) -> Logits:
        """Where the queries of an attention in the first call can be multiplied: after a norm, which would undo it."""
        queries = attention.queries
        # what queries are made of by linear operations, nearest first
        linear = walk_back([queries], lambda op: op.data if op.name in LINEAR and not op.is_normalizer else ())
        behind = in_order(linear)[::-1]
        since, size = behind[-1].index, math.prod(queries.shape)
        # what keys or values are made of, as far back as queries are
        others = set(walk_back((attention.keys, attention.values), lambda op: op.data if op.index > since else ()))
        own = (op for op in behind if math.prod(op.shape) == size and op not in others)
        alone = [op for op in own if self._is_proportional(queries, op)]
        factors, _ = self._factors(queries) or ([], set())
        folds = self.folds([queries]) if calls == 1 and all(use.op in alone for use in factors) else ()
        sites = (*self._output_sites(alone, calls), *self._parts(queries, behind, calls), *self._query_rows(behind))
        return Logits(next(iter(sites), None), folds)

    def folds(self, ends: list[Op]) -> tuple[str, ...]:
        """Parameters whose multiplication multiplies the ends of all calls and nothing else, empty if there is none."""
        found = [factors for factors in map(self._factors, ends) if factors is not None]
        users = self.graph.users
        inner = ((op, path) for end, (_, path) in zip(ends, found, strict=False) for op in path if op is not end)
        if len(found) < len(ends) or any(len(users[end]) > 1 for end in ends):
            return ()
        if any(user not in path for op, path in inner for user in users[op]):
            return ()  # something else reads what lies between the parameters and the end of the branch
        # what is read twice, as by a rotation of positions, is used once
        together = [use for uses, _ in found for use in dict.fromkeys(uses) if not use.is_carried]
        counts, total = Counter(use.parameter for use in together), self.graph.uses_of
        alone = all(len(total[use.parameter]) == counts[use.parameter] and use.homogeneous for use in together)
        return tuple(counts) if alone else ()

    def _is_proportional(self, op: Op, to: Op) -> bool:
        if op is to:
            return True
        if op.index < to.index or op.is_normalizer:
            return False
        if op.name in ("Mul", "Div"):
            numerators = op.data if op.name == "Mul" else [o[0] for o in op.operands[:1] if o is not None]
            return any(self._is_proportional(operand, to) for operand in numerators)
        if op.name not in LINEAR or not op.data:
            return False
        if op.name in ARITHMETIC | {"Cat", "Stack"} and len(op.data) < len(op.operands):
            return False  # a constant or a parameter is joined, which would not be multiplied
        return all(self._is_proportional(operand, to) for operand in op.data)

    def _parts(self, queries: Op, behind: Sequence[Op], calls: int) -> Iterator[Site]:
        """Modules that return queries and keys, or what is written and its gates, side by side in their last dimension."""
        outputs: dict[Op, set[int]] = defaultdict(set)
        for operand, output in (value for op in behind for value in op.values):
            outputs[operand].add(output)
        for part in behind:
            entries = _entries(part, *outputs[part]) if len(outputs[part]) == 1 else None
            if entries is None or not self._is_proportional(queries, part):
                continue
            row = [part.data[0]]
            length = row[0].shape[-1]
            while _keeps_rows(row[-1], length):
                row += row[-1].data
            for op in row:
                period = None if op.shape[-1] == length else length
                yield from (replace(site, part=entries, period=period) for site in self._output_sites([op], calls))

    def _query_rows(self, behind: Iterable[Op]) -> Iterator[Site]:
        """The rows of queries in the projection that ``nn.MultiheadAttention`` holds for all three."""
        for op in behind:
            for use in self.graph.matrices(op):
                name, _, attribute = use.parameter.rpartition(".")
                owner = planned_part(self.trace.copy, name)
                if isinstance(owner, nn.MultiheadAttention) and attribute == "in_proj_weight":
                    yield Site(name, "weight", part=(0, owner.embed_dim))

    def _factors(self, op: Op) -> tuple[list[Use], set[Op]] | None:
        """Uses of parameters that an output is proportional to, taken together, and the operations from them to it."""
        if op not in self.known:
            self.known[op] = self._found_factors(op)
        return self.known[op]

    def _found_factors(self, op: Op) -> tuple[list[Use], set[Op]] | None:
        uses, operands = list(self.graph.uses.get(op, ())), op.data
        if self.graph.is_matrix(op) or op.name in NORMS:
            return (uses, {op}) if uses and not op.is_recurrent_layer else None
        if op.is_normalizer:
            return None
        if op.name in ("Mul", "Div"):
            factor = next(filter(None, map(self._factors, self._factors_within(op))), None)
            if factor is not None:
                return factor[0], factor[1] | {op}
            return (uses, {op}) if uses else None
        if op.name == "Bmm" or op.name.startswith(ATTENTION):
            # values, or what weighs them
            read = [op.operands[slot] for slot in ((1, 0) if op.name == "Bmm" else (2,))]
            factors = (self._factors(operand[0]) for operand in read if operand is not None)
            product = next(filter(None, factors), None)
            return None if product is None else (product[0], product[1] | {op})
        if op.name not in LINEAR | _HOMOGENEOUS or (op.name in ("Add", "Sub") and None in op.operands):
            return None  # a constant is added, which no parameter multiplies
        parts = [part for part in map(self._factors, operands) if part is not None]
        if not parts or len(parts) < len(operands):
            return None
        return uses + [use for part, _ in parts for use in part], {op}.union(*(path for _, path in parts))

    def _factors_within(self, op: Op) -> tuple[Op, ...]:
        """Data that an operation multiplies: in a branch what is made there, and not what that is multiplied with."""
        inside = tuple(operand for operand in op.full_factors if operand.source in self.within)
        return inside if op in self.within and inside else op.full_factors

    def _proportional(self, end: Op) -> list[Op]:
        """The end of a branch, and what all of it is proportional to, as far back as nothing else reads that."""
        chain: list[Op] = []
        inside, ways = set[Op](), {end}
        while ways:
            op = max(ways, key=lambda way: way.index)
            users = self.graph.users[op]
            if len(users) > 1 if op is end else not inside.issuperset(users):
                break
            if len(ways) == 1:
                chain.append(op)
            operands = op.data
            if op.name == "Mul" and len(operands) == 2 and not op.is_normalizer:
                # the factor that holds what is written, such as an expert's output beside its weight
                operands = tuple(operand for operand in self._factors_within(op) if self._factors(operand) is not None)
                operands = operands if len(operands) == 1 else ()
            if op.name == "Bmm" and len(operands) == 2 and self._factors(operands[1]) is None:
                operands = operands[:1] if self._factors(operands[0]) is not None else ()
            sums = op.name in ("Add", "Sub") and None not in op.operands
            alone = len(operands) == 1 and op.name in _PASSES
            alone = alone and not (op.name in JOINS and self.graph.uses.get(op))  # a parameter takes some of the places
            if not (sums or alone):
                break
            inside.add(op)
            ways = (ways - {op}) | set(operands)
        return chain

    def _matrix_of(self, call: ModuleCall, source: dict[Op, Op]) -> Op | None:
        """The readout matrix that a call of a module is, from its first input to its only output."""
        if len(call.outputs) != 1 or not call.inputs:
            return None
        found = [op.source for _, (op, _) in self.graph.values((call.inputs[0], call.outputs[0]))]
        if len(found) < 2:
            return None  # nothing that reaches the loss
        read, written = found
        adds_bias = written.name == "Add" and len(written.data) == 1
        before_bias = written.data[0].source if adds_bias else written
        return next((matrix for matrix in (written, before_bias) if source.get(matrix) is read), None)

    def _lasting_users(self, source: Op) -> set[Op]:
        """Operations that read another one's output, not counting those that only arrange it."""
        users = set(self.graph.users[source])
        arranged = {user for user in users if user.source is source}
        return (users - arranged).union(*(self._lasting_users(user) for user in arranged))

    def _output_sites(self, ops: Iterable[Op], calls: int = 1) -> list[Site]:
        """Outputs of modules with that number of calls that are one of the operations', in the order of ``ops``."""
        returned = (value for op in ops for value in self._returned[op])
        return [Site(name, "output", index) for name, index in returned if len(self._calls[name]) == calls]

    @staticmethod
    def _common(sites: list[list[Site]]) -> Iterator[Site]:
        return (site for site in sites[0] if all(site in others for others in sites))

    @cached_property
    def _calls(self) -> dict[str, list[ModuleCall]]:
        """Calls by module, without those that no loss depends on, as of a forward pass for a metric."""
        calls: dict[str, list[ModuleCall]] = defaultdict(list)
        for call in self.trace.calls:
            if any(self.graph.values(call.outputs)):
                calls[call.module].append(call)
        return calls

    @cached_property
    def _returned(self) -> dict[Op, list[tuple[str, int | None]]]:
        """Modules that return an operation's output, and do not read it before, with the position among what they return."""
        returned: dict[Op, list[tuple[str, int | None]]] = defaultdict(list)
        for call in self.trace.calls:
            values = [*self.graph.values(call.outputs)]
            last = max((op.node._sequence_nr() for _, (op, _) in values if op.operands), default=0)
            for index, (op, _) in values:
                if all(user.node._sequence_nr() > last for user in self.graph.users[op]):
                    returned[op].append((call.module, index))
        return returned


def _entries(part: Op, output: int) -> tuple[int, int] | None:
    """First and last (exclusive) entry of its operand's last dimension that one output of an operation takes."""
    if len(part.data) != 1:
        return None
    shape = part.data[0].shape
    if any(other[:-1] != shape[:-1] for other in part.shapes) or part.shapes[output][-1] == shape[-1]:
        return None
    if part.name in ("Split", "SplitWithSizes"):
        start = sum(other[-1] for other in part.shapes[:output])
    elif part.name == "Slice" and getattr(part.node, "_saved_step", None) == 1:
        # autograd shows negative numbers as unsigned ones
        start = (getattr(part.node, "_saved_start", 0) + shape[-1]) % 2**64 % shape[-1]
    else:
        return None
    return start, start + part.shapes[output][-1]


def _keeps_rows(op: Op, length: int) -> bool:
    """Whether an operation keeps every run of ``length`` neighbours in the last dimension together, and in order."""
    if len(op.data) != 1:
        return False
    before, after = op.data[0].shape, op.shape
    if op.name in VIEWS:
        return bool(before) and before[-1] % length == 0 and after[-1] % length == 0
    if op.name == "Transpose":
        moved = {getattr(op.node, name) % 2**64 for name in ("_saved_dim0", "_saved_dim1")}
        return not moved & {len(after) - 1, 2**64 - 1}
    return op.name in ("Clone", "Alias", "ToCopy")
