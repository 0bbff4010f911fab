"""Tables in narrow terminals: no line is wider, and every word and number is whole."""

import io
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from mlu_lightning.utilities.fitted_tables import FittedTable

NAME = "model.layers.*.self_attn.q_proj.weight"
RESULTS = [f"2^-{exponent}" for exponent in range(10, 3, -1)]


def results() -> Table:
    table = Table("shape", "", *RESULTS, "best lr")
    table.add_row("8 × hidden width", "MLU", *(f"[bold]{2 + i / 100:.3f}*[/bold]" for i in range(7)), "2^-10.0")
    table.add_section()
    table.add_row("base", "standard", *(f"{2 + i / 70:.3f} " for i in range(7)), "")
    return table


def slopes() -> Table:
    table = Table("", "what", "role", "depth", "width", "together", "verdict")
    table.columns[3].no_wrap = True
    table.add_row("update", NAME, "branch_in", "+0.02±0.05", "-0.03±0.05 ", "", "pass")
    table.add_row("", "s=1", "", "+1.02±0.05✗", "-1.03±0.05 ", "+0.50±0.01?", "fail")
    return table


def wide() -> Table:
    table = Table("role", *(f"a number {i}" for i in range(30)))
    table.add_row("branch_in", *(f"{10**i:,}" for i in range(10)), *["1"] * 20)
    return table


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize(
    ("table", "keys"), [(results(), 2), (slopes(), 3), (wide(), 1)], ids=["losses", "slopes", "wide"]
)
def test_nothing_is_cut(table: Table, keys: int, width: int) -> None:
    text = io.StringIO()
    console = Console(file=text, width=width)
    console.print(FittedTable(table, keys))
    assert max(map(len, text.getvalue().splitlines())) <= width
    words = text.getvalue().split()
    cells: list[Any] = [column.header for column in table.columns[keys:]]
    cells += [cell for column in table.columns for cell in column.cells]
    wanted = [word for cell in cells for word in console.render_str(str(cell)).plain.split()]
    assert [word for word in wanted if word not in words] == []


@pytest.mark.parametrize(("width", "says"), [(120, "│ base "), (80, "│ base "), (30, "\nbase  standard\n")])
def test_as_it_is_in_parts_or_row_by_row(width: int, says: str) -> None:
    """Parts begin with the first columns; rows are a line of what they are of, and their numbers below."""
    text, plain = io.StringIO(), io.StringIO()
    Console(file=text, width=width).print(FittedTable(results(), 2))
    assert text.getvalue().count(says) == (2 if width == 80 else 1)
    Console(file=plain, width=width).print(results())
    assert (text.getvalue() == plain.getvalue()) == (width == 120)
