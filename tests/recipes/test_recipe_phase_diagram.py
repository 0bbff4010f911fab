"""The recipe of the phase diagram: its edits of plans, what it measures, its verdicts, and a quick run."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.recipe_results import cells, rows

from mlu_lightning import attach_multipliers, initialize
from mlu_lightning.application.initialization import planned_stds
from recipes.common import gradient_descent as descent
from recipes.paper_rates.run import paper_problem
from recipes.phase_diagram import report
from recipes.phase_diagram import run as recipe

L, M, D = 16, 32, 9


EDITED = {  # multiplier of branches, std of what reads and what writes, lr of what reads and what writes
    "MLU": (1 / L, 1 / 3, 3 / M, L * M / D, L * D / M),
    "MLU, α = 4": (4 / L, 1 / 3, 3 / M, L * M / D / 16, L * D / M / 16),
    "1/√L, η/L": (1 / 4, 1 / 3, 3 / M, M / D, D / M),
    "1/√L, η": (1 / 4, 1 / 3, 3 / M, L * M / D, L * D / M),
    "1/M, η·D": (1 / L / 3, 1 / 3, 3 / M, L * M, L * D * D / M),
    "1/M, η": (1 / L, 1 / 3, 1 / M, L * M / D, L * D / M),
    "none, η": (1.0, 1 / 3, M**-0.5, 1.0, 1.0),
}


@pytest.mark.parametrize("variant", recipe.VARIANTS)
def test_edited_plans(variant: str) -> None:
    multiplier, *numbers = EDITED[variant]
    module, plan = recipe.paper_problem().model(L, M, D)
    edited = recipe.VARIANTS[variant](plan)
    branches = [entry for entry in edited.multipliers if entry.kind == "branch"]
    assert [edited.forward_multiplier(entry) for entry in branches] == pytest.approx([multiplier] * L)
    scales, stds = edited.scales("sgd"), planned_stds(edited)
    names = "blocks.3.read.weight", "blocks.3.write.weight"
    assert [stds[name] for name in names] + [scales[name].lr for name in names] == pytest.approx(numbers)
    # all else is as it was
    for name in ("embed.weight", "readout.weight"):
        assert edited.parameters[name] == plan.parameters[name] and scales[name] == plan.scales("sgd")[name]
    assert set(edited.multipliers) - set(branches) == {entry for entry in plan.multipliers if entry.kind != "branch"}
    initialize(module, edited, "normal")
    attach_multipliers(module, edited)
    assert module.blocks[0].write.weight.std().item() == pytest.approx(numbers[1], rel=0.2)


@pytest.mark.parametrize("alpha", [1.0, 4.0])
def test_local_update_is_that_of_the_papers_equations(alpha: float) -> None:
    """One step by section 2 of theory.md, in NumPy; the richness is a factor of branches, and 1/α² of the step."""
    problem, (depth, hidden, width) = replace(recipe.paper_problem(), steps=1), (3, 8, 6)
    module, plan = problem.model(depth, hidden, width)
    initialize(module, replace(plan, alpha=alpha), "normal", seed=5)
    initialize(module, replace(plan, alpha=alpha), "coupled", seed=5)
    weight = {name: values.detach().double().numpy() for name, values in module.named_parameters()}
    u = [width * weight[f"blocks.{place}.read.weight"].T for place in range(depth)]
    v = [hidden * weight[f"blocks.{place}.write.weight"] for place in range(depth)]

    def forward(u: list[Any], v: list[Any]) -> tuple[list[Any], Any]:
        h = [weight["embed.weight"] @ problem.inputs.double().numpy().T]
        for read, write in zip(u, v, strict=True):
            h.append(h[-1] + alpha / (depth * hidden) * write @ np.tanh(read.T @ h[-1] / width))
        return h, weight["readout.weight"] @ h[-1] / width

    h, f = forward(u, v)
    b = weight["readout.weight"].T @ (2 * problem.loss_scale * (f - problem.targets.double().numpy().T))
    new_u, new_v = list(u), list(v)
    for place in reversed(range(depth)):
        active = np.tanh(u[place].T @ h[place] / width)
        back = (1 - active**2) * (v[place].T @ b / width)
        new_u[place] = u[place] - problem.lr / alpha * h[place] @ back.T
        new_v[place] = v[place] - problem.lr / alpha * b @ active.T
        b = b + alpha / (depth * hidden) * u[place] @ back
    after, f = forward(new_u, new_v)
    moved = [new.T @ state / width - old.T @ state / width for new, old, state in zip(new_u, u, after, strict=False)]
    point = recipe.measure(recipe.Case("MLU", (depth, hidden, width), alpha, seed=5, limit=(4, 20)))
    assert point.local_first == pytest.approx(np.mean([np.sqrt(np.mean(part**2)) for part in moved]), rel=1e-4)
    assert point.loss_last < point.loss_first


def test_what_is_measured_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "paper_problem", lambda: replace(paper_problem(), steps=2))
    recipe._limit.cache_clear()
    case = recipe.Case("MLU", (4, 2000, 16), 1.0, seed=0, limit=(4, 2000))
    point = recipe.measure(case)
    recipe._limit.cache_clear()
    problem = recipe.paper_problem()
    module, plan, _ = descent.finite_model(problem, 4, 2000, 16, seed=0, embedding_seed=0)
    before = descent.look(module, plan, problem)
    losses, after = descent.descend(module, plan, problem), descent.look(module, plan, problem)
    assert point.stream_update == pytest.approx((after["s=1"] - before["s=1"]).square().mean().sqrt().item(), rel=1e-5)
    assert point.loss_first == pytest.approx(losses[0], rel=1e-5)
    assert point.loss_last == pytest.approx((after["output"] - problem.targets).square().sum().item() / 100, rel=1e-5)
    limit = problem.limit(4, 2000)
    descent.descend(limit.module, limit.plan, problem)
    outputs = descent.look(limit.module, limit.plan, problem)["output"]
    assert point.output_distance == pytest.approx((after["output"] - outputs).square().mean().sqrt().item(), rel=1e-4)


def point(variant: str = "MLU", shape: tuple[int, int, int] = (4, 32, 16), **values: float) -> Any:
    ones = {field.name: 1.0 for field in fields(report.Point)[4:]}
    return report.Point(variant, *shape, **ones | values)


def test_sweeps_and_their_slopes() -> None:
    quick = report.SWEEPS["quick"]
    points = [point(shape=(depth, 32, 16), local_first=3 * depth**-0.5) for depth in (8, 2, 4)]
    points += [point("another", (2, 32, 16)), point(shape=(4, 64, 16)), point(shape=quick.rich, alpha=4.0)]
    found = report.sweep(points, quick, "MLU", "L")
    assert {size: len(group) for size, group in found.items()} == {2: 1, 4: 1, 8: 1}
    assert str(report.slope(found, "local_first")) == "-0.50 ± 0.00"
    assert list(report.sweep(points, quick, "MLU", "M")) == [32, 64], "the shape that sweeps share is in all of them"
    assert list(report.sweep(points, quick, "MLU", "α")) == [4.0]


def test_verdicts() -> None:
    names = {0.2: "MLU", -0.2: "MLU", 0.3: "explodes", -0.3: "lazy"}
    assert report.verdict(report.Slope(0.0, 0.0, 1.0), diverged=True) == "diverges"
    assert {value: report.verdict(report.Slope(value, 0.02, 1.0)) for value in names} == names
    assert {report.verdict(report.Slope(value, 0.03, 1.0)) for value in names} == {"unclear"}
    assert report.verdict(report.Slope(math.nan, math.nan, math.nan)) == "unclear"
    assert not any(point(loss_last=value).diverged for value in (0.9, 1.0))
    assert all(point(loss_last=value).diverged for value in (1.1, math.inf, math.nan))


def test_numbers_that_overflowed_are_shown() -> None:
    assert report._mean([point(local_last=1e200)], "local_last") == pytest.approx(1e200), "whose square is not"
    assert report._mean([point(local_last=math.nan)], "local_last") == math.inf
    assert [report._short(value) for value in (0.123, 99.0, 1234567.0, math.inf)] == ["0.12", "99.00", "1e06", "inf"]


def test_quick_run(in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.main(["--quick", "--seeds=1", f"--output={tmp_path}"])
    printed = capsys.readouterr().out
    assert (tmp_path / "phase_diagram.png").stat().st_size > 50_000
    points = rows(tmp_path / "points.csv")
    assert len(points) == 7 * (3 + 2 + 2) + 3, "one shape is in three sweeps"
    lines = {tuple(cells(line)[:2]): cells(line) for line in printed.splitlines()}
    assert lines["MLU", "α"][4] == "lazy" and sum(len(key) == 2 and key[1] in tuple("LMD") for key in lines) == 21
    # a slope of the table, from the points
    chosen = "1/√L, η/L", "32", "16"
    sweep = [row for row in points if (row["variant"], row["hidden"], row["embedding"]) == chosen]
    x, y = (np.log([float(row[key]) for row in sweep]) for key in ("depth", "local_last"))
    assert lines["1/√L, η/L", "L"][5].split(" ±")[0] == f"{np.polyfit(x, y, 1)[0]:.2f}"


def test_seeds_alone_decide() -> None:
    case = recipe.Case("1/M, η", (2, 8, 8), 1.0, seed=3, limit=(4, 20))
    torch.manual_seed(1)
    first = recipe.measure(case)
    torch.manual_seed(2)
    assert recipe.measure(case) == first != recipe.measure(replace(case, seed=4))
