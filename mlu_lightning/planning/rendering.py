"""Print plans as tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from io import StringIO

from rich.console import Console
from rich.table import Table

from mlu_lightning.planning.distance import Distance
from mlu_lightning.planning.entries import BranchPlan, Multiplier, ParameterPlan, StreamPlan
from mlu_lightning.planning.horizon import Horizon
from mlu_lightning.table import OptimizerFamily, Parameterization, Ratios, Role, Scale, Variant, row_name
from mlu_lightning.utilities.fitted_tables import FittedTable, number_table
from mlu_lightning.utilities.names import name_pattern

TITLES = {
    Parameterization.MLU: "MLU",
    Parameterization.COMPLETEP: "CompleteP",
    Parameterization.MUP: "µP",
    Parameterization.SP: "Standard",
}


def headline(
    parameterization: Parameterization, absolute: bool, alpha: float, horizon: Horizon, family: OptimizerFamily
) -> str:
    """Say what the factors of a plan are relative to, and for which optimizers."""
    base = "the paper's absolute form" if absolute else "relative to the base shape"
    richness = "" if alpha == 1 else f", alpha {alpha:g}"
    line = f"{TITLES[parameterization]} plan, {base}{richness}: factors for {family.value}"
    if horizon.is_identity:
        return line
    return (
        f"{line}\nbatch {horizon.batch_ratio:g} and tokens {horizon.token_ratio:g} times the base's: 1 - beta is multiplied "
        f"by {horizon.forgetting.factor:g}"
    )


def draw_plan(
    headline: str,
    streams: tuple[StreamPlan, ...],
    distances: Sequence[Distance],
    parameters: Mapping[str, ParameterPlan],
    scales: Mapping[str, Scale],
    branches: tuple[BranchPlan, ...],
    multipliers: Mapping[Multiplier, float],
    constants: Mapping[str, tuple[float, float]],
    warnings: Iterable[str],
    tuned: Mapping[str, Mapping[str, float]],
    width: int,
) -> str:
    """Draw shapes and initial random parts, roles with their factors, branches with their multipliers, and warnings."""
    text = StringIO()
    console = Console(file=text, width=width, color_system=None, markup=False, emoji=False)
    console.print(headline)
    for i, stream in enumerate(streams):
        name = "stream" if len(streams) == 1 else f"stream {i}"
        console.print(
            f"{name}: depth {_change(stream.depth, stream.base_depth)}, "
            f"embedding {_change(stream.embedding, stream.base_embedding)}"
        )
        if parts := [str(distance) for distance in distances if distance.stream == i]:
            console.print(f"  initial random part √(D/(L·M)): {'; '.join(parts)}")
    console.print(FittedTable(_roles(parameters, scales)))
    console.print(FittedTable(_branches(branches, multipliers)))
    left_alone = [name for name, parameter in parameters.items() if parameter.role is Role.FROZEN]
    if left_alone:
        copies = sum(parameters[name].copy_of is not None for name in left_alone)
        begins = f", {copies} of which begin as copies of others" if copies else ""
        first, *others = dict.fromkeys(map(name_pattern, left_alone))
        more = f" and {len(others)} more" if others else ""
        console.print(f"{len(left_alone)} tensors are left alone (frozen){begins}: {first}{more}")
    if tuned:
        numbers = ({what: f"{factor:.3g}" for what, factor in factors.items()} for factors in tuned.values())
        listed = (f"{key} {', '.join(map(' '.join, of.items()))}" for key, of in zip(tuned, numbers, strict=True))
        console.print(f"Tuned at the base, and in the numbers above: {'; '.join(listed)}.")
    if constants:
        own = {f"{name_pattern(name)} {value:.4g} (base {base:.4g})": None for name, (value, base) in constants.items()}
        console.print(f"Numbers are relative to what the module itself multiplies by: {', '.join(own)}.")
    for warning in warnings:
        console.print(f"Warning: {warning}.")
    return text.getvalue().rstrip("\n")


def _roles(parameters: Mapping[str, ParameterPlan], scales: Mapping[str, Scale]) -> Table:
    repeated = any(parameter.ratios.uses != 1 for parameter in parameters.values())
    of_shape = ("depth", *["uses"] * repeated, "inputs", "outputs")
    table = number_table("role", "tensors", "entries", *of_shape, "multiplier", "std", "lr", "eps", "decay")
    table.columns[0].no_wrap = True
    sizes: dict[tuple[Role, Variant | None, Ratios, Scale], list[int]] = {}
    for name, parameter in parameters.items():
        if parameter.role is Role.FROZEN:
            continue
        row = parameter.role, parameter.variant, parameter.ratios, scales[name]
        sizes.setdefault(row, []).append(math.prod(parameter.shape))
    order = list(Role)
    for (role, variant, ratios, factors), entries in sorted(sizes.items(), key=lambda item: order.index(item[0][0])):
        shape = (f"{getattr(ratios, key):.5g}" for key in of_shape)
        numbers = (f"{number:.3g}" for number in astuple(factors))
        table.add_row(row_name(role, variant), str(len(entries)), _short(sum(entries)), *shape, *numbers)
    return table


def _branches(branches: tuple[BranchPlan, ...], multipliers: Mapping[Multiplier, float]) -> Table:
    table = Table("branch", "blocks", "kind", "hidden", "head_dim", "multiplier")
    for column in (1, 3, 4, 5):
        table.columns[column].justify = "right"
    values = {multiplier.name: value for multiplier, value in multipliers.items() if multiplier.kind == "branch"}
    rows = Counter(
        (
            name_pattern(branch.name),
            branch.kind,
            _change(branch.hidden, branch.base_hidden),
            "" if branch.head_dim is None else str(branch.head_dim),
            f"{values[branch.name]:.3g}",
        )
        for branch in branches
    )
    for (name, *rest), count in rows.items():
        table.add_row(name or "(module itself)", str(count), *rest)
    for multiplier, value in multipliers.items():
        if multiplier.kind == "readout":
            tied = "" if multiplier.folds else " (tied)"
            table.add_row(multiplier.name, "", f"readout{tied}", "", "", f"{value:.3g}")
    return table


def _change(value: int, base: int) -> str:
    return f"{value}" if value == base else f"{value} (base {base})"


def _short(count: int) -> str:
    for size, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= 10 * size:
            return f"{count / size:.0f}{suffix}"
    return str(count)
