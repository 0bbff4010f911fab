"""The table of ``mlu-lightning shape``, and the sentences above it that state its assumptions."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from mlu_lightning.shapes.error_bound import ATTENTION, PAPER, ErrorConstants
from mlu_lightning.shapes.ordinary import ASPECTS, WIDTHS
from mlu_lightning.shapes.search import Candidate

_SOURCES = {
    PAPER: "c2 and c3 are the published fit to the paper's experiment (tanh perceptrons, 15 steps), "
    "and c1 was measured in the same experiment.",
    ATTENTION: "c1 and c2 were measured with attention of head dimension 4, c2 at L = 8 only; c3 could not be had from such "
    "measurements (recipes/aspect) and is that of the paper's experiment, which had perceptrons.",
}


def shape_table(
    candidates: Sequence[Candidate], best: Candidate | None, present: Candidate | None = None, units_per_head: int = 0
) -> Table:
    """Tabulate candidates, the best marked; a Transformer has so many MLP units for each head."""
    sizes = ("blocks", "M heads", "MLP units", "D") if units_per_head else ("L", "M units", "D")
    table = Table("", *sizes, "parameters", "error", *([] if present is None else ["error / present"]))
    for column in table.columns[1:]:
        column.justify = "right"
    for candidate in candidates:
        mark, style = ("*", "bold") if candidate == best else ("", "")
        table.add_row(mark, *_cells(candidate, present, units_per_head), style=style)
    if present is not None:
        table.add_section()
        table.add_row("present", *_cells(present, present, units_per_head))
    return table


def assumptions(
    constants: ErrorConstants,
    gain: float | None,
    candidates: Sequence[Candidate],
    present: Candidate | None = None,
    heads: tuple[int, int] | None = None,
) -> list[str]:
    """Say what the numbers of :func:`shape_table` mean, and what they rest on; without a gain no shape is marked."""
    numbers = f"c1 = {constants.depth:.3g}, c2 = {constants.hidden:.3g}, c3 = {constants.embedding:.3g}"
    sentences = [
        "error: predicted root mean square difference to the infinite model over coordinates of the residual stream, "
        f"which are of order one: sqrt((c1/L)^2 + c2^2 D/(L M) + c3^2/D) with {numbers}. "
        + _SOURCES.get(constants, "These constants were given."),
        "The bound is for the MLU parameterization, gradient descent and a bounded number of steps (arXiv 2603.18168). It "
        "promises nothing for Adam or longer training, and the error is not the loss.",
    ]
    if heads is None:
        sentences.append("Each row has the largest M that the parameters allow at its L and D.")
    else:
        sentences += [
            f"M counts heads, of dimension {heads[0]} at every shape, and each MLP has {heads[1]} units for each head. "
            "L is twice the number of blocks. The bound treats MLP branches like those of attention.",
            f"Each row is the largest of its aspect: D / blocks of {', '.join(map(str, ASPECTS))} (SmolLM 135M has 19, "
            "GPT-2 XL 33, Llama 2 70B 102, GPT-3 128; the loss hardly changes between such shapes, arXiv 2001.08361), and "
            f"heads * head_dim / D of {' or '.join(map(str, WIDTHS))} (GPT-2, GPT-3 and Llama have 1, Qwen3 0.6B 2). The "
            "bound alone would take few blocks of very many heads, which nobody builds.",
        ]
    if gain is None:
        sentences.append(
            "No shape is marked as the best, because not all constants were measured with Transformers. Measure them "
            "(fit_error_bound) and give --constants, to have one marked."
        )
    else:
        sentences.append(
            f"* is the best {'shape' if heads is None else 'row'} where twice the depth is taken only if that lowers the "
            f"error by {100 * gain:.3g} % or more: in the bound itself, more depth at the same L M costs nothing."
        )
    if all(candidate.error >= 1 for candidate in candidates):
        sentences.append(
            "All errors are as large as the stream itself: the bound only says that these shapes are far from the infinite "
            "model, and little about which is better."
        )
    elif present is not None and present.error >= 1:
        sentences.append(
            f"The present shape's error of {present.error:.2g} is as large as the stream itself: the bound only says "
            "that it is far from the infinite model, and the ratios to it mean little."
        )
    return sentences


def _cells(candidate: Candidate, present: Candidate | None, units_per_head: int) -> list[str]:
    shape = candidate.shape
    sizes = [shape.depth, shape.hidden, shape.embedding]
    if units_per_head:
        sizes = [shape.depth // 2, shape.hidden, units_per_head * shape.hidden, shape.embedding]
    ratio = [] if present is None else [f"{candidate.error / present.error:.3f}"]
    return [*map(str, sizes), f"{candidate.parameters:,}", f"{candidate.error:.3f}", *ratio]
