"""What figures and tables of studies share; matplotlib is imported only when a figure is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:  # a name for annotations
    Axes = Any


def new_figure(width: float, height: float) -> Any:
    """Make an empty figure, of a size in inches, that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def hide_spines(axes: Axes) -> None:
    """Draw the left and the lower side of a panel only."""
    axes.spines[["top", "right"]].set_visible(False)


def plain_log_axis(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))


def size_axis(axes: Axes, sizes: Sequence[float], labels: Sequence[str] | None = None) -> None:
    """Make the x axis logarithmic, with ticks at given sizes alone."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sizes, labels or [f"{size:g}" for size in sizes])


def shade(share: float) -> Any:
    """Color from green, for 0, to dark violet, for 1."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.8 * (1 - share))
