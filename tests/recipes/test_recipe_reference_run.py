"""The recipe of the reference run: its YAML, its floor, and a quick study from one end to the other."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.recipe_results import QUIET, RECIPES, cells, rows
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import WandbLogger

from mlu_lightning.models import CausalTransformer
from mlu_lightning.observation.reference import Reference
from recipes.common.text import Text
from recipes.reference_run import report
from recipes.reference_run import run as recipe

YAML = RECIPES / "reference_run/config.yaml"
TINY = ["--model.depth=2", "--model.heads=2", "--model.embedding=8", "--data.batches=4", "--model.schedule_steps=4"]


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


def test_slope_in_theory_against_a_finite_reference() -> None:
    assert report._theory("rms", "D", [3, 2]) == f"-1/2 ({math.log(2**-0.5) / math.log(1.5):.2f})"


def test_floor_is_taken_out() -> None:
    """Of err(small) = 3 and err(reference) = 4: distances are 5, and 4 √2 between references."""
    run = report.Run("M", 2, 1, 1, 1, 2)
    curve = {"rms": {1: 90.0, 2: 5.0, 3: 5.0, 4: 5.0}, "rms/floor": {1: 0.0, 2: 32**0.5, 3: 32**0.5, 4: 32**0.5}}
    found = report.Distances(run, 2.0, curve)
    assert found.final("rms") == pytest.approx(5), "of the last recordings"
    assert found.beyond("rms") == pytest.approx(3)
    near = report.Distances(run, 2.0, {"rms": {1: 1.0}, "rms/floor": {1: 2.0}})
    assert math.isnan(near.beyond("rms")), "nearer than a reference could be"


def test_quick_study(in_this_process: None, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr(recipe, "save_figure", lambda *_: None)  # which has been drawn
    recipe.main(command)
    assert capsys.readouterr().out.count(": 0 of ") == 2 and {log: log.stat().st_mtime_ns for log in logs} == before
    assert found[-1]["val_loss"]
    cut.write_text("".join(cut.read_text().splitlines(True)[:-1]))
    (tmp_path / "L8-M4-D16-seed1" / "reference.safetensors").unlink()
    recipe.main(command)
    changed = {log.parent.name for log in logs if log.stat().st_mtime_ns != before[log]}
    assert changed == {"L8-M1-D16-seed4", "L8-M4-D16-seed1"}
    assert rows(cut) == found, "and it is the same run"
