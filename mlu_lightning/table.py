"""The MLU table: what each role of a parameter means for its multiplier, init, learning rate, eps and decay.

The table of theory.md, section 3 (Chizat, arXiv 2509.10167; Chaintron, Chizat, Maass, arXiv 2603.18168), once, as data.
Learning rates, eps and weight decay of every optimizer family follow from two entries of a row, ``n`` and ``g``. Other
parameterizations, to compare with, are what differs from this table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum


class _Name(str, Enum):
    """An enum whose members print as their values."""

    def __str__(self) -> str:
        return str(self.value)


class Role(_Name):
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
    """Gain or bias of a norm on the stream, outside every branch."""
    READOUT = "readout"
    """Stream to targets."""
    READOUT_BIAS = "readout_bias"
    """Vector over targets."""
    FROZEN = "frozen"
    """What is left alone: neither initialized nor scaled, as parts that no loss reaches (metrics, teachers)."""

    @property
    def in_branch(self) -> bool:
        """Whether parameters of this role sit inside a residual branch."""
        return self.value.startswith("branch_")

    @property
    def is_matrix(self) -> bool:
        """Whether the role is that of a map between layers rather than of a vector added to or multiplied with one."""
        return self in _MATRICES


class Variant(_Name):
    """What about a parameter's place changes the row of its role (theory.md, section 3)."""

    BEFORE_NORM = "before_norm"
    """``branch_out`` before a norm that comes between it and the addition, and undoes the scale of what it writes."""
    POST_NORM = "post_norm"
    """``stream_norm`` between residual additions: such norms compound."""
    EVERY_BLOCK = "every_block"
    """``stream_matrix``, or a gain, that the stream goes through beside the branch of every block: these compound, too."""
    OF_BLOCK = "of_block"
    """``embedding``, ``stream_matrix`` and ``stream_norm`` that make something of data for one block, or a few, alone."""
    SUMMED = "summed"
    """What one of several summands is proportional to: of what is added to the stream in every block beside its branch,
    and ``readout`` where readouts at several depths are summed."""
    IN_HEAD = "in_head"
    """``stream_matrix`` after the last addition; where outputs do not grow, any is a ``stream_bounded_matrix``."""


COMPOUNDING = frozenset({Variant.POST_NORM, Variant.EVERY_BLOCK})
COUNTED = COMPOUNDING | {Variant.OF_BLOCK, Variant.SUMMED}
"""Variants whose depth is the number of those along the stream; if it goes through them, they compound."""


def row_name(role: Role, variant: Variant | None) -> str:
    """Name a row of the table, such as ``stream_norm (post_norm)``."""
    return role.value if variant is None else f"{role.value} ({variant.value})"


class OptimizerFamily(_Name):
    """How an optimizer turns a gradient into an update, as far as the table is concerned.

    ``sgd``: the update is proportional to the gradient; decay is added to the gradient. ``adam``: the update does not
    depend on the gradient's size; decay is added to the gradient (L2). ``adamw``: the same with decoupled decay.
    ``muon``: the update has unit spectral norm; decoupled decay. What is no matrix between layers, embeddings and
    readouts are trained by AdamW next to Muon and take AdamW's numbers.

    >>> OptimizerFamily("adamw")
    <OptimizerFamily.ADAMW: 'adamw'>
    """

    SGD = "sgd"
    ADAM = "adam"
    ADAMW = "adamw"
    MUON = "muon"

    @property
    def has_l2_decay(self) -> bool:
        """Whether weight decay is added to the gradient."""
        return self in (OptimizerFamily.SGD, OptimizerFamily.ADAM)


class Parameterization(_Name):
    """How ratios to the base shape turn into factors: maximal local feature updates (``mlu``), and three to compare with.

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


@dataclass(frozen=True)
class Ratios:
    """Ratios of a parameter's surroundings to those at the base shape.

    Args:
        depth: residual additions along its stream, l = L/L0.
        inputs: inputs of its map (d or m; 1 where inputs are data, or for vectors).
        outputs: outputs of its map (d or m; 1 where outputs are targets or of bounded size).
        active: experts over whose outputs a mixture of experts averages (1 elsewhere).
        uses: places along its stream at which it acts, k (1 where it acts at one).

    >>> Ratios(depth=2.0).is_identity
    False
    """

    depth: float = 1.0
    inputs: float = 1.0
    outputs: float = 1.0
    active: float = 1.0
    uses: float = 1.0

    @property
    def is_identity(self) -> bool:
        """Whether nothing differs from the base shape."""
        return self == Ratios()


@dataclass(frozen=True)
class Scale:
    """Factors by which to multiply a base run's numbers for one parameter.

    Args:
        multiplier: forward multiplier on what the parameter writes.
        std: standard deviation at initialization.
        lr: learning rate.
        eps: the optimizer's eps.
        weight_decay: weight decay.

    >>> Scale(multiplier=0.5, lr=0.25).folded("adamw")
    Scale(multiplier=1.0, std=0.5, lr=0.125, eps=2.0, weight_decay=2.0)
    """

    multiplier: float = 1.0
    std: float = 1.0
    lr: float = 1.0
    eps: float = 1.0
    weight_decay: float = 1.0

    def folded(self, family: OptimizerFamily | str) -> Scale:
        """Return the numbers for the effective weight, the multiplier a times the stored one, that give the same run.

        std·a, Adam and Muon lr·a, eps/a; SGD lr·a²; decoupled decay/a, decay in the gradient/a² (theory.md, section 3).
        """
        family, a = OptimizerFamily(family), self.multiplier
        lr = self.lr * (a * a if family is OptimizerFamily.SGD else a)
        decay = self.weight_decay / (a * a if family.has_l2_decay else a)
        return Scale(1.0, self.std * a, lr, self.eps / a, decay)

    def enriched(self, role: Role, family: OptimizerFamily, alpha: float) -> Scale:
        """Return the numbers at richness alpha, which concerns the parameters of branches (theory.md, section 3)."""
        if not role.in_branch:
            return self
        multiplier = self.multiplier * (alpha if role in (Role.BRANCH_OUT, Role.BRANCH_OUT_BIAS) else 1.0)
        lr = self.lr / (alpha * alpha if family is OptimizerFamily.SGD else alpha)
        decay = self.weight_decay * (alpha * alpha if family.has_l2_decay else alpha)
        return Scale(multiplier, self.std, lr, self.eps * alpha, decay)


@dataclass(frozen=True)
class Powers:
    """A monomial in the ratios of a parameter: exponents of its ratios, and of outputs/inputs."""

    depth: float = 0
    inputs: float = 0
    outputs: float = 0
    aspect: float = 0
    active: float = 0
    uses: float = 0

    def __call__(self, ratios: Ratios) -> float:
        """Return the value at the given ratios; exactly 1 at the base shape."""
        aspect = ratios.outputs / ratios.inputs  # exactly 1 where both grow alike
        widths = ratios.inputs**self.inputs * ratios.outputs**self.outputs * aspect**self.aspect
        along_depth = ratios.depth**self.depth * ratios.uses**self.uses
        return float(along_depth * widths * ratios.active**self.active)


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    n: Powers = Powers()  # inputs that each output sums over
    g: Powers = Powers()  # size of the gradient at one output, summed over uses along the depth, which are coherent
    multiplier: Powers = Powers()  # in the forward pass
    std: Powers = Powers()  # at initialization
    lr: Powers = Powers()  # further factor of the learning rate of every family
    spectral: bool = False  # whether Muon's update of unit spectral norm has its own rule, lr sqrt(outputs/inputs)

    @property
    def powers(self) -> tuple[Powers, ...]:
        """All of its powers."""
        return self.n, self.g, self.multiplier, self.std, self.lr


@dataclass(frozen=True)
class Table:
    """The rows of one parameterization."""

    rows: Mapping[Role, Row]
    variants: Mapping[tuple[Role, Variant], Row]  # that take the place of those
    # if not, optimizers that look at shapes or sizes of weights themselves (Muon, Adafactor) are left alone, too
    scales_optimizer: bool = True
    scales_logits: bool = True  # whether attention logits are kept proportional to 1/head_dim

    def row(self, role: Role, variant: Variant | None, ratios: Ratios) -> Row:
        """Return the row of a parameter."""
        if role is Role.STREAM_MATRIX and variant in (None, Variant.IN_HEAD) and ratios.outputs == 1.0:
            role = Role.STREAM_BOUNDED_MATRIX  # with a random sum over D, gradients there would be of d^(-1/2)
        return self.rows[role] if variant is None else self.variants.get((role, variant), self.rows[role])


_SUM = Powers(inputs=1)  # n: every output sums over all inputs
_KEEP = Powers(inputs=-0.5)  # std: outputs keep the size that inputs have
_PER_USE = Powers(uses=1)  # g: k at outputs that do not grow, such as targets
_PER_OUTPUT = Powers(outputs=-1, uses=1)  # g: k/d at stream coordinates
_PER_BRANCH_OUTPUT = Powers(depth=-1, outputs=-1, active=-1, uses=1)  # g: k/(l·m) at units, k/(l·d) on the stream
_PER_BRANCH_BOUNDED = Powers(depth=-1, uses=1)  # g: k/l at outputs of bounded size
_PER_DEPTH = Powers(depth=-1)  # multiplier of branches, and lr of norms that compound

# what is under the 1/n of a sum, folded into the parameter
_SUMMED_VECTOR = Row(g=_PER_OUTPUT, std=_PER_DEPTH, lr=_PER_DEPTH)
_READOUT = Row(g=Powers(inputs=-1, uses=1), multiplier=Powers(inputs=-1))
_READOUT_OF_BLOCK = replace(_READOUT, g=Powers(depth=-1, inputs=-1, uses=1))

_BRANCH_IN = Row(n=_SUM, g=_PER_BRANCH_OUTPUT, std=_KEEP, spectral=True)
_BRANCH_VECTOR = Row(g=_PER_BRANCH_OUTPUT)
_BRANCH_OUT = replace(_BRANCH_IN, multiplier=_PER_DEPTH, std=Powers(inputs=-0.5, aspect=0.5))  # std: sqrt(d)/m
_BRANCH_OUT_BEFORE_NORM = replace(_BRANCH_OUT, std=_KEEP)  # only steps relative to the weight count there

_MLU = Table(
    rows={
        # data as large as the base's count once, and sinusoids of D entries as a stream
        Role.EMBEDDING: Row(n=_SUM, g=_PER_OUTPUT, std=_KEEP),
        Role.BRANCH_IN: _BRANCH_IN,
        Role.BRANCH_IN_BIAS: _BRANCH_VECTOR,
        Role.BRANCH_HIDDEN: _BRANCH_IN,
        Role.BRANCH_OUT: _BRANCH_OUT,
        Role.BRANCH_OUT_BIAS: Row(g=_PER_BRANCH_OUTPUT, multiplier=_PER_DEPTH),
        Role.BRANCH_NORM: _BRANCH_VECTOR,
        Role.BRANCH_BOUNDED: Row(g=_PER_BRANCH_BOUNDED),
        Role.BRANCH_BOUNDED_MATRIX: Row(n=_SUM, g=_PER_BRANCH_BOUNDED, std=_KEEP, spectral=True),
        Role.STREAM_MATRIX: Row(n=_SUM, g=_PER_OUTPUT, std=_KEEP, spectral=True),
        # a readout whose 1/d is folded
        Role.STREAM_BOUNDED_MATRIX: Row(n=_SUM, g=_PER_USE, std=Powers(inputs=-1), spectral=True),
        Role.STREAM_NORM: Row(g=_PER_OUTPUT),
        Role.READOUT: _READOUT,
        Role.READOUT_BIAS: Row(g=_PER_USE),
        Role.FROZEN: Row(),
    },
    variants={
        (Role.BRANCH_OUT, Variant.BEFORE_NORM): _BRANCH_OUT_BEFORE_NORM,
        **{(Role.STREAM_NORM, variant): Row(g=_PER_OUTPUT, lr=_PER_DEPTH) for variant in COMPOUNDING},
        (Role.EMBEDDING, Variant.OF_BLOCK): replace(_BRANCH_IN, spectral=False),
        (Role.STREAM_NORM, Variant.OF_BLOCK): _BRANCH_VECTOR,
        (Role.STREAM_MATRIX, Variant.OF_BLOCK): _BRANCH_IN,
        (Role.READOUT, Variant.OF_BLOCK): _READOUT_OF_BLOCK,
        (Role.READOUT_BIAS, Variant.OF_BLOCK): Row(g=_PER_BRANCH_BOUNDED),
        **{(role, Variant.SUMMED): _SUMMED_VECTOR for role in (Role.EMBEDDING, Role.STREAM_NORM)},
        (Role.STREAM_MATRIX, Variant.SUMMED): replace(
            _SUMMED_VECTOR, n=_SUM, std=Powers(depth=-1, inputs=-0.5), spectral=True
        ),
        (Role.READOUT, Variant.SUMMED): replace(_READOUT_OF_BLOCK, multiplier=Powers(depth=-1, inputs=-1)),
        (Role.READOUT_BIAS, Variant.SUMMED): replace(_SUMMED_VECTOR, g=_PER_USE),
        (Role.STREAM_MATRIX, Variant.EVERY_BLOCK): Row(n=_SUM, g=_PER_OUTPUT, std=_KEEP, lr=_PER_DEPTH, spectral=True),
    },
)
_MATRICES = frozenset({role for role, row in _MLU.rows.items() if row.n == _SUM} | {Role.READOUT})
_COMPLETEP = replace(_MLU, rows={**_MLU.rows, Role.BRANCH_OUT: _BRANCH_OUT_BEFORE_NORM})


def _without_depth(row: Row) -> Row:
    n, g, multiplier, std, lr = (replace(power, depth=0, uses=0) for power in row.powers)
    return Row(n, g, multiplier, std, lr, row.spectral)


TABLES: Mapping[Parameterization, Table] = {
    Parameterization.MLU: _MLU,
    Parameterization.COMPLETEP: _COMPLETEP,
    Parameterization.MUP: replace(
        _COMPLETEP,
        rows={role: _without_depth(row) for role, row in _COMPLETEP.rows.items()},
        variants={key: _without_depth(row) for key, row in _COMPLETEP.variants.items()},
    ),
    Parameterization.SP: Table(
        {role: Row(std=_KEEP if role in _MATRICES else Powers()) for role in Role},
        {},
        scales_optimizer=False,
        scales_logits=False,
    ),
}
"""The table of theory.md, section 3, and those of other parameterizations as what differs from it."""


def scale(
    role: Role,
    ratios: Ratios,
    family: OptimizerFamily | str,
    alpha: float = 1.0,
    parameterization: Parameterization = Parameterization.MLU,
    variant: Variant | None = None,
) -> Scale:
    """Look one parameter up in the table; everything is 1 where all ratios and the richness are.

    With n and g of the parameter's row: Adam lr 1/n, SGD lr 1/(n·g), Muon lr sqrt(outputs/inputs), eps g; decoupled
    decay 1/lr, decay in the gradient 1 over the SGD lr (theory.md, section 3). The richness alpha multiplies branches and
    divides their learning rates by alpha² (SGD) or alpha (Adam, Muon).

    Args:
        role: what the parameter is for.
        ratios: ratios to the base shape.
        family: kind of optimizer, or its name.
        alpha: richness, 1 for MLU; large values tend to a linearized model.
        parameterization: whose table it is looked up in.
        variant: what about the parameter's place changes its row.

    >>> scale(Role.BRANCH_IN, Ratios(depth=2, inputs=4, outputs=8), OptimizerFamily.SGD)
    Scale(multiplier=1.0, std=0.5, lr=4.0, eps=0.0625, weight_decay=0.25)
    """
    family = OptimizerFamily(family)
    row = TABLES[parameterization].row(role, variant, ratios)
    n, g, extra = row.n(ratios), row.g(ratios), row.lr(ratios)
    sgd_lr = extra / (n * g)
    if family is OptimizerFamily.SGD:
        lr = sgd_lr
    elif family is OptimizerFamily.MUON and row.spectral:
        # the update has unit spectral norm, and eps bounds the Frobenius norm of an inputs x outputs gradient
        lr = extra * math.sqrt(ratios.outputs / ratios.inputs)
        g *= math.sqrt(ratios.outputs * ratios.inputs)
    else:
        lr = extra / n
    decay = 1 / (sgd_lr if family.has_l2_decay else lr)
    found = Scale(row.multiplier(ratios), row.std(ratios), lr, g, decay)
    return found if alpha == 1.0 else found.enriched(role, family, alpha)
