"""``mlu-lightning shape``: the best shapes for a number of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, TypeVar

from mlu_lightning.cli.console import make_console, say
from mlu_lightning.shapes import Architecture, ErrorConstants, Shape, optimal_shape
from mlu_lightning.shapes.ordinary import ordinary_shapes
from mlu_lightning.shapes.search import Candidate, candidate_shapes, depth_exponent
from mlu_lightning.shapes.shape_table import assumptions, shape_table
from mlu_lightning.utilities.fitted_tables import FittedTable

_Value = TypeVar("_Value")

_SIZES = {"transformer": {"vocabulary": 50257, "head_dim": 64, "mlp_ratio": 4}, "resnet": {"inputs": 0, "outputs": 0}}
"""What the parameter count of a model depends on besides its shape, with defaults; the vocabulary is GPT-2's."""


def shape(
    parameters: float,
    model: Literal["transformer", "resnet"] = "transformer",
    present: dict[str, int] | None = None,
    vocabulary: int | None = None,
    head_dim: int | None = None,
    mlp_ratio: int | None = None,
    inputs: int | None = None,
    outputs: int | None = None,
    multiple: int = 64,
    constants: dict[str, float] | None = None,
    gain: float = 0.05,
) -> None:
    """Print shapes that a number of parameters allows, with their predicted error to the infinite model.

    Args:
        parameters: most parameters that the network may have, embedding and readout included, such as 100e6.
        model: transformer (attention and MLP branches in turn) or resnet (perceptron blocks).
        present: shape to compare with, such as '{depth: 24, hidden: 12, embedding: 768}'; depth counts residual
            additions, two for each block of a Transformer, and hidden its heads, or the units of a ResNet's block.
        vocabulary: number of a Transformer's tokens, by default 50257.
        head_dim: dimension of a Transformer's heads, by default 64.
        mlp_ratio: units of a Transformer's MLP over heads * head_dim, by default 4.
        inputs: dimension of a ResNet's data, by default 0: its embedding is not counted.
        outputs: dimension of a ResNet's targets, by default 0: its readout is not counted.
        multiple: number of which the embedding dimension and the units of a ResNet are multiples.
        constants: constants of the error bound, such as '{depth: 1, hidden: 0.8, embedding: 2.5}'; by default those of
            experiments, which are named above the table; the best Transformer is marked only if they are given.
        gain: part by which twice the depth must lower the error to be taken, from 0.01 to below 0.5.
    """
    sizes = _sizes(model, vocabulary=vocabulary, head_dim=head_dim, mlp_ratio=mlp_ratio, inputs=inputs, outputs=outputs)
    heads = None
    if model == "transformer":
        heads = sizes["head_dim"], sizes["mlp_ratio"] * sizes["head_dim"]
        architecture = Architecture.transformer(sizes["vocabulary"], sizes["head_dim"], sizes["mlp_ratio"], multiple)
    else:
        architecture = Architecture.resnet(sizes["inputs"], sizes["outputs"], multiple)
    if constants is not None:
        architecture = replace(architecture, constants=_read(ErrorConstants, "constants", constants))
    compared = None if present is None else architecture.candidate(_read(Shape, "present", present))
    if compared is not None and compared.shape.depth % architecture.multiples.depth:
        raise ValueError(
            f"A Transformer has no depth of {compared.shape.depth}: depth counts residual additions, two for each block. "
            "Give twice the number of blocks."
        )
    exponent, marked = depth_exponent(gain), heads is None or constants is not None
    best: Candidate | None = None
    if heads is None:
        best = optimal_shape(parameters, architecture, gain)
        candidates = candidate_shapes(parameters, architecture, gain)
    else:
        candidates = ordinary_shapes(parameters, architecture, heads[0])
        if marked:
            best = min(candidates, key=lambda candidate: candidate.error * candidate.shape.depth**exponent)
    console, outside = make_console(), f"{architecture.per_coordinate} D are outside branches"
    say(console, f"Shapes of a {model} with up to {parameters:,.0f} parameters, of which {outside}")
    for sentence in assumptions(architecture.constants, gain if marked else None, candidates, compared, heads):
        say(console, sentence)
    console.print(FittedTable(shape_table(candidates, best, compared, heads[1] if heads else 0)))


def _sizes(model: str, **options: int | None) -> dict[str, int]:
    """Sizes of a model besides its shape, those that are not given by default."""
    given = {name: value for name, value in options.items() if value is not None}
    if wrong := [name for name in given if name not in _SIZES[model]]:
        raise ValueError(
            f"--{' and --'.join(wrong)} cannot be used with --model {model}, which has --{', --'.join(_SIZES[model])}. "
            "Leave them out, or choose the other model."
        )
    least = {"inputs": 0, "outputs": 0}
    if wrong := [name for name, value in given.items() if value < least.get(name, 1)]:
        raise ValueError(f"--{wrong[0]} {given[wrong[0]]} should be {least.get(wrong[0], 1)} or more.")
    return _SIZES[model] | given


def _read(kind: Callable[..., _Value], option: str, values: Mapping[str, float]) -> _Value:
    """Build a value from the depth, hidden and embedding that an option gives."""
    if values.keys() != {"depth", "hidden", "embedding"}:
        raise ValueError(
            f"--{option} has {', '.join(values) or 'nothing'}, and should have depth, hidden and embedding: "
            f"--{option} '{{depth: 1, hidden: 2, embedding: 3}}' with your numbers."
        )
    return kind(**values)
