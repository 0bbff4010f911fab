"""The recipe of factors tuned at a base: which runs are made, tables, a quick study, and the samplers that it compares."""

from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
from helpers.trainers import quiet
from rich.table import Table
from rich.text import Text

from recipes.tune.preset import relative, with_factors
from recipes.tune.report import loss_table, losses_of, verdicts
from recipes.tune.run import main
from recipes.tune.runs import METHODS, Run, Study, missing_runs
from recipes.tune.samplers import DIMENSIONS, SAMPLERS, Search, sampler_table, train
from recipes.tune.small_bases import Change, Comparison, Networks

BEST = {"SP, lr tuned here": -7.2, "SP, same factors, lr tuned here": -4.1}
STUDY = replace(Study(), seeds=2, shapes={name: Study().shapes[name] for name in ("base", "8 × D")})


def loss(run: Run) -> float:
    """A parabola in the learning rate, whose seeds differ, and that of MLU is lowest with factors."""
    lowest = {"MLU, tuned": 1.9, "MLU, lr alone": 2.1}.get(run.method, 2.0) + (0.1 if run.shape == "base" else 0)
    return lowest + 0.01 * run.seed + 0.1 * (run.exponent - BEST.get(run.method, -5.5)) ** 2


def all_runs() -> list[Run]:
    runs: list[Run] = []
    while missing := missing_runs(STUDY, runs, -5.5):
        runs.append(replace(missing[0], loss=loss(missing[0])))
    return runs


def cells(table: Table, row: int) -> list[str]:
    return [Text.from_markup([*column.cells][row]).plain for column in table.columns]


def test_learning_rates_are_searched_where_they_are_tuned_and_nowhere_else() -> None:
    runs = all_runs()
    tried: dict[tuple[str, int], set[float]] = {}
    for run in runs:
        if run.shape == "8 × D":
            tried.setdefault((run.method, run.seed), set()).add(run.exponent)
    for method, (_, _, tunes, _) in METHODS.items():
        if not tunes:
            assert tried[method, 0] == tried[method, 1] == {-5.5}
    low, high = (method for method, (_, _, tunes, _) in METHODS.items() if tunes)
    assert (tried[low, 0], tried[low, 1]) == ({-8.5, -7.5, -6.5, -5.5}, {-7.5, -6.5})
    assert (tried[high, 0], tried[high, 1]) == ({-6.5, -5.5, -4.5, -3.5}, {-4.5, -3.5})
    assert {run.method for run in runs if run.shape == "base"} == {"MLU, lr alone", "MLU, tuned"}
    assert len(runs) == len({(run.shape, run.method, run.exponent, run.seed) for run in runs})


def test_tables_take_the_best_learning_rate_of_all_seeds() -> None:
    runs = all_runs()
    found = losses_of(STUDY, runs, "8 × D", "SP, lr tuned here")
    assert found is not None and found[0] == -7.5
    assert found[1] == pytest.approx([2.009, 2.019])
    table = loss_table(STUDY, runs)
    assert cells(table, 0)[1:4] == ["2.205 ± 0.005", "2.005 ± 0.005*", "2.005 ± 0.005*"]
    assert cells(table, 1)[2:5] == ["1.905 ± 0.005*", "2.005 ± 0.005", "2.014 ± 0.005 2^-7.5"]
    assert ": MLU, lr alone +0.200 ± 0.000; CompleteP, same factors +0.100 ± 0.000; " in next(verdicts(STUDY, runs))
    assert losses_of(STUDY, runs[:3], "8 × D", "MLU, tuned") is None


@pytest.mark.parametrize("name", ["trust region", "TPE"])
def test_samplers_find_a_minimum(name: str) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=SAMPLERS[name](0))
    study.optimize(lambda trial: sum((trial.suggest_float(axis, -4, 4) - 1) ** 2 for axis in "xy"), n_trials=60)
    assert study.best_value < 0.15
    table = sampler_table([Search(name, seed, (2.0, 1.0 + seed), 3.0, 2.0) for seed in (0, 1)])
    assert cells(table, 0) == [name, "2", "-", "-", "1.500 ± 0.500", "1.000 ± 0.000"]


def test_factors_of_the_small_model_are_those_of_roles() -> None:
    default = dict.fromkeys(DIMENSIONS, 0.0)
    plain = train(default, 0, 2)
    assert len({plain, *(train(default | {name: 2.0}, 0, 2) for name in DIMENSIONS)}) == 1 + len(DIMENSIONS)


def test_learning_rates_are_those_of_each_changed_base() -> None:
    """Losses are 2, at the base 3 or 4 + (exponent + 6)², so that widths gain 1 and 2."""
    compared = Comparison({"one": Change(), "other": Change(std=0.1), "third": Change(tuned_at="4 × widths")})
    runs: list[Run] = []
    while run := next(compared.missing(runs), None):
        of_base = 3 + (run.method == "other") + 0.25 * run.seed + (run.exponent + 6) ** 2
        of_wide = 2 + 0.25 * run.seed + (run.method == "third") * (run.exponent + 5) ** 2
        runs.append(replace(run, loss=of_base if run.shape == "base" else of_wide))
    assert len(runs) == 3 * (4 + 2 + 3)
    table = compared.table(runs)
    expected = [("2^-6", 3.25, 1), ("2^-6", 4.25, 2), ("2^-5", 4.25, 2)]
    assert [cells(table, row)[1:] for row in range(3)] == [
        [lr, f"{base:.3f} ± 0.144", "2.250 ± 0.144", f"{gain:.3f} ± 0.000"] for lr, base, gain in expected
    ]
    (wide,) = Change().training(4, -6, 0).make()[0].networks
    assert wide.readout.weight is wide.tokens.weight and wide.tokens.weight.shape[1] == 128


def test_models_side_by_side_are_trained_as_each_alone() -> None:
    pair = [Change("package", steps=3), Change(steps=3)]
    data, ends = pair[0].data(0), {}
    for names in ((0,), (1,), (0, 1)):
        torch.manual_seed(0)
        module = Networks([pair[place] for place in names], [(2**-6, 2**-5)[place] for place in names])
        for place, network in zip(names, module.networks, strict=True):
            torch.manual_seed(place)
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, std=0.1)
        quiet(max_steps=3).fit(module, data)
        ends[names] = [parameter.detach().clone() for network in module.networks for parameter in network.parameters()]
    assert all(map(torch.equal, ends[0, 1], ends[0,] + ends[1,]))


def test_factors_of_many_models_are_beside_the_learning_rate_and_of_roles_that_a_model_has() -> None:
    found = {"embedding": {"lr": 6.0, "std": 0.5}, "branch_in": {"lr": 2.0}, "stream_norm": {"lr": 2.0}}
    preset = relative(found | {"readout": {"lr": 4.0, "multiplier": 3.0}})
    of_roles = {"embedding": {"lr": 3.0, "std": 0.5}, "branch_in": {"lr": 1.0}}
    assert preset == of_roles | {"readout": {"lr": 2.0, "multiplier": 3.0}}
    own = with_factors({"untied": Change("llama"), "tied": Change()}, preset)
    assert own["untied"].tuned == preset
    assert own["tied"].tuned == preset | {"readout": {"multiplier": 3.0}}


@pytest.mark.slow
def test_quick_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["--quick"], ["study", "--quick"]):  # the second finds everything done
        main([*command, "--workers=1", f"--output={tmp_path}"])
        assert "2 × depth" in capsys.readouterr().out
    assert {"tuned.yaml", "tune_shapes.png", "runs.jsonl"} <= {file.name for file in tmp_path.iterdir()}
    main(["samplers", "--quick", f"--output={tmp_path / 'samplers'}"])
    assert "trust region" in capsys.readouterr().out
    for command, line in (("bases", "as it is"), ("preset", "llama")):
        main([command, "--quick", "--workers=1", f"--output={tmp_path / command}"])
        assert line in capsys.readouterr().out
