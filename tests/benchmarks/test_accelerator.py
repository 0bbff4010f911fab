"""The script for an accelerator runs to its end, here on a CPU with a tiny Transformer."""

import logging
from pathlib import Path

import accelerator
import pytest
from transformer_variants import Size


def test_all_parameterizations_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "PRESENT", ["plain", "hook", "fold"])
    out, level = tmp_path / "table.txt", logging.getLogger("lightning.pytorch").level
    accelerator.main(Size(3, 64, 2, context=8, head_dim=8), "cpu", rounds=2, steps=1, compiled=False, out=out)
    logging.getLogger("lightning.pytorch").setLevel(level)
    rows = [line.split("│")[1].strip() for line in out.read_text().splitlines() if line.startswith("│")]
    fits = ["plain", "plain", "hook", "fold", "plain, FeatureUpdate", "hook, FeatureUpdate"]
    assert rows == [*fits, "plain", "hook", "fold"]
