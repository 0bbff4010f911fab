"""What recipes share: commands, processes, files of results, fits, text; and each command in a process of its own."""

import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.recipe_results import RECIPES

from mlu_lightning.quickstart.study import load_text
from recipes.common import studies
from recipes.common.fits import fit_slope
from recipes.common.text import Text
from recipes.paper_linear.run import main


@dataclass(frozen=True)
class Settings:  # settings of a study, and one of its results
    seeds: int = 2
    name: str = "a"


def result_file(path: Path, settings: Settings) -> Any:
    return studies.ResultFile(path, asdict(settings), lambda content: Settings(**content))


def test_what_cannot_be_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"seeds": 0, "workers": -1}.items():
        with pytest.raises(SystemExit, match=f"--{name} is {value}, and at least one is needed"):
            main([f"--{name}={value}", f"--output={tmp_path}"])
    with pytest.raises(SystemExit):
        main(["--quick=maybe"])
    monkeypatch.setattr(studies, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'mlu-lightning\[plots\]'"):
        main(["--quick", f"--output={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_file_of_results(tmp_path: Path) -> None:
    file = result_file(tmp_path / "new" / "results.jsonl", Settings())
    assert file.read() == file.read() == []
    for seeds in (3, 4, 5):
        file.append(Settings(seeds))
    assert [result.seeds for result in file.read()] == [3, 4, 5]
    with file.path.open("a") as half:
        half.write('{"seeds": ')
    assert len(file.read()) == 3
    file.append(Settings(6))
    assert len(file.read()) == 4, "what was cut off is not in the way"
    file.append(Settings(math.nan))
    assert math.isnan(file.read()[-1].seeds), "a run that diverged"
    with pytest.raises(SystemExit, match=r"other settings \(name, seeds\).*another folder, or remove that one"):
        result_file(file.path, Settings(3, "b")).read()
    assert json.loads(file.path.read_text().splitlines()[0]) == {"seeds": 2, "name": "a"}


def test_results_are_in_order_and_an_error_ends_the_others(in_this_process: None) -> None:
    started = []

    def double(case: int) -> int:
        started.append(case)
        time.sleep(0.1)
        return 2 * case if case >= 0 else case // 0

    assert studies.in_processes(double, [1, 2, 3], 2, "cases", studies.console()) == [2, 4, 6]
    assert started == [3, 2, 1], "the most expensive first"
    with pytest.raises(ZeroDivisionError):
        studies.in_processes(double, [1, 2, 3, 4, 5, -1], 2, "cases", studies.console())
    assert len(started) <= 5, "the others were not begun"


def test_slope_of_a_power_law() -> None:
    two, three = (fit_slope(x, [5 * value**-0.75 for value in x]) for x in ([2, 8], [2, 8, 32]))
    assert (three.value, three.factor, str(three)) == (pytest.approx(-0.75), pytest.approx(5), "-0.75 ± 0.00")
    assert two.value == pytest.approx(-0.75) and math.isnan(two.error), "two points say nothing about the error"
    assert math.isnan(fit_slope([2, 8], [5, math.nan]).value)


def test_slope_and_its_error_are_those_of_numpy() -> None:
    x = np.array([1, 2, 4, 8, 16.0])
    y = 3 * x**-0.5 * np.exp(0.1 * np.random.default_rng(0).standard_normal(5))
    (value, offset), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    slope = fit_slope([*x, 32.0], [*y, math.nan])
    assert (slope.value, slope.factor) == (pytest.approx(value), pytest.approx(math.exp(offset)))
    assert slope.error == pytest.approx(covariance[0, 0] ** 0.5)


def test_data_depend_on_their_own_seed_only() -> None:
    def batches(of_torch: int, **seed: int) -> torch.Tensor:
        torch.manual_seed(of_torch)
        return torch.stack(list(Text(context=8, batches=5, batch_size=3, **seed).train_dataloader()))

    first = batches(1)
    assert first.shape == (5, 3, 9) and torch.equal(first, batches(2)) and not torch.equal(first, batches(2, seed=1))


def test_samples_are_parts_of_the_text() -> None:
    text = load_text()
    cut, data = len(text) * 9 // 10, Text(context=20, batches=4, batch_size=2)
    assert all(bytes(sample.tolist()) in text[:cut] for batch in data.train_dataloader() for sample in batch)
    validation = [bytes(sample.tolist()) for batch in data.val_dataloader() for sample in batch]
    assert all(sample in text[cut:] for sample in validation)
    assert validation[0] == text[cut : cut + 21] and validation[-1] == text[-21:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "arguments", "said"),
    [
        ("lr_transfer", "study --quick --preset=cpu", "largest drift"),
        ("lr_transfer", "study --quick --preset=accelerator", "largest drift"),
        ("paper_linear", "--quick --seeds=1", "stream, all of it"),
        ("phase_diagram", "--quick --seeds=1", "Slope of the local feature update"),
        ("reference_run", "study --quick", "small runs: 8 of 8 to be trained"),
    ],
)
def test_quick_run_as_a_command(recipe: str, arguments: str, said: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"recipes.{recipe}.run", *arguments.split(), f"--output={tmp_path}"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=RECIPES.parent).stdout
    assert said in printed and (tmp_path / f"{recipe}.png").stat().st_size > 20_000
