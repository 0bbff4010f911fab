"""The role of a parameter inside a residual branch, from what lies around each of its uses."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from mlu_lightning.discovery.attention import Attention, find_attention
from mlu_lightning.discovery.axes import is_depthwise
from mlu_lightning.discovery.experts import Experts, find_experts
from mlu_lightning.discovery.graph import ATTENTION, CONVOLUTIONS, NONLINEAR, Graph, Op, Use
from mlu_lightning.discovery.outer_roles import BIAS_ROLES, Placed, Unplaced
from mlu_lightning.discovery.recurrence import feeds_back, is_recurrent
from mlu_lightning.discovery.residual import BranchRegion
from mlu_lightning.discovery.structure import BranchKind
from mlu_lightning.discovery.traversal import Ancestry, between, descendants
from mlu_lightning.discovery.units import Units
from mlu_lightning.table import Role, Variant


@dataclass(frozen=True)
class BranchRoles:
    """Roles inside one residual branch."""

    graph: Graph
    region: BranchRegion

    def place(self, use: Use) -> Placed | Unplaced:
        """Role of a parameter at one use."""
        op = use.op
        if use.kind == "matrix":
            role = self._matrix_role(op, use)
            after = (o for o in self._writing_path if o.is_normalizer or o.name in NONLINEAR)
            undone = role is Role.BRANCH_OUT and any(self._matrices_before.precedes(op, o) for o in after)
            return Placed(role, Variant.BEFORE_NORM if undone else None)
        if use.kind == "bias":
            role = self._matrix_role(op, use)
            return Placed(BIAS_ROLES.get(role, role))  # that of a depthwise kernel is a vector's, too
        if use.kind == "lookup":
            return self._place_table(use)
        if self.is_recurrent:
            return self._place_in_recurrence(use)
        if op in self._around_attention and op not in self._writing_path and self._matrices_before.of(op):
            return self._place_in_attention(use)
        size = math.prod(use.selected)
        if use.kind == "add" and op in self._biased:
            return Placed(BIAS_ROLES[self._matrix_role(self._biased[op])])
        if size > 1 == math.prod(use.shape):
            return Placed(Role.BRANCH_BOUNDED)  # a number that is made of it
        if size != max(use.selected, default=1):
            return self._place_several_axes(use)
        # at D = 1, where the matrix that writes has one output, the gain of a norm has one entry, too
        if size == 1 and not (use.shape and self.embedding == 1 and not self._matrices_before.of(op)):
            return Placed(Role.BRANCH_BOUNDED)
        if op in self._writing_path:
            return Placed(Role.BRANCH_OUT_BIAS if use.kind == "add" else Role.BRANCH_NORM)
        if not self._matrices_before.of(op):
            return Placed(Role.BRANCH_NORM)
        source = op.data[0].source if op.data else op
        if use.kind == "add" and self.graph.is_matrix(source):
            return Placed(BIAS_ROLES[self._matrix_role(source)])
        if size in self._sizes:
            return Placed(Role.BRANCH_IN_BIAS)
        return Unplaced(
            f"it is a vector of {size} entries between matrices of a branch, none of which has as many units"
        )

    def _place_several_axes(self, use: Use) -> Placed | Unplaced:
        """Role of a vector for each of several time steps, channels or parts."""
        sizes = self._sizes
        before = self._matrices_before.of(use.op) and use.op not in self._writing_path
        if before and math.prod(use.shape) in sizes:
            return Placed(Role.BRANCH_IN_BIAS, outputs=math.prod(use.shape))  # heads times entries of a head
        of_units = [size for size in use.shape[::-1] if size > 1 and (size in sizes or not sizes)]
        if not of_units:
            return Unplaced(f"it enters {use.op.name} with shape {list(use.shape)}")
        return Placed(
            Role.BRANCH_NORM if not before or of_units[0] == self.embedding else Role.BRANCH_IN_BIAS,
            outputs=of_units[0],
        )

    @cached_property
    def embedding(self) -> int | None:
        """Outputs of the matrix that writes, None if there is none."""
        return self.graph.matrices(self.writers[-1])[0].fans[1] if self.writers else None

    @cached_property
    def matrices(self) -> tuple[Op, ...]:
        """Operations with a parameter matrix, in order."""
        return tuple(op for op in self.region.ops if self.graph.is_matrix(op))

    @cached_property
    def _sizes(self) -> frozenset[int]:
        return frozenset(size for op in self.matrices for matrix in self.graph.matrices(op) for size in matrix.fans)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its matrices, or of all its parameters if there are none, in order of use."""
        uses = (use.parameter for op in self.region.ops for use in self.graph.uses.get(op, ()) if use.kind != "penalty")
        return self.matrix_names or tuple(uses)

    @property
    def matrix_names(self) -> tuple[str, ...]:
        """Names of the parameters that are matrices, in order of use."""
        return tuple(use.parameter for op in self.matrices for use in self.graph.matrices(op))

    @property
    def writer_names(self) -> tuple[str, ...]:
        """Names of the parameters that write to the addition."""
        return tuple(use.parameter for op in self.writers for use in self.graph.matrices(op))

    @cached_property
    def writers(self) -> tuple[Op, ...]:
        """Matrices that write to the addition: nothing but linear operations, norms and depthwise kernels lies between.

        If there are none, those before a nonlinearity that ends the branch.
        """
        return tuple(op for op in self.matrices if op in self._writing_path and not is_depthwise(self.graph, op))

    @cached_property
    def is_recurrent(self) -> bool:
        """Whether the branch computes a state from token to token."""
        return is_recurrent(self.graph, self.region.ops)

    @cached_property
    def units(self) -> Units:
        """The hidden units of the branch."""
        return Units(self.graph, self.region.ops, self.writers, self._weights_of_experts)

    @cached_property
    def attention(self) -> Attention | None:
        """The attention in the branch, if there is any and it has no state that goes from token to token."""
        if self.is_recurrent:
            return None
        found = find_attention(self.region.ops, self.graph, self._weights_of_experts)
        if found is None or found.path or not self.writers:
            return found
        return replace(found, value_dim=self.units.entries // self.units.number)

    @property
    def head_dim(self) -> int | None:
        """Size of an attention head, or entries of a recurrent unit's state."""
        if self.is_recurrent:
            return self.units.entries // self.units.number * self.units.compared
        return None if self.attention is None else self.attention.key_dim

    @cached_property
    def kind(self) -> BranchKind:
        """What kind of block the branch is."""
        if self.attention is not None:
            return "attention"
        if not self.matrices:
            return "mixing"
        if self.is_recurrent:
            return "recurrence"
        kernels = (self.graph.matrices(op)[0].shape[2:] for op in self.matrices if op.name in CONVOLUTIONS)
        return "convolution" if any(math.prod(kernel) > 1 for kernel in kernels) else "mlp"

    @cached_property
    def hidden(self) -> int:
        """Hidden width M: inputs of the matrix that writes, in heads for attention and recurrences."""
        if not self.matrices:
            return 1
        if self.is_recurrent:
            return self.units.number
        last = (self.writers or self.matrices)[-1]
        inputs = self.graph.matrices(last)[0].fans[is_depthwise(self.graph, last)] * (
            self.active if self.is_expert(last) else 1
        )
        return inputs // self.attention.value_dim if self.attention is not None and self.heads_write else inputs

    @cached_property
    def heads(self) -> Units:
        """The heads of an attention, which are the hidden units where what they make is read by the last matrices."""
        read = tuple(op for op in self.matrices if not self._after_attention.isdisjoint(op.data))
        return self.units if self.heads_write or not read else replace(self.units, writers=read)

    @cached_property
    def heads_write(self) -> bool:
        """Whether what the heads of an attention make is what the last matrices read."""
        return any(operand in self._after_attention for op in self.writers for operand in op.data)

    @cached_property
    def _after_attention(self) -> set[Op]:
        """Operations that read what an attention makes, up to the next matrices."""
        plain = (op for op in self.region.ops if not self.graph.is_matrix(op))
        return set() if self.attention is None else descendants(plain, [self.attention.output])

    @cached_property
    def _around_attention(self) -> set[Op]:
        """Operations from the projections to the matrix that reads what the heads make."""
        found = self.attention
        if found is None:
            return set()
        members = frozenset(self.region.ops)
        before, _ = between(
            (found.queries, found.keys, found.values, *found.path),
            lambda op: op not in members or self.graph.is_matrix(op),
        )
        return self._after_attention.union(before)

    @cached_property
    def experts(self) -> Experts | None:
        """The experts in the branch, if it is a mixture of experts."""
        return find_experts(self.graph, self.region.ops)

    @property
    def active(self) -> int:
        """Number of experts that a token is sent to; 1 if there are none, or it cannot be read."""
        return 1 if self.experts is None else self.experts.active or 1

    def is_expert(self, op: Op) -> bool:
        """Whether an operation is a matrix of an expert, or looks up its bias."""
        return self.experts is not None and not self.experts.ops.isdisjoint((op, self._biased.get(op)))

    @property
    def _weights_of_experts(self) -> frozenset[Op]:
        return frozenset() if self.experts is None else frozenset(self.experts.weights)

    def _matrix_role(self, op: Op, use: Use | None = None) -> Role:
        router = None if self.experts is None else self.experts.router
        if op is router:
            return Role.BRANCH_BOUNDED_MATRIX
        if op in self.writers:
            return Role.BRANCH_OUT
        if self.is_recurrent:
            return self._role_in_recurrence(op, self.graph.uses[op][0] if use is None else use)
        if self._matrices_before.of(op) - {router}:
            return Role.BRANCH_HIDDEN
        feeds = any(self._matrices_before.precedes(op, other) for other in self.matrices)
        # gates of what is written have as many outputs, one for each coordinate
        wide = self.graph.matrices(op)[0].fans[1] == self.embedding != 1
        return Role.BRANCH_IN if feeds or wide or is_depthwise(self.graph, op) else Role.BRANCH_BOUNDED_MATRIX

    def _role_in_recurrence(self, op: Op, use: Use) -> Role:
        """Role of a matrix where a state goes from token to token, which shared keys and the like are written to (B, C)."""
        if is_depthwise(self.graph, op):
            return Role.BRANCH_IN_BIAS if self._matrices_before.of(op) else Role.BRANCH_NORM
        if self._feeds_back(use):
            return Role.BRANCH_HIDDEN
        if self.units.are_compared(op) and not self.units.rows(op):
            return Role.BRANCH_BOUNDED_MATRIX
        return Role.BRANCH_HIDDEN if self._mixing_before(op) else Role.BRANCH_IN

    def _feeds_back(self, use: Use) -> bool:
        """Whether a matrix, or the bias of one, is applied to the state of a recurrent layer or cell."""
        weights = self.graph.matrices(use.op)
        if use.op.is_recurrent_layer:  # of the input and of the state in turn
            return use in weights[1::2]
        return any(weight.parameter in self._feeding_back for weight in weights)

    def _place_in_recurrence(self, use: Use) -> Placed | Unplaced:
        """Role of a vector, or a table of numbers for each unit, where a state goes from token to token."""
        if use.op in self._writing_path:
            return Placed(Role.BRANCH_OUT_BIAS if use.kind == "add" else Role.BRANCH_NORM)
        if not self._matrices_before.of(use.op):
            return Placed(Role.BRANCH_NORM)
        if use.op.name == "Add" and self.graph.is_matrix(use.op.data[0].source):
            return Placed(BIAS_ROLES[self._matrix_role(use.op.data[0].source)])
        if self.units.own(use):
            return Placed(Role.BRANCH_IN_BIAS)
        size = math.prod(use.selected)
        return (
            Placed(Role.BRANCH_IN_BIAS, outputs=size)
            if self._is_summed_over(use.op, size)
            else Placed(Role.BRANCH_BOUNDED)
        )

    def _is_summed_over(self, op: Op, size: int) -> bool:
        """Whether the next matrix sums over the entries of a vector, as over those of a stream inside of a branch."""
        plain = (o for o in self.region.ops if not self.graph.is_matrix(o))
        made = descendants(plain, [op])
        read = (m for m in self.matrices if not made.isdisjoint(m.data))
        return size > 1 and any(self.graph.matrices(m)[0].fans[0] == size for m in read)

    def _mixing_before(self, op: Op) -> bool:
        """Whether a matrix, which is no kernel of each channel by itself, comes before another one."""
        return any(not is_depthwise(self.graph, other) for other in self._matrices_before.of(op))

    @cached_property
    def _feeding_back(self) -> frozenset[str]:
        return feeds_back(self.graph, self.region.ops)

    def _place_table(self, use: Use) -> Placed:
        """Role of a table that is looked up, or of one of positions that is added to what each block reads."""
        if use.op.parameter is not None:  # such as what a kernel is computed from, with a state for each coordinate
            outputs = next((size for size in use.shape[::-1] if size in self._sizes), use.shape[-1])
            return Placed(Role.BRANCH_NORM, outputs=outputs)
        matrix = self._biased.get(use.op)
        if matrix is not None:
            return Placed(BIAS_ROLES[self._matrix_role(matrix)])
        if self.attention is not None:
            # one number for each head, as in relative position biases, or coordinates of keys
            per_head = use.shape[-1] == 1 if self.hidden == 1 else self.heads.own(use)
            return Placed(Role.BRANCH_IN_BIAS if per_head else Role.BRANCH_BOUNDED)
        # vectors that are written, as a memory's values, or go on to matrices
        return Placed(Role.BRANCH_OUT_BIAS if use.op in self._writing_path else Role.BRANCH_IN_BIAS)

    def _place_in_attention(self, use: Use) -> Placed | Unplaced:
        """Role of a vector or table between the projections of an attention: for each head, or shared by all heads."""
        op, size = use.op, math.prod(use.selected)
        if use.kind == "add" and op in self._biased:
            return Placed(BIAS_ROLES[self._matrix_role(self._biased[op])])
        if op.name == "Add" and self.graph.is_matrix(op.data[0].source):
            return Placed(BIAS_ROLES[self._matrix_role(op.data[0].source)])
        own = self.heads.own(use) if self.hidden > 1 else size > 1 and not self._is_in_heads(op)
        return Placed(Role.BRANCH_IN_BIAS if own else Role.BRANCH_BOUNDED)

    def _is_in_heads(self, op: Op) -> bool:
        """Whether units have been split into heads, which one head alone does not show in the size of the last axis."""
        assert self.attention is not None
        split: list[Op] = []
        while op.data and not self.graph.is_matrix(op):
            split.append(op)
            op = op.data[0]
        key_dim, tokens = self.attention.key_dim, math.prod(op.shape[:-1])
        return any(o.shape[-1:] == (key_dim,) and (math.prod(o.shape[:-1]) > tokens or o.shape[-2] == 1) for o in split)

    @cached_property
    def _biased(self) -> dict[Op, Op]:
        """The matrix of experts to whose output biases of experts are added, by the lookup of these or the addition."""
        found: dict[Op, Op] = {}
        for op in self.region.ops if self.experts is not None else ():
            sources = [operand.source for operand in op.data]
            matrices = [source for source in sources if self.experts and source in self.experts.ops]
            if op.name == "Add" and len(matrices) == 1:
                tables = [source for source in sources if "lookup" in self.graph.kinds(source)]
                found |= dict.fromkeys(tables or [op], matrices[0])
        return found

    @cached_property
    def _matrices_before(self) -> Ancestry:
        maps = (op for op in self.region.ops if self.graph.kinds(op) & {"matrix", "lookup"})
        return Ancestry(self.graph, self.region.ops, maps)

    @cached_property
    def _writing_path(self) -> frozenset[Op]:
        """Operations from the last matrices on, those included; with a nonlinearity only if the branch ends in one."""
        linear = self._back_from_end(NONLINEAR)
        looked_up = any("lookup" in self.graph.kinds(op) for op in linear)
        if not looked_up and all(is_depthwise(self.graph, op) for op in linear if self.graph.is_matrix(op)):
            return self._back_from_end(frozenset())
        return linear

    def _back_from_end(self, without: frozenset[str]) -> frozenset[Op]:
        members = set(self.region.ops)

        def operands(op: Op) -> tuple[Op, ...]:
            if op.name.startswith(ATTENTION):
                return tuple(operand[0] for operand in op.operands[2:3] if operand is not None)
            if self.graph.is_matrix(op) and not is_depthwise(self.graph, op):
                return ()
            return op.full_factors if op.name == "Mul" else op.data

        def stops(op: Op) -> bool:
            return op not in members or op.name in without or op.is_recurrent_layer

        ops, _ = between([self.region.end], stops, operands)
        return frozenset(ops)
