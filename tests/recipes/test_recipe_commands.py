"""The commands of recipes: what they share, and each as a process of its own with the smallest settings."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.recipe_results import RECIPES

from recipes.common import studies
from recipes.paper_linear.run import main


@dataclass(frozen=True)
class Settings:
    """Settings of a study, and one of its results."""

    seeds: int = 2
    name: str = "a"


def result_file(path: Path, settings: Settings) -> Any:
    return studies.ResultFile(path, settings, asdict, lambda content: Settings(**content))


def test_what_cannot_be_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="--seeds is 0, and at least one is needed"):
        main(["--seeds=0", f"--output={tmp_path}"])
    with pytest.raises(SystemExit, match="--workers is -1, and at least one is needed"):
        main(["--workers=-1", f"--output={tmp_path}"])
    with pytest.raises(SystemExit):
        main(["--quick=maybe"])
    monkeypatch.setattr(studies, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'mlu-lightning\[plots\]'"):
        main(["--quick", f"--output={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_file_of_results(tmp_path: Path) -> None:
    file = result_file(tmp_path / "new" / "results.jsonl", Settings())
    assert file.read() == [] and file.read() == []
    for seeds in (3, 4, 5):
        file.append(Settings(seeds))
    assert [result.seeds for result in file.read()] == [3, 4, 5]
    with file.path.open("a") as half:
        half.write('{"seeds": ')
    assert len(file.read()) == 3
    file.append(Settings(6))
    assert len(file.read()) == 4, "what was cut off is not in the way"
    with pytest.raises(ValueError, match="not JSON compliant"):
        file.append(Settings(math.nan))
    with pytest.raises(SystemExit, match=r"other settings \(name, seeds\).*another folder, or remove that one"):
        result_file(file.path, Settings(3, "b")).read()
    assert json.loads(file.path.read_text().splitlines()[0]) == {"seeds": 2, "name": "a"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said", "figure"),
    [
        (["lr_transfer.run", "study", "--quick", "--preset=cpu"], "d log lr / d log size", "lr_transfer"),
        (["lr_transfer.run", "study", "--quick", "--preset=accelerator"], "d log lr / d log size", "lr_transfer"),
        (["paper_linear.run", "--quick", "--seeds=1"], "stream, all of it", "paper_linear"),
        (["phase_diagram.run", "--quick", "--seeds=1"], "Slope of the local feature update", "phase_diagram"),
        (["reference_run.run", "study", "--quick"], "small runs: 8 of 8 to be trained", "reference_run"),
    ],
    ids=lambda value: value[0] + value[-1] if isinstance(value, list) else "",
)
def test_quick_run_as_a_command(arguments: list[str], said: str, figure: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"recipes.{arguments[0]}", *arguments[1:], f"--output={tmp_path}"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=RECIPES.parent).stdout
    assert said in printed
    assert (tmp_path / f"{figure}.png").stat().st_size > 20_000
