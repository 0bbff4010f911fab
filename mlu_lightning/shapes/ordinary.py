"""Shapes of Transformers that people build, from deep to wide, for a number of parameters."""

from __future__ import annotations

import math
import sys
from bisect import bisect_right

from mlu_lightning.shapes.error_bound import Shape
from mlu_lightning.shapes.search import Architecture, Candidate

ASPECTS = (20, 32, 64, 128)
"""Embedding dimension over blocks: SmolLM 135M has 19, GPT-2 XL 33, Llama 2 70B 102, GPT-3 128."""
WIDTHS = (1, 2)  # heads * head_dim over the embedding dimension: 1 in GPT-2, GPT-3 and Llama, 2 in Qwen3 0.6B


def ordinary_shapes(parameters: float, architecture: Architecture, head_dim: int) -> list[Candidate]:
    """List the largest Transformer of each aspect and width, widest first, or refuse too few parameters."""
    step = math.lcm(architecture.multiples.embedding, head_dim)
    found = []
    for aspect in ASPECTS:
        for width in WIDTHS:

            def shape(i: int, aspect: int = aspect, width: int = width) -> Shape:
                embedding = step * i
                return Shape(2 * max(1, round(embedding / aspect)), width * embedding // head_dim, embedding)

            most = 0 if parameters == math.inf else int(parameters) // (architecture.per_coordinate * step)
            most = min(most, sys.maxsize)
            fitting = bisect_right(range(1, most + 1), parameters, key=lambda i: architecture.parameters(shape(i)))
            if fitting:
                found.append(shape(fitting))
    if not found:
        smallest = Shape(2, step // head_dim, step)
        raise ValueError(
            f"With parameters={parameters:g} there is no shape: the smallest allowed one, {smallest}, has "
            f"{architecture.parameters(smallest):,} parameters. Allow as many, or smaller multiples."
        )
    return [architecture.candidate(shape) for shape in sorted(set(found), key=lambda s: (s.depth, s.hidden))]
