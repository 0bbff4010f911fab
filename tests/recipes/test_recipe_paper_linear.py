"""The recipe of the paper's linear experiment: its limits, its fits, and a quick run from one end to the other."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.recipe_results import cells, rows

from recipes.paper_linear import report
from recipes.paper_linear import run as recipe


def moments(problem: Any, covariance: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Section 5 of theory.md with its exact recursion of second moments, for any S: a at s = 1, outputs after steps."""
    x, y = problem.inputs[0].double().numpy(), problem.targets[0].double().numpy()
    inputs, r = len(x), len(x) + len(y)
    inverse, identity = np.linalg.inv(covariance), np.eye(2 * r)
    second = np.stack([np.kron(np.eye(2), covariance)] * depth)
    outputs = []
    for step in range(problem.steps + 1):
        a = [np.concatenate([x, 0 * y])]
        for layer in second:
            a.append(a[-1] + inverse @ layer[r:, :r] @ a[-1] / depth)
        outputs.append((covariance @ a[-1])[inputs:])
        if step == problem.steps:
            break
        c = np.concatenate([0 * x, outputs[-1] - y])
        for place in reversed(range(depth)):
            after, c = c, c + inverse @ second[place][:r, r:] @ c / depth
            turn = identity.copy()
            turn[:r, r:] -= problem.lr * np.outer(covariance @ a[place], after)
            turn[r:, :r] -= problem.lr * np.outer(covariance @ after, a[place])
            second[place] = turn @ second[place] @ turn.T
    return a[-1], np.stack(outputs[1:])


def test_problem_is_the_papers() -> None:
    problem = recipe.linear_problem()
    assert problem.inputs.norm() == pytest.approx(0.8) and problem.targets.norm() == pytest.approx(1)
    module, plan = problem.model(2, 3, 4)
    assert (module.embed.weight.shape, module.readout.weight.shape) == ((4, 3), (3, 4))
    assert [plan.parameters[name].base_std for name in ("embed.weight", "readout.weight")] == [1.0, 1.0]
    # η = 0.1 of ½‖f - y‖², of which the mean squared error is 2/3
    assert problem.module_lr * 2 / 3 == pytest.approx(0.1)


def test_limits_are_those_of_the_recursion_of_moments() -> None:
    problem, limit = recipe.linear_problem(), recipe._limit(16)
    a, outputs = moments(problem, np.eye(6), 16)
    assert limit.outputs.numpy() == pytest.approx(outputs, abs=1e-5)
    assert limit.streams["s=1"].numpy()[0] / math.sqrt(6) == pytest.approx(a, abs=1e-5)
    weights = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    stream, outputs_at = recipe.limit_at(weights, 16)
    a, outputs = moments(problem, (weights.T @ weights / 16).double().numpy(), 16)
    assert outputs_at.numpy() == pytest.approx(outputs, abs=1e-5)
    assert stream.numpy()[0] == pytest.approx(weights.numpy() @ a, abs=1e-5)
    assert abs(outputs_at - limit.outputs).max() > 0.01, "which is not that of D = ∞"


def test_parts_of_the_error() -> None:
    small = recipe.Case("L", depth=16, hidden=256, embedding=32, seed=0, limit_depth=16)
    point, kept = recipe.measure(small)
    assert kept is None
    wide, kept = recipe.measure(replace(small, axis="M", hidden=4096, kept="histogram"))
    assert wide.stream_of_embedding == point.stream_of_embedding
    assert wide.output_of_embedding == point.output_of_embedding
    ratio = wide.stream_of_depth_and_hidden / point.stream_of_depth_and_hidden
    assert 1 / 6 < ratio < 1 / 3, "16 times as wide"
    assert (point.size, wide.size) == (16, 4096)
    # the parts are differences whose sum is the error
    assert abs(wide.stream - wide.stream_of_embedding) < wide.stream_of_depth_and_hidden
    assert np.shape(kept.coordinates) == np.shape(kept.limits) == (3, 32)
    assert wide.stream == pytest.approx(np.sqrt(np.mean(np.subtract(kept.coordinates[2], kept.limits[2]) ** 2)))
    assert kept.deviations[0] == pytest.approx(0.8), "the norm of x"


def test_slope_of_a_sweep() -> None:
    runs = [(hidden, seed, 3 * hidden**-0.5 * (1 + seed)) for seed in (0, 1) for hidden in (16, 4, 8)]
    points = [report.Point("M", 9, hidden, 7, seed, stream, *[0.0] * 5) for hidden, seed, stream in runs]
    points.append(report.Point("L", 9, 4, 7, 0, 100.0, *[0.0] * 5))
    assert list(report.sweep(points, "M", "stream")) == [4, 8, 16]
    fitted = report.slope(points, "M", "stream")
    assert str(fitted) == "-0.50 ± 0.00" and fitted.factor == pytest.approx(3 * math.sqrt((1 + 4) / 2))


def test_quick_run(in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [case.depth * case.hidden * case.embedding for case in recipe._cases(1, quick=False)]
    assert sizes == sorted(sizes), "the largest last, which is trained first"
    recipe.main(["--quick", "--seeds=1", f"--output={tmp_path}"])
    printed = capsys.readouterr().out
    assert (tmp_path / "paper_linear.png").stat().st_size > 50_000
    points = rows(tmp_path / "points.csv")
    assert sorted(row["axis"] for row in points) == ["D"] * 6 + ["L"] * 3 + ["L, M, D"] * 2 + ["M"] * 3
    kept = json.loads((tmp_path / "streams.json").read_text())
    assert [one["kept"] for one in kept].count("histogram") == 2, "of the largest D, both seeds"
    traces = [one for one in kept if one["kept"] == "trace"]
    assert [one["shape"] for one in traces] == [[4, 16, 16], [8, 64, 64]]
    assert traces[0]["limits"] == traces[1]["limits"], "W of the smaller one is the first part of the larger one's"
    # a slope of the table, from the points
    sweep = [row for row in points if row["axis"] == "M"]
    x, y = (np.log([float(row[key]) for row in sweep]) for key in ("hidden", "output"))
    line = next(line for line in printed.splitlines() if line.startswith("│ output, all of it       │ M "))
    assert cells(line)[5].split(" ±")[0] == f"{np.polyfit(x, y, 1)[0]:.2f}"
