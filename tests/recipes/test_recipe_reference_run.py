"""The recipe of the reference run: its YAML, its data, its fits, and a quick study from one end to the other."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.recipe_results import RECIPES, cells, rows
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import WandbLogger

from mlu_lightning.models import CausalTransformer
from mlu_lightning.observation.reference import Reference
from mlu_lightning.quickstart.study import load_text
from recipes.common.fits import fit_slope
from recipes.common.text import Text
from recipes.reference_run import report
from recipes.reference_run import run as recipe

YAML = RECIPES / "reference_run/config.yaml"
TINY = ["--model.depth=2", "--model.heads=2", "--model.embedding=8", "--data.batches=4", "--model.schedule_steps=4"]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def test_shipped_yaml_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe.main(["fit", "--config", str(YAML), *TINY, *QUIET])
    reference = Reference.load("reference-run/reference.safetensors")
    assert reference.steps == (0, 1, 2, 3, 4)
    assert (reference.header.depth, reference.header.embedding, reference.header.hidden["attention"]) == ((4,), (8,), 2)
    assert reference.header.plan is not None, "the MLU callback is in the YAML"
    assert any(row["val_loss"] for row in rows(tmp_path / "reference-run" / "fit" / "metrics.csv"))


def test_shipped_yaml_with_the_lines_for_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    text = YAML.read_text()
    replaced = text[: text.index("    class_path: lightning.pytorch.loggers.CSVLogger")]
    rest = text[text.index("    # class_path: lightning.pytorch.loggers.WandbLogger") :]
    commented, callbacks = rest.split("  callbacks:")
    (tmp_path / "wandb.yaml").write_text(replaced + commented.replace("# ", "") + "  callbacks:" + callbacks)
    args = ["--config", f"{tmp_path}/wandb.yaml", *TINY, f"--trainer.logger.init_args.save_dir={tmp_path}"]
    cli = LightningCLI(CausalTransformer, Text, run=False, save_config_callback=None, args=args)
    assert isinstance(cli.trainer.logger, WandbLogger)


def test_data_depend_on_their_own_seed_only() -> None:
    torch.manual_seed(1)
    batches = torch.stack(list(Text(context=8, batches=5, batch_size=3).train_dataloader()))
    torch.manual_seed(2)
    assert torch.equal(batches, torch.stack(list(Text(8, 5, 3).train_dataloader())))
    assert not torch.equal(batches, torch.stack(list(Text(8, 5, 3, seed=1).train_dataloader())))
    assert batches.shape == (5, 3, 9)


def test_samples_are_parts_of_the_text() -> None:
    text = load_text()
    cut = len(text) * 9 // 10
    data = Text(context=20, batches=4, batch_size=2)
    assert all(bytes(sample.tolist()) in text[:cut] for batch in data.train_dataloader() for sample in batch)
    validation = [bytes(sample.tolist()) for batch in data.val_dataloader() for sample in batch]
    assert all(sample in text[cut:] for sample in validation)
    assert validation[0] == text[cut : cut + 21] and validation[-1] == text[-21:]


def test_slope_of_a_power_law() -> None:
    three = fit_slope([2, 8, 32], [5 * x**-0.75 for x in (2, 8, 32)])
    assert (three.value, three.factor, str(three)) == (pytest.approx(-0.75), pytest.approx(5), "-0.75 ± 0.00")
    two = fit_slope([2, 8], [5 * 2**-0.75, 5 * 8**-0.75])
    assert two.value == pytest.approx(-0.75) and math.isnan(two.error), "two points say nothing about the error"
    assert math.isnan(fit_slope([2, 8], [5, math.nan]).value)
    assert report._theory("rms", "D", [3, 2]) == f"-1/2 ({math.log(2**-0.5) / math.log(1.5):.2f})"


def test_slope_and_its_error_are_those_of_numpy() -> None:
    draws = np.random.default_rng(0)
    x = np.array([1, 2, 4, 8, 16.0])
    y = 3 * x**-0.5 * np.exp(0.1 * draws.standard_normal(5))
    (value, offset), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    slope = fit_slope([*x, 32.0], [*y, math.nan])
    assert slope.value == pytest.approx(value)
    assert slope.error == pytest.approx(covariance[0, 0] ** 0.5)
    assert slope.factor == pytest.approx(math.exp(offset))


def test_floor_is_taken_out() -> None:
    """Of err(small) = 3 and err(reference) = 4: distances are 5, and 4 √2 between references."""
    run = report.Run("M", 2, 1, 1, 1, 2)
    curve = {"rms": {1: 90.0, 2: 5.0, 3: 5.0, 4: 5.0}, "rms/floor": {1: 0.0, 2: 32**0.5, 3: 32**0.5, 4: 32**0.5}}
    found = report.Distances(run, 2.0, curve)
    assert found.final("rms") == pytest.approx(5), "of the last recordings"
    assert found.beyond("rms") == pytest.approx(3)
    near = report.Distances(run, 2.0, {"rms": {1: 1.0}, "rms/floor": {1: 2.0}})
    assert math.isnan(near.beyond("rms")), "nearer than a reference could be"


def test_quick_study(
    in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "_train", recipe.main)
    command = ["study", "--quick", f"--output={tmp_path}"]
    recipe.main(command)
    printed = capsys.readouterr().out
    assert "references: 2 of 2 to be trained" in printed and "small runs: 8 of 8 to be trained" in printed
    logs = sorted(tmp_path.glob("*/metrics.csv"))
    assert len(logs) == 10 and (tmp_path / "reference_run.png").stat().st_size > 20_000
    assert {"L8-M4-D16-seed0", "L8-M4-D16-seed1", "L8-M1-D16-seed4"} <= {log.parent.name for log in logs}

    # a number of the table, from the log of its run
    cut = tmp_path / "L8-M1-D16-seed4" / "metrics.csv"
    found = rows(cut)
    logged = [row for row in found if row["mlu/distance/rms/s=1/seed0"]]
    assert [int(row["step"]) for row in logged] == [0, 1, 2, 3, 4, 6]
    last = [float(row[f"mlu/distance/rms/s=1/{name}"]) for row in logged[-3:] for name in ("seed0", "seed1")]
    line = next(line for line in printed.splitlines() if re.match(r"│ M +│ +8 │ +1 │", line))
    assert cells(line)[5] == f"{np.sqrt(np.mean(np.square(last))):.3g}"
    assert len(re.findall(r"│ rms  .*│ -?\d\.\d\d +│ (-?\d\.\d\d|nan) +│", printed)) == 4, "a slope for each sweep"

    # again: nothing but a run whose log is not whole, and a reference whose file is not
    before = {log: log.stat().st_mtime_ns for log in logs}
    recipe.main(command)
    assert capsys.readouterr().out.count(": 0 of ") == 2
    assert {log: log.stat().st_mtime_ns for log in logs} == before
    assert found[-1]["val_loss"]
    cut.write_text("".join(cut.read_text().splitlines(True)[:-1]))
    (tmp_path / "L8-M4-D16-seed1" / "reference.safetensors").unlink()
    recipe.main(command)
    changed = {log.parent.name for log in logs if log.stat().st_mtime_ns != before[log]}
    assert changed == {"L8-M1-D16-seed4", "L8-M4-D16-seed1"}
    assert rows(cut) == found, "and it is the same run"


def test_a_run_that_fails_ends_the_study(
    in_this_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    def fail(command: list[str]) -> None:
        started.append(command)
        time.sleep(0.2)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(recipe, "_train", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        recipe.main(["study", "--quick", f"--output={tmp_path}"])
    assert len(started) <= 2, "small runs were not begun"
