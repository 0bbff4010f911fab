"""Figures of a page can be read: nothing stands on anything else, and every axis has a name and a few ticks."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from helpers.check_reports import failing_report
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlu_lightning.reporting.curves import panel_figure

POWERS = [2**number for number in range(12)]
WIDE = [0, *POWERS, 100_000]
PANELS: dict[str, tuple[int, Sequence[int], Sequence[float], bool]] = {
    "one curve": (1, POWERS, [0.3] * 12, True),
    "one point": (1, [7], [0.3], True),
    "a narrow range": (2, POWERS, [0.30 + 0.002 * i for i in range(12)], True),
    "an octave": (3, POWERS, [0.1 + 0.01 * i for i in range(12)], True),
    "a decade": (8, WIDE, [0.02 * 1.2**i for i in range(13)] + [0.3], True),
    "many decades": (100, WIDE, [10.0 ** (i - 9) for i in range(14)], True),
    "losses": (2, range(2000), [10 - 0.004 * i for i in range(2000)], False),
    "late steps": (1, range(900, 950), [2.0 - 0.01 * i for i in range(50)], False),
    "large losses": (1, WIDE, [1e6 * i for i in range(14)], False),
    "small steps": (1, [10, 11, 12], [1.0, 2.0, 3.0], True),
}


def boxes(figure: Figure, texts: Any) -> list[Any]:
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]  # of Agg
    shown = [text for text in texts if text.get_visible() and text.get_text()]
    return [text.get_window_extent(renderer) for text in shown]


@pytest.mark.parametrize("name", PANELS)
def test_nothing_stands_on_anything_else(name: str) -> None:
    count, steps, values, logarithmic = PANELS[name]
    curves = {
        f"branches.{number}": tuple(zip(steps, [value * (1 + number / 9) for value in values], strict=True))
        for number in range(count)
    }
    figure = panel_figure("attention", curves, "RMS of the change", logarithmic)
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "RMS of the change")
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        ticks = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        found = boxes(figure, ticks)
        assert 2 <= len(found) <= 8 or len(steps) == 1, [tick.get_text() for tick in ticks]
        assert len({tick.get_text() for tick in ticks}) == len(ticks)
        for one, other in itertools.combinations(found, 2):
            assert not one.overlaps(other)
    legends = [legend.get_window_extent() for legend in figure.legends]
    assert len(legends) == (count > 1) and all(legend.y1 <= axes.get_tightbbox().y0 + 1 for legend in legends)  # type: ignore[union-attr]
    for box in [*legends, *boxes(figure, [axes.xaxis.label, axes.yaxis.label])]:
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1


def test_names_of_failing_curves_are_beside_them() -> None:
    figure = failing_report().draw()
    figure.canvas.draw()
    named = 0
    for axes in figure.axes:
        found = boxes(figure, axes.texts)
        named += len(found)
        for one, other in itertools.combinations(found, 2):
            assert not one.overlaps(other)
        assert all(box.x0 >= axes.get_window_extent().x1 - 20 and box.x1 <= figure.bbox.x1 + 1 for box in found)
        ends = [line.get_window_extent().x1 for line in axes.get_lines()[1:]]
        assert all(box.x0 > max(ends) for box in found)
    assert named
