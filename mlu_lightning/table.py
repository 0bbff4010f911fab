"""The MLU table: what each role of a parameter means for its multiplier, init, learning rate, eps and decay.

The table of theory.md, section 3 (Chizat, arXiv 2509.10167; Chaintron, Chizat, Maass, arXiv 2603.18168) stands here
once, as data. A row says two things about a role, both as powers of ratios to the base shape:

* ``n``: over how many inputs each output sums,
* ``g``: how large the gradient is at one output.

Learning rates, eps and weight decay of every optimizer family follow from ``n`` and ``g``; only the forward multiplier
and the init std are entries of their own. Other parameterizations, to compare with, are what differs from this table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from enum import Enum

__all__ = [
    "TABLE",
    "TABLES",
    "OptimizerFamily",
    "Parameterization",
    "Powers",
    "Ratios",
    "Role",
    "Row",
    "Scale",
    "scale",
]


class Role(str, Enum):
    """What a parameter is for in a residual network (the rows of theory.md, section 3).

    >>> Role("branch_out").in_branch, Role.READOUT.in_branch
    (True, False)
    """

    EMBEDDING = "embedding"
    """Data to stream: token tables, patch and input projections, positions; vectors added to the stem."""
    BRANCH_IN = "branch_in"
    """Stream to hidden units: first matrix of a branch; queries, keys and values of attention."""
    BRANCH_IN_BIAS = "branch_in_bias"
    """Vector with one entry per hidden unit."""
    BRANCH_HIDDEN = "branch_hidden"
    """Hidden units to hidden units inside a branch."""
    BRANCH_OUT = "branch_out"
    """Hidden units to stream: the matrix that writes to the residual addition."""
    BRANCH_OUT_NORMED = "branch_out_normed"
    """The same where a norm comes between it and the addition, which undoes the scale of what it writes."""
    BRANCH_OUT_BIAS = "branch_out_bias"
    """Vector added to the branch's output."""
    BRANCH_NORM = "branch_norm"
    """Gain or bias of a norm, or a layer scale, over stream coordinates inside a branch."""
    BRANCH_BOUNDED = "branch_bounded"
    """Vector of bounded size inside a branch, as the gain of a query-key norm."""
    BRANCH_BOUNDED_MATRIX = "branch_bounded_matrix"
    """Stream to an output of bounded size inside a branch, as the router of a mixture of experts."""
    STREAM_MATRIX = "stream_matrix"
    """Stream to stream outside every branch: stem, downsampling, head transform."""
    STREAM_BOUNDED_MATRIX = "stream_bounded_matrix"
    """Stream to an output of bounded size that is not the last: a head's matrix whose outputs do not grow with D."""
    STREAM_NORM = "stream_norm"
    """Gain or bias of a norm on the stream, outside every branch and before or after all of them."""
    POST_NORM = "post_norm"
    """Gain or bias of a norm on the stream between residual additions (post-norm): L of them compound."""
    READOUT = "readout"
    """Stream to targets."""
    READOUT_BIAS = "readout_bias"
    """Vector over targets."""

    def __str__(self) -> str:
        return self.value

    @property
    def in_branch(self) -> bool:
        """Whether parameters of this role sit inside a residual branch."""
        return self.value.startswith("branch_")

    @property
    def is_matrix(self) -> bool:
        """Whether the role is that of a map between layers rather than of a vector added to or multiplied with one."""
        return self in _MATRICES


class OptimizerFamily(str, Enum):
    """How an optimizer turns a gradient into an update, as far as the table is concerned.

    ``sgd``: the update is proportional to the gradient; decay is added to the gradient.
    ``adam``: the update does not depend on the gradient's size; decay is added to the gradient (L2).
    ``adamw``: as ``adam``, with decoupled decay.
    ``muon``: the update has unit spectral norm; decoupled decay. Roles without a matrix between layers, and embedding
    and readout, have no entry of their own: they are trained by AdamW next to Muon and take AdamW's numbers.

    >>> OptimizerFamily("adamw")
    <OptimizerFamily.ADAMW: 'adamw'>
    """

    SGD = "sgd"
    ADAM = "adam"
    ADAMW = "adamw"
    MUON = "muon"

    def __str__(self) -> str:
        return self.value


class Parameterization(str, Enum):
    """How ratios to the base shape turn into factors: as this package does it, and three others to compare it with.

    ``mlu``: maximal local feature updates (theory.md, section 3).
    ``completep``: CompleteP (Dey et al., arXiv 2505.01618) with depth exponent 1, each matrix by its own number of inputs.
    It is ``mlu`` but for the std of ``branch_out``, and ``mlu`` itself where hidden width and embedding grow alike.
    ``mup``: µP (Yang et al., arXiv 2203.03466), each matrix by its own number of inputs; depth changes nothing.
    ``sp``: the standard parameterization: std by the number of inputs, everything else that of the base.

    >>> Parameterization("mup")
    <Parameterization.MUP: 'mup'>
    """

    MLU = "mlu"
    COMPLETEP = "completep"
    MUP = "mup"
    SP = "sp"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Ratios:
    """Ratios of a parameter's surroundings to those at the base shape.

    Args:
        depth: ratio of the number of residual additions along its stream, l = L/L0.
        inputs: ratio of the number of inputs (d or m; 1 where inputs are data, or for vectors).
        outputs: ratio of the number of outputs (d or m; 1 where outputs are targets or of bounded size).
        active: ratio of the number of experts over whose outputs a mixture of experts averages (1 elsewhere).

    >>> Ratios(depth=2.0).is_identity, Ratios().is_identity
    (False, True)
    """

    depth: float = 1.0
    inputs: float = 1.0
    outputs: float = 1.0
    active: float = 1.0

    @property
    def is_identity(self) -> bool:
        """Whether nothing differs from the base shape."""
        return self == Ratios()


@dataclass(frozen=True)
class Scale:
    """Factors by which to multiply a base run's numbers for one parameter.

    Args:
        multiplier: forward multiplier on what the parameter writes.
        std: factor of the standard deviation at initialization.
        lr: factor of the learning rate.
        eps: factor of the optimizer's eps.
        weight_decay: factor of the weight decay.

    >>> Scale(multiplier=0.5, lr=0.25).folded(OptimizerFamily.ADAMW)
    Scale(multiplier=1.0, std=0.5, lr=0.125, eps=2.0, weight_decay=2.0)
    """

    multiplier: float = 1.0
    std: float = 1.0
    lr: float = 1.0
    eps: float = 1.0
    weight_decay: float = 1.0

    def folded(self, family: OptimizerFamily | str) -> Scale:
        """Numbers for the effective weight, the multiplier a times the stored one, that give the same run.

        std·a, Adam and Muon lr·a, eps/a; SGD lr·a²; decoupled decay/a, decay in the gradient/a² (theory.md, section 3).

        Args:
            family: kind of optimizer, or its name.

        >>> Scale(multiplier=0.5, lr=4.0).folded("sgd").lr, Scale(multiplier=0.5, lr=4.0).folded("adamw").lr
        (1.0, 2.0)
        """
        family = OptimizerFamily(family)
        a = self.multiplier
        in_gradient = family in (OptimizerFamily.SGD, OptimizerFamily.ADAM)
        return Scale(
            multiplier=1.0,
            std=self.std * a,
            lr=self.lr * (a * a if family is OptimizerFamily.SGD else a),
            eps=self.eps / a,
            weight_decay=self.weight_decay / (a * a if in_gradient else a),
        )


@dataclass(frozen=True)
class Powers:
    """A monomial in the ratios of a parameter: exponents of depth, inputs, outputs, outputs/inputs and active experts.

    >>> Powers(depth=-1, outputs=-1)(Ratios(depth=4.0, outputs=2.0))
    0.125
    """

    depth: float = 0
    inputs: float = 0
    outputs: float = 0
    aspect: float = 0
    active: float = 0

    def __call__(self, ratios: Ratios) -> float:
        """Value at the given ratios; exactly 1 at the base shape."""
        aspect = ratios.outputs / ratios.inputs  # exactly 1 where both grow alike
        widths = ratios.inputs**self.inputs * ratios.outputs**self.outputs * aspect**self.aspect
        return float(ratios.depth**self.depth * widths * ratios.active**self.active)


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        n: inputs that each output sums over.
        g: size of the gradient at one output.
        multiplier: forward multiplier.
        std: standard deviation at initialization.
        lr: further factor of the learning rate of every family.
    """

    n: Powers = Powers()
    g: Powers = Powers()
    multiplier: Powers = Powers()
    std: Powers = Powers()
    lr: Powers = Powers()


_MATRICES = frozenset(
    {
        Role.EMBEDDING,
        Role.BRANCH_IN,
        Role.BRANCH_HIDDEN,
        Role.BRANCH_OUT,
        Role.BRANCH_OUT_NORMED,
        Role.BRANCH_BOUNDED_MATRIX,
        Role.STREAM_MATRIX,
        Role.STREAM_BOUNDED_MATRIX,
        Role.READOUT,
    }
)

_SUM = Powers(inputs=1)  # n: every output sums over all inputs
_KEEP = Powers(inputs=-0.5)  # std: outputs keep the size that inputs have
_PER_OUTPUT = Powers(outputs=-1)  # g: 1/d at stream coordinates
_PER_BRANCH_OUTPUT = Powers(depth=-1, outputs=-1, active=-1)  # g: 1/(l·m) at hidden units, 1/(l·d) at coordinates
_PER_BRANCH = Powers(depth=-1)  # g: outputs of bounded size, and what the 1/l of all branches divides

TABLE: dict[Role, Row] = {
    Role.EMBEDDING: Row(g=_PER_OUTPUT),
    Role.BRANCH_IN: Row(n=_SUM, g=_PER_BRANCH_OUTPUT, std=_KEEP),
    Role.BRANCH_IN_BIAS: Row(g=_PER_BRANCH_OUTPUT),
    Role.BRANCH_HIDDEN: Row(n=_SUM, g=_PER_BRANCH_OUTPUT, std=_KEEP),
    Role.BRANCH_OUT: Row(
        n=_SUM,
        g=_PER_BRANCH_OUTPUT,
        multiplier=_PER_BRANCH,
        std=Powers(inputs=-0.5, aspect=0.5),  # sqrt(d)/m
    ),
    # only steps relative to the weight count there, and these are even where outputs keep their size
    Role.BRANCH_OUT_NORMED: Row(n=_SUM, g=_PER_BRANCH_OUTPUT, multiplier=_PER_BRANCH, std=_KEEP),
    Role.BRANCH_OUT_BIAS: Row(g=_PER_BRANCH_OUTPUT, multiplier=_PER_BRANCH),
    Role.BRANCH_NORM: Row(g=_PER_BRANCH_OUTPUT),
    Role.BRANCH_BOUNDED: Row(g=_PER_BRANCH),
    Role.BRANCH_BOUNDED_MATRIX: Row(n=_SUM, g=_PER_BRANCH, std=_KEEP),
    Role.STREAM_MATRIX: Row(n=_SUM, g=_PER_OUTPUT, std=_KEEP),
    Role.STREAM_BOUNDED_MATRIX: Row(n=_SUM, std=Powers(inputs=-1)),  # a readout whose 1/d is folded
    Role.STREAM_NORM: Row(g=_PER_OUTPUT),
    Role.POST_NORM: Row(g=_PER_OUTPUT, lr=_PER_BRANCH),  # L norms of a post-norm stream compound
    Role.READOUT: Row(g=Powers(inputs=-1), multiplier=Powers(inputs=-1)),
    Role.READOUT_BIAS: Row(),
}
"""The table of theory.md, section 3."""


def _without_depth(row: Row) -> Row:
    return Row(**{field.name: replace(getattr(row, field.name), depth=0) for field in fields(row)})


_COMPLETEP = TABLE | {Role.BRANCH_OUT: replace(TABLE[Role.BRANCH_OUT], std=_KEEP)}
_SUMMING = _MATRICES - {Role.EMBEDDING}

TABLES: dict[Parameterization, dict[Role, Row]] = {
    Parameterization.MLU: TABLE,
    Parameterization.COMPLETEP: _COMPLETEP,
    Parameterization.MUP: {role: _without_depth(row) for role, row in _COMPLETEP.items()},
    Parameterization.SP: {role: Row(std=_KEEP if role in _SUMMING else Powers()) for role in Role},
}
"""The table, and those of other parameterizations as what differs from it."""


def scale(
    role: Role,
    ratios: Ratios,
    family: OptimizerFamily | str,
    alpha: float = 1.0,
    parameterization: Parameterization = Parameterization.MLU,
) -> Scale:
    """Look one parameter up in the table.

    With n and g of the role's row: Adam lr 1/n, SGD lr 1/(n·g), Muon lr sqrt(outputs/inputs), eps g; decoupled decay
    1/lr, decay in the gradient 1 over the SGD lr (theory.md, section 3). The richness alpha multiplies branches and
    divides their learning rates by alpha² (SGD) or alpha (Adam, Muon).

    Args:
        role: what the parameter is for.
        ratios: ratios to the base shape.
        family: kind of optimizer, or its name.
        alpha: richness, 1 for MLU; large values tend to a linearized model.
        parameterization: whose table it is looked up in.

    Returns:
        Factors relative to the base, the identity if ``ratios`` are all 1 and ``alpha`` is 1.

    >>> scale(Role.BRANCH_IN, Ratios(depth=2, inputs=4, outputs=8), OptimizerFamily.SGD)
    Scale(multiplier=1.0, std=0.5, lr=4.0, eps=0.0625, weight_decay=0.25)
    """
    family = OptimizerFamily(family)
    row = TABLES[parameterization][role]
    multiplier, std = row.multiplier(ratios), row.std(ratios)
    if parameterization == Parameterization.SP:
        return Scale(multiplier, std)  # optimizers are left as they are
    n, g, extra = row.n(ratios), row.g(ratios), row.lr(ratios)
    sgd_lr = extra / (n * g)
    if family is OptimizerFamily.SGD:
        lr = sgd_lr
    elif family is OptimizerFamily.MUON and role.is_matrix and role not in (Role.EMBEDDING, Role.READOUT):
        # the update has unit spectral norm, and eps bounds the Frobenius norm of an inputs x outputs gradient
        lr = extra * math.sqrt(ratios.outputs / ratios.inputs)
        g *= math.sqrt(ratios.outputs * ratios.inputs)
    else:
        lr = extra / n
    in_gradient = family in (OptimizerFamily.SGD, OptimizerFamily.ADAM)
    decay = 1 / (sgd_lr if in_gradient else lr)
    base = Scale(multiplier, std, lr, g, decay)
    return _enriched(base, role, family, alpha)


def _enriched(base: Scale, role: Role, family: OptimizerFamily, alpha: float) -> Scale:
    """Apply the richness to the parameters of branches."""
    if alpha == 1.0 or not role.in_branch:
        return base
    writes = role in (Role.BRANCH_OUT, Role.BRANCH_OUT_NORMED, Role.BRANCH_OUT_BIAS)
    square = alpha * alpha
    return replace(
        base,
        multiplier=base.multiplier * alpha if writes else base.multiplier,
        lr=base.lr / (square if family is OptimizerFamily.SGD else alpha),
        eps=base.eps * alpha,
        weight_decay=base.weight_decay * (square if family in (OptimizerFamily.SGD, OptimizerFamily.ADAM) else alpha),
    )
