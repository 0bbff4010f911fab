"""The table of ``mlu-lightning shape``, and the sentences below it that say what its numbers rest on."""

from __future__ import annotations

from rich.table import Table

from mlu_lightning.shapes.error_bound import ATTENTION, PAPER, ErrorConstants
from mlu_lightning.shapes.search import Candidate

__all__ = ["assumptions", "shape_table"]

_SOURCES = {
    PAPER: "c2 and c3 are the published fit to the paper's experiment (tanh perceptrons, 15 steps), "
    "and c1 was measured in the same experiment.",
    ATTENTION: "c2 was measured with attention of head dimension 4 at L = 8 only; c3 is that of the paper's experiment, "
    "which had perceptrons; c1 is assumed.",
}


def shape_table(
    candidates: list[Candidate], best: Candidate, present: Candidate | None = None, heads: tuple[int, int] | None = None
) -> Table:
    """Tabulate candidates, the best marked; ``heads`` are the dimension of a Transformer's heads and MLP units per head."""
    sizes = ("L", "M units", "D") if heads is None else ("L", "blocks", "M heads", "head_dim", "MLP units", "D")
    table = Table("", *sizes, "parameters", "error", *([] if present is None else ["error / present"]))
    for column in table.columns[1:]:
        column.justify = "right"
    for candidate in candidates:
        mark, style = ("*", "bold") if candidate == best else ("", "")
        table.add_row(mark, *_cells(candidate, present, heads), style=style)
    if present is not None:
        table.add_section()
        table.add_row("present", *_cells(present, present, heads))
    return table


def assumptions(
    constants: ErrorConstants, gain: float, present: Candidate | None = None, heads: tuple[int, int] | None = None
) -> list[str]:
    """Say what the numbers of :func:`shape_table` mean, and what they rest on."""
    numbers = f"c1 = {constants.depth:.3g}, c2 = {constants.hidden:.3g}, c3 = {constants.embedding:.3g}"
    sentences = [
        "error: predicted root mean square difference to the infinite model over coordinates of the residual stream, "
        f"which are of order one: sqrt((c1/L)^2 + c2^2 D/(L M) + c3^2/D) with {numbers}. "
        + _SOURCES.get(constants, "These constants were given."),
        "The bound is for the MLU parameterization, gradient descent and a bounded number of steps (arXiv 2603.18168). It "
        "promises nothing for Adam or longer training, and the error is not the loss.",
        f"* is the best shape where twice the depth is taken only if that lowers the error by {100 * gain:.3g} % or more: "
        "in the bound itself, more depth at the same L M costs nothing.",
        "Each row has the largest M that the parameters allow at its L and D.",
    ]
    if heads is not None:
        sentences.append(
            f"M counts heads, whose dimension stays {heads[0]} at every shape, and each MLP keeps {heads[1]} units for each "
            "head. L counts two additions for each block. The bound treats MLP branches like those of attention."
        )
    if present is not None and present.error >= 1:
        sentences.append(
            f"The present shape's error of {present.error:.2g} is as large as the stream itself: the bound only says "
            "that it is far from the infinite model, and the ratios to it mean little."
        )
    return sentences


def _cells(candidate: Candidate, present: Candidate | None, heads: tuple[int, int] | None) -> list[str]:
    shape = candidate.shape
    sizes = [shape.depth, shape.hidden, shape.embedding]
    if heads is not None:
        sizes[1:2] = [shape.depth // 2, shape.hidden, heads[0], heads[1] * shape.hidden]
    ratio = [] if present is None else [f"{candidate.error / present.error:.3f}"]
    return [*map(str, sizes), f"{candidate.parameters:,}", f"{candidate.error:.3f}", *ratio]
