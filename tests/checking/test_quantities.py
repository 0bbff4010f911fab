"""How quantities should grow: the theory against the table, and the slopes that finite networks may have."""

import math

import pytest
from helpers.check_reports import READ
from helpers.table_by_hand import ROWS

from mlu_lightning.checking.quantities import Kind, Quantity, expected_size, lowest_and_highest
from mlu_lightning.table import OptimizerFamily, Ratios, Role, Variant, scale


def table_says(role: Role, variant: Variant | None, ratios: Ratios, kind: Kind) -> float:
    """What start and update of a role are by the table: std times inputs added at random; Adam's lr times all inputs."""
    entry = scale(role, ratios, OptimizerFamily.ADAMW, variant=variant)
    if kind is Kind.START:
        return entry.multiplier * entry.std * math.sqrt(ratios.inputs)
    return entry.multiplier * entry.lr * ratios.inputs


@pytest.mark.parametrize(("role", "variant"), ROWS)
@pytest.mark.parametrize("kind", [Kind.START, Kind.UPDATE])
def test_expectations_of_the_theory_are_what_the_table_makes(role: Role, variant: Variant | None, kind: Kind) -> None:
    """Two statements of one theory: sizes that should not change, and the factors by which they do not."""
    ratios = Ratios(depth=3.0, inputs=5.0, outputs=7.0)
    if not role.is_matrix:
        ratios = Ratios(depth=3.0, outputs=7.0)
    if role is Role.EMBEDDING:
        ratios = Ratios(outputs=7.0)
    expected = expected_size(kind, role, variant, ratios, role in (Role.BRANCH_OUT, Role.BRANCH_OUT_BIAS))
    assert expected == pytest.approx(table_says(role, variant, ratios, kind), rel=1e-12)


def test_band_of_what_happens_at_random() -> None:
    assert lowest_and_highest(READ, "hidden") == (-0.25, 0.25)
    update, start = (Quantity(kind, "norm", "branch_norm") for kind in (Kind.UPDATE, Kind.START))
    assert [lowest_and_highest(update, axis) for axis in ("hidden", "embedding")] == [(-0.75, 0.25), (-0.25, 0.75)]
    assert lowest_and_highest(start, "hidden") == (-0.25, 0.25)
