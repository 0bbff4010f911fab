"""A run as one HTML page that needs nothing else: no network, no scripts, no further files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from string import Template
from typing import TypeVar

from mlu_lightning.checking.figure import draw_check
from mlu_lightning.checking.report import CheckReport
from mlu_lightning.checking.sizes import AXES
from mlu_lightning.checking.verdicts import Row
from mlu_lightning.observation.reference import Reference
from mlu_lightning.planning.plan import Plan
from mlu_lightning.reporting.curves import as_data_uri, curves_figure, not_drawn, panels_of
from mlu_lightning.reporting.run_folder import UNREADABLE, Curve, RunRecord, reason
from mlu_lightning.table import OptimizerFamily

__all__ = ["run_page"]


def run_page(record: RunRecord) -> str:
    """Write the page of a run; equal records make equal pages.

    Args:
        record: what was found of the run.

    Returns:
        HTML, in which everything that comes from files is escaped. What was read, but cannot be shown, is named in its
        place with the reason.

    >>> page = run_page(RunRecord(__import__("pathlib").Path("runs/<1>")))
    >>> "<title>runs/&lt;1&gt;</title>" in page, "http" in page
    (True, False)
    """
    name = _text(record.folder if record.folder.name else record.folder.resolve())  # "." says nothing
    sections = [
        ("Checks", _checks(record.checks)),
        ("Plan", _plans(record.plans)),
        ("Features", _figures(record.values, "mlu/update/", "FeatureUpdate")),
        ("Distances", _figures(record.values, "mlu/distance/", "EmbeddingDistance")),
        ("Losses", _losses(record.values)),
        ("References", _references(record.references)),
    ]
    if record.problems:
        rows = [[path, reason] for path, reason in record.problems.items()]
        sections.append(("What could not be read", _table(["file", "reason"], rows)))
    links = " ".join(f'<a href="#{_anchor(title)}">{title}</a>' for title, _ in sections)
    body = "\n".join(f'<section id="{_anchor(title)}"><h2>{title}</h2>\n{text}</section>' for title, text in sections)
    return _PAGE.substitute(name=name, verdict=_badges(record.checks), links=links, body=body)


_Item = TypeVar("_Item")


def _text(value: object) -> str:
    """Text from a file: escaped, and characters that cannot be seen, or encoded, by their numbers."""
    seen = (c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in str(value))
    return escape("".join(seen))


def _each(items: Mapping[str, _Item], show: Callable[[str, _Item], str]) -> str:
    """Everything that was read, or why it cannot be shown: files can be well-formed, and hold what makes no sense."""
    parts = []
    for path, item in items.items():
        try:
            parts.append(show(path, item))
        except UNREADABLE as error:
            parts.append(f'<p class="fail">{_text(path)} cannot be shown: {_text(reason(error))}</p>')
    return "\n".join(parts)


def _badges(checks: Mapping[str, CheckReport]) -> str:
    verdicts = [_text(check.verdict) for check in checks.values()]
    return " ".join(f'<span class="badge {verdict}">{verdict}</span>' for verdict in verdicts)


def _checks(checks: Mapping[str, CheckReport]) -> str:
    if not checks:
        return _missing("No check.json was found. <code>mlu-lightning check config.yaml --out FOLDER</code> makes one.")
    return _each(checks, _check)


def _check(path: str, check: CheckReport) -> str:
    base = check.base
    about = (
        f"{path}: {check.seeds} seeds, {check.steps} steps, sizes {' : '.join(map(str, check.factors))} from "
        f"L={base.depth}, M={base.hidden}, D={base.embedding}"
    )
    lines = "".join(f"<li>{_text(line)}</li>" for line in check.summary.splitlines())
    warnings = "".join(f'<p class="warning">Warning: {_text(warning)}.</p>' for warning in check.warnings)
    figure = f'<img alt="Sizes against shape" src="{as_data_uri(draw_check(check))}">' if check.rows else ""
    return (
        f"<p>{_text(about)}</p>\n<ul class='summary {check.verdict}'>{lines}</ul>\n{warnings}{figure}\n"
        f"<details open><summary>All slopes</summary>{_slopes(check.rows)}</details>"
    )


def _slopes(rows: Sequence[Row]) -> str:
    """A line for every quantity with the slope along each axis, less what is expected."""
    axes = [axis for axis in AXES if any(row.axis == axis for row in rows)]
    of_quantity: dict[str, dict[str, Row]] = {}
    for row in rows:
        of_quantity.setdefault(str(row.quantity), {})[row.axis] = row
    lines = []
    for quantity, found in of_quantity.items():
        cells = "".join(_slope(found.get(axis)) for axis in axes)
        lines.append(f"<tr><td>{_text(quantity)}</td>{cells}</tr>")
    head = "".join(f"<th>{axis}</th>" for axis in axes)
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _slope(row: Row | None) -> str:
    if row is None:
        return "<td></td>"
    text = _text(row.reason) if math.isnan(row.slope) else f"{row.slope:+.2f} ± {row.error:.2f}"
    return f'<td class="number {_text(row.verdict)}">{text}</td>'


def _plans(plans: Mapping[str, Plan]) -> str:
    if not plans:
        return _missing("No plan was found: neither a checkpoint of a run with MLUCallback, nor a saved plan.")
    return _each(plans, _plan)


def _plan(path: str, plan: Plan) -> str:
    """The table for AdamW, and those for other optimizers, whose factors are not the same."""
    others = "".join(
        f"<details><summary>Factors for {family.value}</summary>{_factors(plan, family)}</details>"
        for family in OptimizerFamily
        if family is not OptimizerFamily.ADAMW
    )
    return f"<p>{_text(path)}</p>\n{_factors(plan, OptimizerFamily.ADAMW)}\n{others}"


def _factors(plan: Plan, family: OptimizerFamily) -> str:
    try:
        return f"<pre>{_text(plan.table(family))}</pre>"
    except ValueError as error:  # there are no rules for other batch sizes with some optimizers
        return f"<p>{_text(error)}</p>"


def _figures(values: Mapping[str, Curve], prefix: str, callback: str) -> str:
    panels = panels_of(values, prefix)
    if not panels:
        return _missing(
            f"Nothing was logged under {prefix}. <code>{callback}</code> among the callbacks of a run does."
        )
    return _each({f"{prefix} against step": panels}, lambda title, panels: _drawn(title, panels, logarithmic=True))


def _drawn(title: str, panels: Mapping[str, Mapping[str, Curve]], logarithmic: bool) -> str:
    """A figure of curves, and how many values are not in it."""
    count = not_drawn(panels, logarithmic)
    limits = ", or not above 0, as a logarithmic axis has them" if logarithmic else ""
    note = f"<p>Values that are not drawn because they are not finite{limits}: {count}</p>" if count else ""
    return f'<img alt="{_text(title)}" src="{as_data_uri(curves_figure(panels, logarithmic))}">{note}'


def _losses(values: Mapping[str, Curve]) -> str:
    losses = {name: curve for name, curve in values.items() if "loss" in name.lower()}
    if not losses:
        return _missing('Nothing was logged with "loss" in its name.')
    panels = {"Losses against step": {"losses": losses}}
    figure = _each(panels, lambda title, panels: _drawn(title, panels, logarithmic=False))
    last = [[name, str(curve[-1][0]), f"{curve[-1][1]:.6g}"] for name, curve in losses.items() if curve]
    return figure + _table(["loss", "last step", "value"], last)


def _references(references: Mapping[str, Reference]) -> str:
    if not references:
        return _missing("No reference was recorded here. <code>ReferenceRecorder</code> among the callbacks does.")
    rows = []
    for path, reference in references.items():
        header = reference.header
        hidden = ", ".join(f"{kind} {width}" for kind, width in header.hidden.items())
        rows.append([path, _numbers(header.depth), hidden, _numbers(header.embedding), _numbers(reference.steps)])
    return _table(["file", "depth", "hidden", "embedding", "steps"], rows)


def _numbers(numbers: Iterable[int]) -> str:
    shown = list(map(str, numbers))
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-2:]])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    titles = "".join(f"<th>{_text(title)}</th>" for title in head)
    lines = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table>"


def _missing(html: str) -> str:
    return f'<p class="missing">{html}</p>'


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$name</title>
<style>
:root { color-scheme: light dark; --text: #1b1b1b; --back: #ffffff; --soft: #6a6a6a; --line: #dddddd; --card: #f6f6f4;
  --pass: #0072B2; --fail: #C40000; --undecided: #9a6a00; }
@media (prefers-color-scheme: dark) { :root { --text: #e8e6e3; --back: #17181a; --soft: #a0a0a0; --line: #3a3a3c;
  --card: #222326; --pass: #56b4e9; --fail: #ff7b72; --undecided: #e6b450; } }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--text); background: var(--back);
  max-width: 72rem; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin-bottom: 0.25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; border-bottom: 1px solid var(--line); padding-bottom: 0.25rem; margin-top: 2.5rem; }
nav a { color: var(--pass); margin-right: 0.9rem; text-decoration: none; }
img { max-width: 100%; background: #ffffff; border-radius: 6px; padding: 0.5rem; box-sizing: border-box; margin: 0.5rem 0; }
pre { font: 12px/1.35 ui-monospace, "SF Mono", Menlo, Consolas, monospace; background: var(--card); padding: 0.9rem;
  border-radius: 6px; overflow-x: auto; }
code { font: 0.9em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; margin: 0.75rem 0; }
th, td { text-align: left; padding: 0.2rem 0.8rem 0.2rem 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
td.number { text-align: right; white-space: nowrap; }
.pass { color: var(--pass); } .fail { color: var(--fail); font-weight: 600; } .undecided { color: var(--undecided); }
td.pass { color: inherit; }
.badge { border: 1px solid currentColor; border-radius: 999px; padding: 0.05rem 0.7rem; font-size: 0.9rem;
  text-transform: uppercase; letter-spacing: 0.04em; }
.summary { list-style: none; padding: 0.6rem 0.9rem; background: var(--card); border-radius: 6px; border-left: 4px solid; }
.missing, .warning { color: var(--soft); }
details summary { cursor: pointer; margin: 0.5rem 0; }
@media print { body { max-width: none; margin: 0; } nav { display: none; } h2 { break-after: avoid; }
  img, tr, pre { break-inside: avoid; } pre { font-size: 8px; } }
</style>
</head>
<body>
<h1>$name $verdict</h1>
<nav>$links</nav>
$body
</body>
</html>
""")
