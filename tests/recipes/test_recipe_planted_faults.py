"""Faults that are planted in plans, the model with every role, and the study of what the check says of them."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.recipe_results import cells
from rich.console import Console

from mlu_lightning import Plan
from mlu_lightning.table import OptimizerFamily, Role, Variant
from recipes.check import planted_faults
from recipes.check.plan_faults import FACTORS, Fault, faulty
from recipes.check.planted_faults_model import Everything, Norms

NORMS: tuple[Norms, ...] = ("before", "both", "after")
TOKENS = torch.arange(66).reshape(2, 33) % 60


def plan_of(norms: Norms) -> Plan:
    torch.manual_seed(0)
    return Plan.from_model(Everything(60, 3, 4, 64, norms), TOKENS, base=Everything(60, 1, 2, 32, norms))


def test_every_role_of_the_table_has_its_faults() -> None:
    rows = {(one.role, one.variant) for norms in NORMS for one in plan_of(norms).parameters.values()}
    # the model's matrices on the stream are in its head, where one of them is a stream_bounded_matrix
    plain = {*Role} - {Role.STREAM_MATRIX, Role.STREAM_BOUNDED_MATRIX, Role.FROZEN}  # what is left alone has no factors
    variants = {(Role.BRANCH_OUT, Variant.BEFORE_NORM), (Role.STREAM_NORM, Variant.POST_NORM)}
    assert rows == {(role, None) for role in plain} | variants | {(Role.STREAM_MATRIX, Variant.IN_HEAD)}
    assert {row for model in planted_faults.MODELS.values() for row in model.rows} == rows


def _title(case: planted_faults.Case) -> str:
    return planted_faults._title(case).replace("/", " ")


@pytest.mark.parametrize("family", [OptimizerFamily.ADAMW, OptimizerFamily.SGD])
def test_a_fault_changes_one_factor_of_one_role_and_nothing_else(family: OptimizerFamily) -> None:
    for norms in NORMS:
        plan = plan_of(norms)
        rows = dict.fromkeys((one.role, one.variant) for one in plan.parameters.values())
        faults = (Fault(role, factor, variant) for role, variant in rows for factor in FACTORS)
        for fault in (fault for fault in faults if fault.is_possible(family)):
            wrong = faulty(plan, fault)
            before, after = plan.scales(family), wrong.scales(family)
            changed = {
                (plan.parameters[name].row, factor)
                for name, factor in product(before, set(FACTORS) - {"multiplier"})
                if getattr(before[name], factor) != getattr(after[name], factor)
            }
            values = {one: (plan.forward_multiplier(one), wrong.forward_multiplier(one)) for one in plan.multipliers}
            multiplied = {one.kind for one, (right, value) in values.items() if right != value}
            if fault.factor == "multiplier":
                assert (changed, multiplied) == (set(), {"readout" if fault.role is Role.READOUT else "branch"})
            elif fault.role is not Role.STREAM_MATRIX or family is OptimizerFamily.ADAMW:
                assert (changed, multiplied) == ({(fault.row, fault.factor)}, set()), fault
            # else the factors of one dimension of the stream cancel that of the other


def test_forgotten_is_one_and_foreign_is_a_power_of_the_embedding() -> None:
    plan = plan_of("before")

    def scale(role: Role, factor: Any, name: str) -> Any:
        return faulty(plan, Fault(role, factor)).scales("adamw")[f"{name}.weight"]

    forgotten = scale(Role.BRANCH_IN, "lr", "blocks.0.branches.0.query")
    assert (forgotten.lr, forgotten.weight_decay) == (1.0, 2.0)
    assert scale(Role.EMBEDDING, "std", "tokens").std == pytest.approx(2**-0.5)
    assert scale(Role.EMBEDDING, "lr", "tokens").lr == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("case", planted_faults._cases(seeds=3, repeats=1, right=0, quick=False), ids=_title)
def test_every_fault_is_found_and_named(case: planted_faults.Case) -> None:
    outcome = planted_faults.measure(case)
    assert outcome.verdict == "fail" and case.fault is not None and case.fault.row in outcome.named


@pytest.mark.slow
@pytest.mark.parametrize("case", planted_faults._cases(seeds=3, repeats=0, right=10, quick=False), ids=_title)
def test_plans_without_a_fault_pass(case: planted_faults.Case) -> None:
    """Ten in a row with either optimizer, each with other seeds; a noisy router may leave models of every role undecided."""
    assert planted_faults.measure(case).verdict in (("pass",) if case.model == "Transformer" else ("pass", "undecided"))


@pytest.mark.slow
def test_quick_study(in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted_faults.main(["--quick", "--seeds=1", f"--output={tmp_path}"])
    assert "branch_in" in capsys.readouterr().out and (tmp_path / "outcomes.json").exists()


def test_tables_count_what_is_found_and_named() -> None:
    fault = Fault(Role.BRANCH_IN, "lr")

    def outcome(verdict: str, first: str, fault: Fault | None = fault) -> planted_faults.Outcome:
        case = planted_faults.Case("Transformer", "adamw", fault, False, 0, 1)
        return planted_faults.Outcome(case, verdict, (first,), 10.0)

    outcomes = [outcome("fail", "branch_in"), outcome("fail", "branch_out"), outcome("undecided", "")]
    outcomes += [outcome("pass", "", None), outcome("undecided", "", None)]
    console = Console(width=120, record=True)
    console.print(planted_faults._faults_table(outcomes))
    console.print(planted_faults._right_table(outcomes))
    text = console.export_text()
    assert "2, 1 / 3" in text and cells(text.splitlines()[-2]) == ["Transformer", "adamw", "2", "1", "1", "0", "10"]
