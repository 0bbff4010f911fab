"""What discovery finds in a module: streams, branches, and the place and role of every parameter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mlu_lightning.table import Role, Variant, row_name

__all__ = ["Branch", "BranchKind", "Logits", "ParameterFacts", "Readout", "Site", "Stream", "Structure", "Tap"]

BranchKind = Literal["attention", "convolution", "mlp"]


@dataclass(frozen=True)
class Site:
    """A place in a module's forward pass where a multiplier can be attached as a hook.

    Args:
        module: name of the submodule, as in ``named_modules()``.
        where: its ``"output"``, its (first) ``"input"``, or the ``"weight"`` and bias that it holds itself.
        index: position of the tensor if the output is a tuple or list, else None.
        part: first and last (exclusive) entry to be multiplied, of an output's last dimension or a weight's rows, if
            not all of them are.
        period: entries after which ``part`` comes again, as where each head's queries, keys and values lie together.

    >>> print(Site("layers.0.attention", "output", 0))
    layers.0.attention output[0]
    >>> print(Site("layers.0.attention", "weight", part=(0, 64)))
    layers.0.attention weight, entries 0 to 64
    """

    module: str
    where: Literal["output", "input", "weight"] = "output"
    index: int | None = None
    part: tuple[int, int] | None = None
    period: int | None = None

    def __str__(self) -> str:
        index = "" if self.index is None else f"[{self.index}]"
        part = "" if self.part is None else f", entries {self.part[0]} to {self.part[1]}"
        part += "" if self.period is None else f" of every {self.period}"
        return f"{self.module or '(module itself)'} {self.where}{index}{part}"


@dataclass(frozen=True)
class ParameterFacts:
    """Where one parameter sits.

    Args:
        name: as in ``named_parameters()``.
        role: row of the table, None if it could not be placed.
        shape: its shape.
        fan_in: number of inputs of the map (units; kernel sizes do not count); 1 for vectors. Units of experts whose
            outputs are summed count in all experts that a token is sent to, here and in ``fan_out``.
        fan_out: number of outputs of the map; entries of a vector.
        branch: index into ``Structure.branches``, None outside branches.
        stream: index into ``Structure.streams``.
        transposed: whether it is stored [inputs, outputs], the other way round than ``nn.Linear`` stores it.
        head_dim: size of an attention head where inputs (W_O) or outputs (W_Q, W_K, W_V) are heads, else 1.
        tied: whether it is also the readout.
        active: number of experts over whose outputs a mixture of experts averages, for parameters of experts; else 1.
        variant: what about its place changes the row of its role.
    """

    name: str
    role: Role | None
    shape: tuple[int, ...]
    fan_in: int
    fan_out: int
    branch: int | None = None
    stream: int = 0
    transposed: bool = False
    head_dim: int = 1
    tied: bool = False
    active: int = 1
    variant: Variant | None = None

    @property
    def row(self) -> str | None:
        """Name of its row of the table, None without a role."""
        return None if self.role is None else row_name(self.role, self.variant)


@dataclass(frozen=True)
class Branch:
    """One residual branch: what is added to a stream.

    Args:
        name: longest module name that its parameters share, such as ``layers.3.mlp``.
        kind: ``"attention"``, ``"convolution"`` or ``"mlp"``.
        hidden: hidden width M: heads of an attention block, inputs of the last matrix otherwise, in all experts that a
            token is sent to.
        stream: index into ``Structure.streams``.
        position: place along the stream, from 0; parallel branches of one addition share it.
        parameters: names of its parameters.
        site: where a hook can multiply the branch, None if no module's output is the branch.
        folds: parameters whose multiplication multiplies the branch, empty if there are none.
        head_dim: size of an attention head, None for other kinds.
        logits: where attention logits can be multiplied, None for other kinds.
        logits_scale: what the module itself multiplies the sum of products of queries and keys by, such as
            1/sqrt(head_dim); None for other kinds, and where it cannot be read.
    """

    name: str
    kind: BranchKind
    hidden: int
    stream: int
    position: int
    parameters: tuple[str, ...]
    site: Site | None = None
    folds: tuple[str, ...] = ()
    head_dim: int | None = None
    logits: Logits | None = None
    logits_scale: float | None = None


@dataclass(frozen=True)
class Logits:
    """How the logits of an attention branch can be multiplied: through the queries, after their norm if they have one.

    A norm undoes what multiplies its input, so that with query-key norm the size of the queries' projection does not
    matter, and only what comes after the norm can be multiplied: its output, or its gain.

    Args:
        site: module whose output the queries are, None if there is none of their own.
        folds: parameters that queries are proportional to, and neither keys nor values: weight and bias of their
            projection, or the gain of their norm; empty if there are none.
    """

    site: Site | None = None
    folds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stream:
    """A residual stream.

    Args:
        depth: number of positions at which branches are added, L.
        embedding: its dimension, D (the last one, where it changes along the way).
    """

    depth: int
    embedding: int


@dataclass(frozen=True)
class Readout:
    """A map from a stream to targets.

    Args:
        parameter: name of its matrix.
        stream: index into ``Structure.streams`` of the stream it reads.
        site: where a hook can multiply it without its bias, None if there is no such place.
        folds: its matrix, empty if that is tied to an embedding.
        fan_in: inputs of the map, D.
    """

    parameter: str
    stream: int
    site: Site | None
    folds: tuple[str, ...]
    fan_in: int


@dataclass(frozen=True)
class Tap:
    """Where a stream, an output or pre-activations can be read in a forward pass: at the first call of a submodule.

    The stream after a residual addition is the sum itself, or, if no submodule is given or returns that, what a norm or
    activation makes of it before the next branch reads it. A readout's output is that with its bias. Pre-activations are
    what enters the first nonlinearity of a branch, or the logits of its attention.

    Args:
        reads: ``"stream"``, ``"readout"``, or, where a stream cannot be read after an addition, the ``"branch"`` es that
            the addition adds to it; ``"units"`` or ``"logits"`` of a branch.
        number: index into ``Structure.streams``, ``Structure.readouts`` or, for pre-activations, ``Structure.branches``.
        position: residual additions before it, from 0 to the stream's depth; 0 for a readout.
        module: name of the submodule, as in ``named_modules()``.
        where: its ``"output"``, after all hooks, or its ``"input"``, before any hook; of a function inside of it the same.
        index: position of the tensor if the output is a tuple, list or mapping, None if it is a bare tensor; for an
            input its number among all tensors that the submodule is given, positional ones first; of a function the
            number of calls of it before.
        axis: of the stream's coordinates, the targets, the units or the keys: -1 where that is the last one, 1 for
            channels of an image.
        function: name of the torch function inside of the submodule that is given pre-activations or returns them,
            ``"attention"`` for logits; None where the submodule itself is.

    >>> print(Tap("units", 0, 3, "blocks.3", "input", 0, -1, "gelu"))
    units 0 after 3 additions: blocks.3 gelu input[0]
    >>> print(Tap("stream", 0, 3, "blocks.3", "input", 0, -1))
    stream 0 after 3 additions: blocks.3 input[0]
    """

    reads: Literal["stream", "branch", "readout", "units", "logits"]
    number: int
    position: int
    module: str
    where: Literal["output", "input"]
    index: int | None
    axis: int
    function: str | None = None

    def __str__(self) -> str:
        after = f" after {self.position} additions" if self.reads != "readout" else ""
        index = "" if self.index is None else f"[{self.index}]"
        function = "" if self.function is None else f"{self.function} "
        return f"{self.reads} {self.number}{after}: {self.module or '(module itself)'} {function}{self.where}{index}"


@dataclass(frozen=True)
class Structure:
    """Streams, branches and parameter roles of a module.

    Args:
        parameters: facts by parameter name, in the order of ``named_parameters()``.
        branches: residual branches in order of execution.
        streams: residual streams; the first is the one that reaches the loss last.
        readouts: maps to targets.
        taps: where streams and outputs can be read: streams by number and position, then readouts. A place that no
            submodule is given or returns has none.
        features: where pre-activations of branches can be read; none of experts, and of what no submodule has.
        unassigned: parameters without a role, and what was found around them.
        warnings: what the theory does not cover in this module.
    """

    parameters: dict[str, ParameterFacts]
    branches: tuple[Branch, ...]
    streams: tuple[Stream, ...]
    readouts: tuple[Readout, ...] = ()
    taps: tuple[Tap, ...] = ()
    features: tuple[Tap, ...] = ()
    unassigned: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def roles(self) -> dict[str, Role]:
        """Role of every parameter that has one, by name."""
        return {name: facts.role for name, facts in self.parameters.items() if facts.role is not None}

    @property
    def depth(self) -> int:
        """Residual additions along the first stream, L."""
        return self.streams[0].depth

    @property
    def embedding(self) -> int:
        """Dimension of the first stream, D."""
        return self.streams[0].embedding
