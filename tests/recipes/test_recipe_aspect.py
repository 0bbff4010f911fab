"""The recipe of aspect ratios at its smallest size, and what it computes of measurements, against closed forms."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.recipe_results import cells
from helpers.trainers import loader, quiet

from mlu_lightning import Plan, Shape
from mlu_lightning.models import ResNet
from recipes.aspect import attention, limit, report
from recipes.aspect import run as recipe
from recipes.aspect.muon import MuonTransformer
from recipes.common.gradient_descent import Problem
from recipes.lr_transfer.runs import Study, capped, plans_of, shared_runs
from recipes.paper_rates.run import paper_problem

SIZES = {"inputs": 3, "outputs": 2}


@pytest.mark.slow
def test_quick_study(in_this_process: None, tmp_path: Path, capsys: Any) -> None:
    recipe.main(["study", "--quick", "--workers=1", f"--output={tmp_path}"])
    printed = capsys.readouterr().out
    shapes = [row[:3] for row in map(cells, printed.splitlines()) if len(row) > 2 and row[2][:1].isdigit()]
    assert shapes == [["base", "1.00", "0.71"], ["hidden 8", "0.71", "0.50"], ["embedding 64", "4.00", "2.83"]]
    assert (tmp_path / "aspect.png").stat().st_size > 20_000


def test_command_that_is_none() -> None:
    with pytest.raises(SystemExit, match="Give one of: study, curves, limit, attention"):
        recipe.main([])


@pytest.mark.slow
def test_quick_curves_and_limit(tmp_path: Path, capsys: Any) -> None:
    recipe.main(["curves", "--quick", f"--output={tmp_path}"])
    recipe.main(["limit", "--quick", f"--output={tmp_path}"])
    printed = capsys.readouterr().out
    rows = [cells(line) for line in printed.splitlines() if line.startswith("│")]
    assert [row[:3] for row in rows] == [
        [name, str(hidden), f"{hidden // 16}"] for name in ("MLU", "CompleteP", "SP") for hidden in (16, 32)
    ]
    assert len({row[3] for row in rows if row[1] == "16"}) == 1, "the same network at the smallest width"
    assert all((tmp_path / f"aspect_{name}.png").stat().st_size > 10_000 for name in ("curves", "limit"))


def test_shipped_studies() -> None:
    for name, content in recipe.STUDIES.items():
        part = Study(**content)
        assert part.seeds == 3 and part.parameterizations == ["mlu", "completep", "mup", "sp", "capped"], name
        assert all(len(part.shapes(axis)) > 1 for axis in part.axes)


def test_muon_trains_matrices_of_branches_as_fast_as_adamw_trains_the_rest() -> None:
    """AdamW's first step is the learning rate in every entry; of Muon's, 0.2 times it in RMS, but for its approximation."""
    sizes = {"vocabulary": 11, "context": 8, "depth": 1, "embedding": 16, "heads": 4, "head_dim": 4, "mlp_hidden": 16}
    module, trainer = MuonTransformer(**sizes, lr=0.01, schedule_steps=4), quiet(max_steps=1)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    trainer.fit(module, loader([torch.arange(144).view(16, 9) % 11] * 2))
    moved = zip(module.named_parameters(), before, strict=True)
    steps = {name: float((parameter - old).detach().square().mean().sqrt()) for (name, parameter), old in moved}
    muon = [steps.pop(name) / 0.01 for name in [*steps] if "branches" in name and "norm" not in name]
    assert trainer.global_step == 1 and len(muon) == 6 and all(0.12 < step < 0.28 for step in muon)
    assert steps["norm.weight"] == pytest.approx(0.01, rel=1e-2)


def test_capped_std() -> None:
    """√(D/(L·M)) is not above 1, or above the base's where that is larger."""

    def std(base: tuple[int, int, int], shape: tuple[int, int, int]) -> float:
        plan = Plan.from_model(ResNet(*shape, **SIZES), base=ResNet(*base, **SIZES))
        own, held = (p.scales("sgd")["blocks.0.write.weight"].std for p in (plan, capped(plan)))
        assert own == pytest.approx(math.sqrt(shape[2] / base[2]) / (shape[1] / base[1]))
        return held / own

    assert std((2, 8, 4), (2, 8, 16)) == 1  # √(16/16) is 1
    assert std((2, 8, 4), (2, 8, 64)) == pytest.approx(1 / 2)  # √(64/16) is 2
    assert std((2, 2, 16), (2, 2, 64)) == pytest.approx(1 / 2)  # from 2 to 4
    assert std((2, 2, 16), (2, 8, 16)) == 1


def test_runs_with_a_cap_are_those_of_others_where_there_is_none() -> None:
    part = Study(**recipe.STUDIES["resnet, M = 32"] | recipe.QUICK)
    shared = shared_runs(plans_of(part))
    grown = [part.shapes(axis)[factor] for axis, factor in (("M", 2), ("D", 16))]
    assert [shared[shape, "capped"] for shape in grown] == ["mlu", "capped"]


@pytest.mark.parametrize("name", ["completep", "sp"])
def test_numbers_of_others_in_the_absolute_form(name: Any) -> None:
    """At the same depth and embedding, factors of the plan of a base are those of the absolute form over the base's."""
    problem: Problem = paper_problem()
    sizes = {"inputs": 5, "outputs": 5, "train_embedding": False}
    (_, small), (module, large) = (problem.model(2, hidden, 4) for hidden in (8, 32))
    large = replace(large, tuned=limit.tuned_of(name, 4.0))
    wanted = Plan.from_model(module, base=ResNet(2, 8, 4, **sizes), parameterization=name).scales("sgd")
    for block in ("blocks.0.read.weight", "blocks.1.write.weight"):
        own, base = large.scales("sgd")[block], small.scales("sgd")[block]
        assert (own.std / base.std, own.lr / base.lr) == pytest.approx((wanted[block].std, wanted[block].lr))


def test_onset_is_found() -> None:
    sizes = np.log2([0.25, 0.5, 1, 2, 4, 8, 16])
    start, slope, scatter = report.fit_onset(sizes, -1.5 * np.maximum(0, sizes - math.log2(1.5)))
    assert (2**start, slope) == pytest.approx((1.5, -1.5), rel=0.05) and scatter < 0.05
    assert report.fit_onset(sizes, np.zeros(7))[1:] == (0, 0)


def test_constants_of_two_terms_are_found() -> None:
    shapes = [Shape(4, 16, 8), Shape(4, 16, 64), Shape(4, 256, 64)]
    errors = {
        s: math.hypot(2.2 * math.sqrt(s.embedding / (s.depth * s.hidden)), 2.5 / math.sqrt(s.embedding)) for s in shapes
    }
    assert attention.fit_two(errors) == pytest.approx((2.2, 2.5, 0), abs=1e-6)
