"""The report of a check: a value that prints as tables and is saved as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO, StringIO
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mlu_lightning.checking.quantities import CONFIDENCE, DRIFT, FAULT, Kind, Quantity
from mlu_lightning.checking.sizes import AXES
from mlu_lightning.checking.verdicts import Cause, Point, Reason, Row, Verdict, axes_of, find_causes, overall_verdict
from mlu_lightning.shapes import Shape
from mlu_lightning.utilities.fitted_tables import FittedTable
from mlu_lightning.utilities.whole_files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class CheckReport:
    """Findings of a check.

    Args:
        base: shape at which hyperparameters are known to be good.
        factors: factors by which it grew.
        seeds: number of runs at every shape.
        steps: optimizer steps of every run.
        rows: slopes and verdicts of everything that was measured.
        warnings: what the theory does not cover in the module, by default nothing.
        notes: what is to be known before the rest, such as axes that were taken in place of others, by default nothing.

    >>> row = Row(Quantity(Kind.UPDATE, "mlp.weight", "branch_in"), "depth", 1.02, 0.04, "fail")
    >>> report = CheckReport(Shape(2, 4, 8), (1, 2, 4), 2, 3, (row,))
    >>> report.verdict, report.causes[0].role
    ('fail', 'branch_in')
    """

    base: Shape
    factors: tuple[int, ...]
    seeds: int
    steps: int
    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """``"fail"`` if any row fails, ``"undecided"`` if any is but effects of roles, else ``"pass"``."""
        return overall_verdict(self.rows)

    @property
    def causes(self) -> tuple[Cause, ...]:
        """Roles that are at fault, the worst first."""
        return find_causes(self.rows)

    @property
    def setting(self) -> str:
        """Seeds, steps and shapes of the check."""
        base = f"L={self.base.depth}, M={self.base.hidden}, D={self.base.embedding}"
        return f"{self.seeds} seeds, {self.steps} steps, sizes {' : '.join(map(str, self.factors))} from {base}"

    @property
    def summary(self) -> str:
        """The verdict in a line, and a line for each cause."""
        counts = {verdict: sum(row.verdict == verdict for row in self.rows) for verdict in _MARKS}
        numbers = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        lines = [f"{self.verdict.upper()}: {numbers}", *(str(cause) for cause in self.causes)]
        named = {cause.role for cause in self.causes}
        failing = dict.fromkeys(row.quantity.label for row in self.rows if row.verdict == "fail")
        if follow := [label for label in failing if label not in named]:
            lines.append(f"Failing too, which may follow from that: {', '.join(follow)}")
        undecided = [row for row in self.rows if row.verdict == "undecided" and not row.quantity.kind.is_effect]
        if self.verdict == "undecided":
            lines += _advice(undecided, self.seeds)
        return "\n".join(lines)

    def tables(self, verbose: bool = True) -> RenderableType:
        """The report for a terminal: a table of what should not grow, one of the effects of roles, and the verdict.

        Args:
            verbose: whether quantities that pass along all axes are listed, which are counted otherwise.
        """
        found = by_quantity(self.rows)
        passing = {} if verbose else {what: of for what, of in found.items() if _worst(of) == "pass"}
        shown = [row for row in self.rows if row.quantity not in passing]
        if not verbose:
            shown.sort(key=lambda row: _ORDER.index(_worst(found[row.quantity])))
        effects = [row for row in shown if row.quantity.kind.is_effect]
        others = [row for row in shown if not row.quantity.kind.is_effect]
        heading = (
            "Slopes of log size of what moves against log size of the network, less what is expected, "
            f"with {100 * CONFIDENCE:g} % intervals ({self.setting})"
        )
        parts: list[RenderableType] = [*map(Text, self.notes), heading]
        if others:
            parts.append(FittedTable(_table(others), keys=3))
        if effects:
            parts += ["Effect of each role's own update on streams and outputs", FittedTable(_table(effects), keys=3)]
        if passing:
            number = sum(map(len, passing.values()))
            listed = "listed with --verbose true and in check.txt"
            parts.append(f"{number} rows of {len(passing)} quantities pass, and are {listed}.")
        parts += [f"Warning: {warning}." for warning in self.warnings]
        parts.append(Text(self.summary, style=_STYLES[self.verdict]))
        return Group(*parts)

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=125, color_system=None, markup=False, emoji=False).print(self.tables())
        return "\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").splitlines())

    def draw(self) -> Figure:
        """The report's rows as a figure; needs matplotlib."""
        from mlu_lightning.checking.figure import draw_check

        return draw_check(self.rows, self.base)

    def save(self, folder: str | PathLike[str]) -> None:
        """Write ``check.json``, which has everything, ``check.txt`` and ``check.png`` into a folder, which is made.

        After an error, what an earlier check has written there is as it was.
        """
        path, figure = Path(folder), BytesIO()
        self.draw().savefig(figure, dpi=110)
        texts = {path / "check.json": self.to_json(), path / "check.txt": f"{self}\n"}
        path.mkdir(parents=True, exist_ok=True)
        write_whole({file: text.encode() for file, text in texts.items()} | {path / "check.png": figure.getvalue()})

    def to_json(self) -> str:
        """The report as JSON; a number that is not finite is null."""
        content = {
            "verdict": self.verdict,
            "causes": [{"role": cause.role, "factor": cause.factor, "says": str(cause)} for cause in self.causes],
            "base": asdict(self.base),
            "factors": list(self.factors),
            "seeds": self.seeds,
            "steps": self.steps,
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "rows": [_finite(asdict(row)) for row in self.rows],
        }
        return json.dumps(content, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> CheckReport:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: if the text is not a report.
        """
        try:
            content = json.loads(text)
            return cls(
                base=Shape(**content["base"]),
                factors=tuple(_a(int, factor) for factor in content["factors"]),
                seeds=_a(int, content["seeds"]),
                steps=_a(int, content["steps"]),
                rows=tuple(map(_row, content["rows"])),
                warnings=tuple(_a(str, warning) for warning in content["warnings"]),
                notes=tuple(_a(str, note) for note in content.get("notes", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"This is no report of a check ({error}). Make one with mlu-lightning check.") from error


def by_quantity(rows: Iterable[Row]) -> dict[Quantity, dict[str, Row]]:
    """Rows by quantity and axis."""
    found: dict[Quantity, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row.quantity, {})[row.axis] = row
    return found


_MARKS: dict[Verdict, str] = {"pass": " ", "fail": "✗", "undecided": "?"}
_ORDER: tuple[Verdict, ...] = ("fail", "undecided", "pass")
_STYLES: dict[Verdict, str] = {"pass": "green", "fail": "bold red", "undecided": "yellow"}


def _table(rows: Sequence[Row]) -> Table:
    """A line for every quantity, with a slope for each axis."""
    axes = axes_of(rows)
    table = Table("", "what", "role", *axes, "verdict")
    for column in table.columns[3:-1]:
        column.justify = "right"
        column.no_wrap = True
    for kind, quantities in groupby(by_quantity(rows).items(), key=lambda item: item[0].kind):
        table.add_section()
        heading = str(kind)
        for quantity, found in quantities:
            name = "" if quantity.name == quantity.role else quantity.name
            cells = [_cell(found.get(axis)) for axis in axes]
            worst = _worst(found)
            table.add_row(heading, name, quantity.role or "", *cells, Text(worst, style=_STYLES[worst]))
            heading = ""
    return table


def _worst(found: Mapping[str, Row]) -> Verdict:
    return min((row.verdict for row in found.values()), key=_ORDER.index)


def _advice(undecided: Sequence[Row], seeds: int) -> list[str]:
    """What would decide a check: more seeds, where intervals are wide, and what is the matter with the other rows."""
    advice = list(dict.fromkeys(f"{row.quantity}: {row.reason}" for row in undecided if math.isnan(row.slope)))
    wide = [row for row in undecided if row.is_wide]
    between = [row for row in undecided if not (row.is_wide or math.isnan(row.slope))]
    if wide:
        # half of an interval falls as one over the root of the number of seeds
        enough = math.ceil(seeds * (2 * max(row.error for row in wide) / (FAULT - DRIFT)) ** 2)
        advice.append(
            f"Runs differ too much to tell from one size to the next in {len(wide)} of {len(undecided)} rows. "
            f"More seeds would tell, about {max(enough, seeds + 1)}."
        )
    if between:
        advice.append(
            f"{len(between)} of {len(undecided)} undecided rows have slopes between those of finite networks (to {DRIFT}) "
            f"and those of faults (from {FAULT}), which more seeds would not change. Begin with a larger base, of more "
            f"blocks or units. The steepest is {max(between, key=lambda row: abs(row.slope))}."
        )
    return advice


def _cell(row: Row | None) -> Text:
    if row is None:
        return Text("")
    if math.isnan(row.slope):
        return Text(f"-{_MARKS[row.verdict]}", style=_STYLES[row.verdict])
    style = "" if row.verdict == "pass" else _STYLES[row.verdict]
    return Text(f"{row.slope:+.2f}±{row.error:.2f}{_MARKS[row.verdict]}", style=style)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(content: dict[str, Any]) -> Row:
    what = content["quantity"]
    role = what.get("role")
    return Row(
        quantity=Quantity(Kind(_one_of(list(Kind), what["kind"])), _a(str, what["name"]), role and _a(str, role)),
        axis=_one_of(AXES, content["axis"]),
        slope=_number(content["slope"]),
        error=_number(content["error"]),
        verdict=_one_of(get_args(Verdict), content["verdict"]),
        reason=Reason(_one_of(list(Reason), content["reason"])),
        points=tuple(map(_point, content["points"])),
    )


def _point(content: dict[str, Any]) -> Point:
    numbers = (_number(content[name]) for name in ("value", "lowest", "highest"))
    return Point(_a(int, content["factor"]), _a(int, content["seed"]), *numbers)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _a(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r} should be {'text' if kind is str else 'a whole number'}")
    return value


def _one_of(known: Sequence[Any], value: Any) -> Any:
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return value
