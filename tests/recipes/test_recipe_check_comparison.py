"""The recipe that puts the check beside mup's: the same faults in both, how curves are read, and what each finds."""

import json
import math
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.recipe_modules import load
from helpers.recipe_results import cells
from helpers.trainers import quiet
from torch import Tensor, nn

from mlu_lightning import Plan
from mlu_lightning.application.initialization import planned_stds
from mlu_lightning.checking.preparation import Batches
from mlu_lightning.models import CausalTransformer
from mlu_lightning.table import Role
from mlu_lightning.utilities.names import name_pattern

pytest.importorskip("mup")
pytest.importorskip("pandas")

faults, recipe = load("recipes.check.plan_faults"), load("recipes.check.comparison")
coordinates, transformer = load("recipes.check.coordinate_check"), load("recipes.check.mup_transformer")
SMALL = {"vocabulary": 50, "context": 8, "depth": 1, "lr": 0.1, "eps": 1e-8, "weight_decay": 0.1}
WIDE = 4


def wide(fault: Any = None) -> Any:
    torch.manual_seed(0)
    return transformer.MuTransformer(WIDE, fault, embedding=32, heads=2, **SMALL)


@cache
def plan() -> Plan:
    torch.manual_seed(0)
    module, base = (CausalTransformer(embedding=32 * n, heads=2 * n, **SMALL) for n in (WIDE, 1))
    return Plan.from_model(module, base=base)


def test_roles_are_those_that_are_discovered() -> None:
    assert {name_pattern(name): role for name, role in plan().roles.items()} == transformer.ROLES


MUPS = [case.fault for case in recipe.cases(1, 1, False) if case.subject == "mup" and not case.eps]
READ_STD, READOUT_MULTIPLIER = faults.Fault(Role.BRANCH_IN, "std"), faults.Fault(Role.READOUT, "multiplier")


@pytest.mark.parametrize("fault", MUPS, ids=str)
def test_mup_has_the_numbers_of_the_plan_with_the_same_fault(fault: Any) -> None:
    right = plan()
    wrong = right if fault is None else faults.faulty(right, fault)
    module = wide(fault)
    groups = {one: group for group in module.configure_optimizers().param_groups for one in group["params"]}
    stds = planned_stds(wrong)
    for name, scale in wrong.scales("adamw").items():
        group = groups[module.get_parameter(name)]
        assert (group["lr"], group["weight_decay"]) == pytest.approx((0.1 * scale.lr, 0.1 * scale.weight_decay))
        assert group["eps"] == 1e-8, "for which mup has no rule"
        # drawn at another width than the base's, of which the plan has the sample's
        assert module.get_parameter(name).square().mean().sqrt().item() == pytest.approx(stds[name], rel=0.04)
    (readout,) = (one for one in wrong.multipliers if one.kind == "readout")
    given = torch.randn(3, 32 * WIDE)
    expected = given @ module.readout.weight.T * wrong.forward_multiplier(readout)
    torch.testing.assert_close(module.readout(given), expected)


@pytest.mark.parametrize("fault", [None, READ_STD, READOUT_MULTIPLIER], ids=str)
def test_networks_of_both_checks_are_the_same(fault: Any) -> None:
    case, batch = recipe.Case("plan", fault, False, 0, 1, (1, 2, 4)), recipe.text_batches()[0]
    torch.manual_seed(3)
    ours = recipe._transformer(case, 2)
    callback = faults.FaultyCallback(fault, recipe._transformer(case, 1))
    quiet(callback, max_steps=2).fit(ours, Batches([batch, batch]))
    torch.manual_seed(3)
    mups = recipe._network(case, 2)
    optimizer = recipe._optimizer(mups)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(mups(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(mups.get_parameter(name), parameter, msg=name)


def constant(value: float) -> nn.Linear:
    """A module whose output is as large as said, for an input of ones."""
    layer = nn.Linear(1, 5, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


class Growing(nn.Module):  # modules whose outputs are powers of the width
    def __init__(self, factor: int) -> None:
        super().__init__()
        self.flat, self.root, self.readout = constant(1), constant(factor**0.5), constant(factor**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        ones = torch.ones(*tokens.shape, 1)
        return self.flat(ones) + self.root(ones) + self.readout(ones)


def test_curves_have_the_slopes_that_were_built() -> None:
    seeds = []

    def build(factor: int) -> Growing:
        seeds.append(torch.initial_seed())
        return Growing(factor)

    def still(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), 0.0)

    tokens = torch.zeros(2, 4, dtype=torch.long)
    curves = coordinates.coordinate_check(build, still, tokens, factors=(1, 2, 4), seeds=2, steps=1, seed=5)
    names = ("flat", "root", "readout")
    assert [(curve.module, curve.t) for curve in curves] == [(name, t) for t in (1, 2) for name in names]
    assert [curve.slope for curve in curves] == pytest.approx(2 * [0.0, 0.5, -0.5], abs=1e-6)
    assert [curve.error for curve in curves] == pytest.approx([0.0] * 6, abs=1e-4)
    assert seeds == list(range(15, 21)), "each network has its own"
    assert str(curves[1]) == "root at t=1: +0.50±0.00"
    assert [coordinates.is_off(curve, "readout") for curve in curves] == 2 * [False, True, False]


NAN = math.nan
OFF = [("read", 1, 0.35, 0.01), ("read", 2, 0.45, 0.1), ("read", 2, -0.45, 0.1), ("read", 2, NAN, NAN)]
OFF += [("readout", 1, 0.0, 0.05), ("readout", 1, -1.0, 0.05), ("readout", 2, 0.5, 0.05)]
RIGHT = [("read", 1, 0.24, 0.0), ("read", 2, -0.45, 0.3)]
RIGHT += [("readout", 1, -0.5, 0.05), ("readout", 2, 0.0, 0.05), ("readout", 2, -0.5, 0.05)]


@pytest.mark.parametrize(("curve", "off"), [*product(OFF, [True]), *product(RIGHT, [False])])
def test_what_is_off(curve: tuple[str, int, float, float], off: bool) -> None:
    assert coordinates.is_off(coordinates.Curve(*curve), "readout") is off


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [batch[:8, :17] for batch in recipe.text_batches()]
    monkeypatch.setattr(recipe, "text_batches", lambda: batches)
    monkeypatch.setattr(recipe, "_DEPTH", 1)


def test_how_far_the_output_may_fall() -> None:
    slopes = [-1.0, -0.5, -0.25, 0.0, 0.25]
    curves = [coordinates.Curve("readout", t, slope, 0.0) for t in (1, 2) for slope in slopes]
    found = [coordinates.excess(curve, "readout") for curve in curves]
    assert found == [0.5, 0.0, 0.25, 0.5, 0.75, 0.5, 0.0, 0.0, 0.0, 0.25]


@pytest.mark.parametrize(
    ("subject", "factor", "verdict", "says"),
    [
        ("mup", "lr", "fail", ""),
        ("plan", "weight_decay", "pass", "largest "),  # which takes away a part in a thousand in a few steps
    ],
)
def test_what_both_find(small: None, subject: str, factor: str, verdict: str, says: str) -> None:
    case = recipe.Case(subject, faults.Fault(Role.BRANCH_IN, factor), False, 0, 2, (1, 2, 4, 8))
    outcome, right = recipe.measure(case), recipe.measure(replace(case, fault=None))
    assert (outcome.ours.verdict, outcome.ours.says, outcome.ours.named) == ("fail", "branch_in", True)
    assert outcome.mups.verdict == verdict and outcome.mups.says.startswith(says)
    assert (right.ours.verdict, right.mups.verdict) == ("pass", "pass")


def test_cases() -> None:
    found = recipe.cases(4, 3, False)
    plans = [case for case in found if case.subject == "plan" and case.fault]
    assert len(plans) == 6 * 4 + 1 and str(plans[3].fault) == "weight decay of embedding"
    assert {case.eps for case in plans if case.fault.factor != "eps"} == {False}
    assert [str(case) for case in found if case.wrong and not case.fault] == ["eps of every role"]
    assert [case.seed for case in found if not case.wrong] == 3 * [0, 4, 8]


def test_without_mup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recipe, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="compares with mup: pip install pandas, and pip install --no-deps mup"):
        recipe.main([f"--output={tmp_path}"])


@pytest.mark.slow
def test_quick_run(in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.main(["--quick", "--seeds=2", "--right=1", f"--output={tmp_path}"])
    printed = capsys.readouterr().out
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    assert len(outcomes) == 3 + 1 + 1 + 2 + 1 + 1
    lines = {tuple(cells(line)[:2]): line for line in printed.splitlines()}
    assert "found, named" in lines["plan", "weight decay of branch_in"]
    ours, _, _, theirs, first = cells(lines["mup", "lr of branch_in"])[2:7]
    assert (ours, theirs.split(",")[0]) == ("found, named", "found")  # of two networks curves do not name it
    assert "branches." in first


@pytest.mark.slow
def test_every_fault() -> None:
    """Ours finds and names them all; activations show stds, multipliers, and the lr of what they are made of mostly."""
    shown = {faults.Fault(Role.BRANCH_IN, "lr"), faults.Fault(Role.BRANCH_OUT, "lr")}
    for outcome in map(recipe.measure, recipe.cases(4, 1, False)):
        fault = outcome.case.fault
        seen = fault is not None and (fault.factor in ("std", "multiplier") or fault in shown)
        assert (outcome.mups.verdict == "fail", outcome.mups.named) == (seen, seen), outcome
        wrong = bool(outcome.case.wrong)
        assert (outcome.ours.verdict == "fail", outcome.ours.named) == (wrong, wrong), outcome
