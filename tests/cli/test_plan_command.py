"""``mlu-lightning plan``: what the fit of a configuration would plan, printed and saved."""

from pathlib import Path
from typing import Any

import pytest
from helpers.check_command import BASE, LARGE, RESNET, command, plugin, write

from mlu_lightning import OptimizerFamily, Plan
from mlu_lightning.cli import main


def planned(folder: Path, *options: str, **changes: Any) -> Plan:
    main(["plan", *options, write(folder, **changes), "--out", str(folder / "plan.yaml")])
    return Plan.load(folder / "plan.yaml")


def multipliers(plan: Plan) -> set[float]:
    return {multiplier.value for multiplier in plan.multipliers}


def test_plan_of_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """24 blocks next to 2, an embedding of 64 next to 8, units of 512 next to 32, and the optimizer that the model makes."""
    plan = planned(tmp_path)
    assert multipliers(plan) == {1 / 12, 1 / 8} and plan.optimizers == (OptimizerFamily.SGD,)
    printed = capsys.readouterr().out
    assert "depth 24 (base 2), embedding 64 (base 8)" in printed and "512 (base 32)" in printed
    assert "factors for sgd" in printed and f"Wrote {tmp_path / 'plan.yaml'}" in printed.replace("\n", "")
    assert planned(tmp_path) == plan  # again, over the same
    (tmp_path / "small").mkdir()
    trainer = {
        "callbacks": [{"class_path": "mlu_lightning.MLUCallback", "init_args": {"base": f"{tmp_path}/plan.yaml"}}]
    }
    small = {"class_path": RESNET, "init_args": BASE}
    assert multipliers(planned(tmp_path / "small", trainer=trainer, model=small)) == {1.0}  # a plan's base is its base


def test_configuration_without_the_callback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(tmp_path, trainer={"max_steps": 3}, model={"class_path": RESNET, "init_args": LARGE})
    assert multipliers(plan) == {1.0}
    assert "no MLUCallback in this configuration, so the plan is relative to the module's own shape" in " ".join(
        capsys.readouterr().out.split()
    )


def test_callback_without_a_base_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned(tmp_path, trainer={"callbacks": [{"class_path": "mlu_lightning.MLUCallback"}]})
    assert "MLUCallback was given neither base nor plan" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("edited.yaml", "edited.yaml is there already, and is not this plan; somebody may have edited it"),
        ("folder", "cannot be written to"),
        ("edited.yaml/plan.yaml", "cannot be made"),
        ("/", "--out '/' names no file. Give it the path of a YAML file"),
    ],
)
def test_places_that_stay_as_they_are(
    out: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "edited.yaml").write_text("an edited plan")
    (tmp_path / "folder").mkdir()
    path = write(tmp_path, model={"class_path": RESNET, "init_args": BASE}, trainer={"callbacks": [plugin(**BASE)]})
    assert command("plan", path, "--out", str(tmp_path / out)) == 1
    assert message in capsys.readouterr().err
    assert (tmp_path / "edited.yaml").read_text() == "an edited plan"
