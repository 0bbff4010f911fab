"""Plans as tables."""

from __future__ import annotations

import math
from collections import Counter
from io import StringIO
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mlu_lightning.table import OptimizerFamily, Parameterization, Ratios, Role, Scale, Variant, row_name
from mlu_lightning.utilities.names import name_pattern

if TYPE_CHECKING:
    from mlu_lightning.planning.plan import Plan

__all__ = ["plan_table"]

_TITLES = {
    Parameterization.MLU: "MLU",
    Parameterization.COMPLETEP: "CompleteP",
    Parameterization.MUP: "µP",
    Parameterization.SP: "Standard",
}


def plan_table(plan: Plan, family: OptimizerFamily) -> str:
    """Draw a plan: shapes, roles with their factors for an optimizer family, branches, and warnings."""
    text = StringIO()
    console = Console(file=text, width=125, color_system=None, markup=False, emoji=False)
    base = "the paper's absolute form" if plan.base is None else "relative to the base shape"
    richness = "" if plan.alpha == 1 else f", alpha {plan.alpha:g}"
    console.print(f"{_TITLES[plan.parameterization]} plan, {base}{richness}: factors for {family.value}")
    if not plan.horizon.is_identity:
        batch, tokens = plan.horizon.batch_ratio, plan.horizon.token_ratio
        forgetting = plan.horizon.forgetting.factor
        console.print(
            f"batch {batch:g} and tokens {tokens:g} times the base's: 1 - beta is multiplied by {forgetting:g}"
        )
    for i, stream in enumerate(plan.streams):
        name = "stream" if len(plan.streams) == 1 else f"stream {i}"
        console.print(
            f"{name}: depth {_change(stream.depth, stream.base_depth)}, "
            f"embedding {_change(stream.embedding, stream.base_embedding)}"
        )
    console.print(_roles(plan, family))
    console.print(_branches(plan))
    for warning in plan.warnings:
        console.print(f"Warning: {warning}.")
    return text.getvalue().rstrip("\n")


def _roles(plan: Plan, family: OptimizerFamily) -> Table:
    table = Table("role", "tensors", "entries", "depth", "inputs", "outputs", "multiplier", "std", "lr", "eps", "decay")
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    scales = plan.scales(family)
    rows: Counter[tuple[Role, Variant | None, Ratios, Scale]] = Counter()
    entries: Counter[tuple[Role, Variant | None, Ratios, Scale]] = Counter()
    for name, parameter in plan.parameters.items():
        row = parameter.role, parameter.variant, parameter.ratios, scales[name]
        rows[row] += 1
        entries[row] += math.prod(parameter.shape)
    order = list(Role)
    for row, count in sorted(rows.items(), key=lambda item: order.index(item[0][0])):
        role, variant, ratios, factors = row
        shape = (f"{ratio:.5g}" for ratio in (ratios.depth, ratios.inputs, ratios.outputs))
        numbers = (factors.multiplier, factors.std, factors.lr, factors.eps, factors.weight_decay)
        table.add_row(
            row_name(role, variant), str(count), _short(entries[row]), *shape, *(f"{number:.3g}" for number in numbers)
        )
    return table


def _branches(plan: Plan) -> Table:
    table = Table("branch", "blocks", "kind", "hidden", "head_dim", "multiplier")
    for column in (1, 3, 4, 5):
        table.columns[column].justify = "right"
    values = {m.name: plan.forward_multiplier(m) for m in plan.multipliers if m.kind == "branch"}
    rows = Counter(
        (
            name_pattern(branch.name),
            branch.kind,
            _change(branch.hidden, branch.base_hidden),
            "" if branch.head_dim is None else str(branch.head_dim),
            f"{values[branch.name]:.3g}",
        )
        for branch in plan.branches
    )
    for (name, *rest), count in rows.items():
        table.add_row(name or "(module itself)", str(count), *rest)
    for multiplier in plan.multipliers:
        if multiplier.kind == "readout":
            tied = "" if multiplier.folds else " (tied)"
            table.add_row(multiplier.name, "", f"readout{tied}", "", "", f"{multiplier.value:.3g}")
    return table


def _change(value: int, base: int) -> str:
    return f"{value}" if value == base else f"{value} (base {base})"


def _short(count: int) -> str:
    """A count with three digits."""
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= 10 * size:
            return f"{count / size:.0f}{suffix}"
    return str(count)
