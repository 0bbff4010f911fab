"""What discovery finds in a module: streams, branches, and the place and role of every parameter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mlu_lightning.table import Role, Variant, row_name

BranchKind = Literal["attention", "convolution", "mlp", "recurrence", "mixing"]
"""What a branch does; ``"mixing"`` has no matrix, as pooling or a Fourier transform over tokens."""


@dataclass(frozen=True)
class Site:
    """A place in a module's forward pass where a multiplier can be attached as a hook.

    Args:
        module: name of the submodule, as in ``named_modules()``.
        where: its ``"output"``, its (first) ``"input"``, or the ``"weight"`` and bias that it holds itself.
        index: position of the tensor if the output is a tuple or list, else None.
        part: first and last (exclusive) entry to multiply, of the last dimension or a weight's rows; None for all.
        period: entries after which ``part`` comes again, as where each head's queries, keys and values lie together.

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


Along = Literal["outputs", "inputs", "bounded"]


@dataclass(frozen=True)
class WeightFunction:
    """What a module makes of parameters before it meets data, such as weight norm."""

    name: str  # for messages
    entries: str | None = None  # parameter whose entries make those of the weight, None if there is none
    degree: int | None = None  # 1 if the weight is proportional to it, 0 if its size does not matter, None otherwise
    gain: str | None = None  # another parameter, which multiplies it
    along: Along = "outputs"  # what each entry of the gain multiplies
    sizes: tuple[tuple[str, float], ...] = ()  # root mean squares, as built: of the weight (""), and of parameters
    problem: str | None = None  # why it cannot be planned, None if it can be

    def size(self, name: str = "") -> float:
        """Root mean square of the weight, or of a parameter."""
        return dict(self.sizes)[name]


@dataclass(frozen=True)
class ParameterFacts:
    """Where one parameter sits."""

    name: str  # as in ``named_parameters()``
    role: Role | None  # row of the table, None if it could not be placed
    shape: tuple[int, ...]
    fan_in: int  # inputs of the map (units; kernel sizes do not count), 1 for vectors
    # outputs of the map, entries of a vector; units of summed experts count in all that a token is sent to, as in fan_in
    fan_out: int
    branch: int | None = None  # index into ``Structure.branches``, None outside branches
    stream: int = 0  # index into ``Structure.streams``
    transposed: bool = False  # whether it is stored [inputs, outputs], the other way round than ``nn.Linear`` stores it
    head_dim: int = 1  # size of an attention head where inputs (W_O) or outputs (W_Q, W_K, W_V) are heads, else 1
    tied: bool = False  # whether it is also the readout
    mixed: bool = False  # whether some of its rows make what units share, which ``fan_out`` does not count
    active: int = 1  # experts over whose outputs a mixture averages, for parameters of experts; else 1
    uses: int = 1  # places along its stream at which it acts
    # what the module itself multiplies by what it makes, but for what a branch or readout has; None if that cannot be told
    constant: float | None = None
    variant: Variant | None = None  # what about its place changes the row of its role
    function: WeightFunction | None = None  # that it goes through before it meets data
    repeats: int | None = None  # norms, or gains and matrices beside branches, that the stream goes through
    likely: Role | None = None  # of one that could not be placed

    @property
    def row(self) -> str | None:
        """Name of its row of the table, None without a role."""
        return None if self.role is None else row_name(self.role, self.variant)


@dataclass(frozen=True)
class Branch:
    """One residual branch: what is added to a stream."""

    name: str  # longest module name that its parameters share
    kind: BranchKind
    # M: heads of attention, or inputs of the last matrix, in all experts that a token is sent to; D if there is none
    hidden: int
    stream: int  # index into ``Structure.streams``
    position: int  # along the stream, from 0; parallel branches of one addition share it
    parameters: tuple[str, ...]
    site: Site | None = None  # where a hook can multiply the branch, None if no module's output is the branch
    folds: tuple[str, ...] = ()  # parameters whose multiplication multiplies the branch, empty if there are none
    constant: float | None = None  # what the module itself multiplies it by, next to its stream; None if calls differ
    head_dim: int | None = None  # size of an attention head, entries of a recurrent unit's state; None for other kinds
    logits: Logits | None = None  # where attention logits can be multiplied, None for other kinds
    logits_scale: float | None = None  # the module's own, such as 1/sqrt(head_dim); None if it cannot be read


@dataclass(frozen=True)
class Logits:
    """How the logits of an attention branch can be multiplied: through the queries, after their norm if they have one."""

    site: Site | None = None  # module whose output the queries are, None if there is none of their own
    folds: tuple[str, ...] = ()  # parameters that queries, and neither keys nor values, are proportional to


@dataclass(frozen=True)
class Stream:
    """A residual stream."""

    depth: int  # positions at which branches are added, L
    embedding: int  # dimension, D; the last one, where it changes along the way


@dataclass(frozen=True)
class Readout:
    """A map from a stream to targets."""

    parameter: str  # name of its matrix
    stream: int  # index into ``Structure.streams`` of the stream that it reads
    site: Site | None  # where a hook can multiply it without its bias, None if there is no such place
    folds: tuple[str, ...]  # its matrix, empty if that is tied to an embedding
    fan_in: int  # inputs of the map, D
    constant: float | None = None  # what the module itself multiplies its inputs and outputs by; None if uses differ
    gains: tuple[str, ...] = ()  # of a tied one: gain and bias of a norm that makes what it reads, and nothing else


@dataclass(frozen=True)
class Tap:
    """Where a stream, an output or pre-activations can be read in a forward pass: at the first call of a submodule.

    The stream after a residual addition is the sum itself, or, if no submodule is given or returns that, what a norm or
    activation makes of it before the next branch reads it. A readout's output is that with its bias. Pre-activations are
    what enters the first nonlinearity of a branch, or the logits of its attention.

    Args:
        reads: ``"stream"``; ``"branch"``, each that an addition adds, if the stream cannot be read after it; or others.
        number: index into ``Structure.streams``, ``Structure.readouts`` or, for pre-activations, ``Structure.branches``.
        position: residual additions before it, from 0 to the stream's depth; 0 for a readout.
        module: name of the submodule, as in ``named_modules()``.
        where: its ``"output"``, after all hooks, or its ``"input"``, before any hook; of a function inside of it the same.
        index: position in a tuple, list or mapping that is returned, None of a bare tensor; number among all tensors that
            are given, positional ones first; of a function, its calls before this one.
        axis: axis of the coordinates, targets, units or keys: -1 where that is the last one, 1 for channels of an image.
        function: torch function in the submodule that reads or returns pre-activations, ``"attention"`` for logits.
        constants: what the module multiplies a readout's output by afterwards, such as 1/sqrt(D); what is read has them.

    >>> print(Tap("units", 0, 3, "blocks.3", "input", 0, -1, "gelu"))
    units 0 after 3 additions: blocks.3 gelu input[0]
    """

    reads: Literal["stream", "branch", "readout", "units", "logits"]
    number: int
    position: int
    module: str
    where: Literal["output", "input"]
    index: int | None
    axis: int
    function: str | None = None
    constants: tuple[float, ...] = ()

    def __str__(self) -> str:
        after = f" after {self.position} additions" if self.reads != "readout" else ""
        index = "" if self.index is None else f"[{self.index}]"
        function = "" if self.function is None else f"{self.function} "
        return f"{self.reads} {self.number}{after}: {self.module or '(module itself)'} {function}{self.where}{index}"


@dataclass(frozen=True)
class Structure:
    """Streams, branches and parameter roles of a module."""

    parameters: dict[str, ParameterFacts]  # by name, in the order of ``named_parameters()``
    branches: tuple[Branch, ...]  # in order of execution
    streams: tuple[Stream, ...]  # the first is the one that reaches the loss last
    readouts: tuple[Readout, ...] = ()
    taps: tuple[Tap, ...] = ()  # of streams by number and position, then of readouts, where a submodule has them
    features: tuple[Tap, ...] = ()  # of pre-activations and logits of branches, where a submodule has them
    unassigned: dict[str, str] = field(default_factory=dict)  # parameters without a role, and what is around them
    warnings: tuple[str, ...] = ()  # what the theory does not cover in this module
    copies: dict[str, str] = field(default_factory=dict)  # submodules that are copies of others, which come second
    # what is added to streams beside branches and no parameter multiplies alone: number, times constants of the module
    additions: float = 0.0

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
