"""Render a run as one HTML page that needs no network, no scripts and no other files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mlu_lightning.checking.figure import draw_check
from mlu_lightning.checking.report import CheckReport, by_quantity
from mlu_lightning.checking.verdicts import Row, Verdict, axes_of
from mlu_lightning.observation import Reference
from mlu_lightning.planning import Plan
from mlu_lightning.reporting.curves import as_data_uri, first_panels, not_drawn, panel_figure, panels_of
from mlu_lightning.reporting.run_folder import UNREADABLE, Curve, RunRecord, reason
from mlu_lightning.table import OptimizerFamily
from mlu_lightning.utilities.plain_text import printable


def run_page(record: RunRecord) -> str:
    """Render the page of a run, in which everything that comes from files is escaped; equal records make equal pages."""
    losses = {name: curve for name, curve in record.values.items() if "loss" in name.lower()}
    panels = {"Losses against step": {"losses": losses}} if losses else {}
    checks = dict(sorted(record.checks.items(), key=lambda item: _WORST_FIRST.index(item[1].verdict)))
    environment = Environment(
        loader=PackageLoader("mlu_lightning.reporting", ""),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
    )
    return environment.get_template("page.html").render(
        name=record.folder if record.folder.name else record.folder.resolve(),  # "." says nothing
        verdicts=[check.verdict for check in checks.values()],
        checks=_shown(checks, _check),
        plans=_shown(record.plans, _plan),
        watched=[
            (title, prefix, callback, _curves(record.values, prefix, label))
            for title, prefix, callback, label in (
                ("Features", "mlu/update/", "FeatureUpdate", "RMS of the change"),
                ("Distances", "mlu/distance/", "EmbeddingDistance", "distance"),
            )
        ],
        loss_figures=_shown(panels, lambda panels: _figures(panels, "loss", logarithmic=False)),
        losses=[[name, curve[-1][0], f"{curve[-1][1]:.6g}"] for name, curve in losses.items() if curve],
        references=[_reference(path, reference) for path, reference in record.references.items()],
        problems=record.problems,
    )


_Item = TypeVar("_Item")
_View = dict[str, Any]
_WORST_FIRST: tuple[Verdict, ...] = ("fail", "undecided", "pass")


def _visible(value: object) -> object:
    if isinstance(value, Markup):
        return value  # of the template, in which everything was made visible
    return printable(str(value))


def _shown(items: Mapping[str, _Item], view: Callable[[_Item], _View]) -> list[_View]:
    """What the template shows of each item, or why it cannot: files can be well-formed and hold what makes no sense."""
    views: list[_View] = []
    for name, item in items.items():
        try:
            views.append({"name": name, **view(item)})
        except UNREADABLE as error:
            views.append({"name": name, "problem": reason(error)})
    return views


def _check(check: CheckReport) -> _View:
    axes, images = axes_of(check.rows), []
    for axis in axes:
        figure = draw_check([row for row in check.rows if row.axis == axis], check.base)
        figure.suptitle("")  # of all axes
        images.append((f"Sizes against {axis}", as_data_uri(figure)))
    slopes: dict[Verdict, list[Any]] = {verdict: [] for verdict in _WORST_FIRST}
    for what, found in by_quantity(check.rows).items():
        worst = min((row.verdict for row in found.values()), key=_WORST_FIRST.index)
        slopes[worst].append((what, [_slope(found.get(axis)) for axis in axes]))
    return {
        "about": check.setting,
        "verdict": check.verdict,
        "summary": check.summary.splitlines(),
        "warnings": check.warnings,
        "images": images,
        "axes": axes,
        "slopes": slopes["fail"] + slopes["undecided"],
        "passed": slopes["pass"],
    }


def _slope(row: Row | None) -> tuple[str, str]:
    """Verdict and slope along one axis, less what is expected, or why there is no slope."""
    if row is None:
        return "", ""
    return row.verdict, row.reason if math.isnan(row.slope) else f"{row.slope:+.2f} ± {row.error:.2f}"


def _plan(plan: Plan) -> _View:
    """Tables for the optimizers of its fit, or else for AdamW and for all others, whose factors are not the same."""
    families = plan.optimizers or sorted(OptimizerFamily, key=lambda family: family is not OptimizerFamily.ADAMW)
    return {"tables": [_factors(plan, family) for family in families]}


def _factors(plan: Plan, family: OptimizerFamily) -> _View:
    try:
        return {"family": family, "text": plan.table(family)}
    except ValueError as error:  # there are no rules for other batch sizes with some optimizers
        return {"family": family, "error": error}


def _curves(values: Mapping[str, Curve], prefix: str, label: str) -> list[_View]:
    panels = panels_of(values, prefix)
    figures = {f"{prefix} against step": panels} if panels else {}
    return _shown(figures, lambda panels: _figures(panels, label, logarithmic=True))


def _figures(panels: Mapping[str, Mapping[str, Curve]], label: str, logarithmic: bool) -> _View:
    panels, more = first_panels(panels)
    figures = {title: panel_figure(title, curves, label, logarithmic) for title, curves in panels.items()}
    return {
        "images": [(f"{title} against step", as_data_uri(figure)) for title, figure in figures.items()],
        "left_out": not_drawn(panels, logarithmic),
        "more": more,
        "limits": ", or not above 0, as a logarithmic axis has them" if logarithmic else "",
    }


def _reference(path: str, reference: Reference) -> Sequence[str]:
    header = reference.header
    hidden = ", ".join(f"{kind} {width}" for kind, width in header.hidden.items())
    return path, _numbers(header.depth), hidden, _numbers(header.embedding), _numbers(reference.steps)


def _numbers(numbers: Iterable[int]) -> str:
    shown = list(map(str, numbers))
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-2:]])
