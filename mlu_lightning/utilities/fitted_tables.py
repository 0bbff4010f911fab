"""Tables that fit a narrow terminal without cutting words or numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

_BORDERS = 3  # of each column, in the default box; there is one more at the end
_UNLIMITED = 10_000


def number_table(*columns: str, words: int = 1, title: str | None = None) -> Table:
    """Make a table whose first columns have words, and the others numbers, aligned to the right."""
    return Table(*columns[:words], *(Column(header, justify="right") for header in columns[words:]), title=title)


class FittedTable:
    """A table as it is where it fits, or with words on several lines, in parts below each other, or row by row.

    The first columns (``keys``), which say what a row is about, begin every part or row.
    """

    def __init__(self, table: Table, keys: int = 1) -> None:
        self._table, self._keys = table, keys
        self._cells = [list(column.cells) for column in table.columns]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Lay the table out in the width that there is."""
        measures = [self._measure(console, options, number) for number in range(len(self._cells))]
        parts = self._parts([measure.minimum for measure in measures], options.max_width)
        if parts is None:
            yield from self._records(console, options.max_width)
            return
        for part in parts:
            yield self._part(part, _widths([measures[number] for number in part], _room(part, options.max_width)))

    def _measure(self, console: Console, options: ConsoleOptions, number: int) -> Measurement:
        """Width of the longest word of a column, and of its longest text."""
        column, unlimited = self._table.columns[number], options.update(width=_UNLIMITED)
        found = [Measurement.get(console, unlimited, cell) for cell in (column.header, *self._cells[number])]
        most = max(measure.maximum for measure in found)
        return Measurement(most if column.no_wrap else max(measure.minimum for measure in found), most)

    def _parts(self, least: Sequence[int], width: int) -> list[list[int]] | None:
        """Columns of each part, as many as there is room for; None if that is about one besides the keys."""
        keys, others = range(self._keys), range(self._keys, len(least))
        parts = [[*keys]]
        for number in others:
            if sum(least[each] for each in (*parts[-1], number)) > _room((*parts[-1], number), width):
                parts.append([*keys])
            parts[-1].append(number)
        fit = all(sum(least[each] for each in part) <= _room(part, width) for part in parts)
        return parts if fit and len(parts) <= max(1, len(others) // 2) else None

    def _part(self, numbers: Sequence[int], widths: Sequence[int]) -> Table:
        part = Table(*(self._table.columns[number].copy() for number in numbers))
        for column, width in zip(part.columns, widths, strict=True):
            column.width = width
        for index, row in enumerate(self._table.rows):
            cells = (self._cells[number][index] for number in numbers)
            part.add_row(*cells, style=row.style, end_section=row.end_section)
        return part

    def _records(self, console: Console, width: int) -> Iterator[Text]:
        for index, row in enumerate(self._table.rows):
            cells = [_text(console, cells[index]) for cells in self._cells]
            yield Text("  ", style=row.style or "").join(filter(None, cells[: self._keys]))
            headers = [_text(console, column.header) for column in self._table.columns]
            line = Text("  ")
            for header, cell in list(zip(headers, cells, strict=True))[self._keys :]:
                if not cell:
                    continue
                pair = Text("  ") + header + Text(" ") + cell
                if len(line) > 2 and line.cell_len + pair.cell_len > width:
                    yield line
                    line = Text("  ")
                line += pair
            yield line


def _room(part: Sequence[int], width: int) -> int:
    return width - _BORDERS * len(part) - 1


def _widths(measures: Sequence[Measurement], room: int) -> list[int]:
    """Widths that fit: the widest columns give way first, and none below its longest word."""
    widths = [measure.maximum for measure in measures]
    while sum(widths) > room:
        wide = [number for number, measure in enumerate(measures) if widths[number] > measure.minimum]
        widths[max(wide, key=lambda number: widths[number])] -= 1
    return widths


def _text(console: Console, cell: RenderableType) -> Text:
    text = cell.copy() if isinstance(cell, Text) else console.render_str(str(cell), highlight=False)
    text.rstrip()
    return text
