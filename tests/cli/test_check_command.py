"""``mlu-lightning check``: from the configuration of a LightningCLI to a verdict, an exit code and files."""

import json
import os
import subprocess
import sys
from itertools import starmap
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.check_command import BASE, KEYS, LARGE, QUICK, RESNET, SHORTEST, Pairs, command, content, plugin, write
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlu_lightning import Shape
from mlu_lightning.checking.configuration import read_config

PLUGIN = plugin(**BASE)


def test_configuration_without_the_plugin_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, trainer={"max_steps": 9}, model={"class_path": RESNET, "init_args": BASE})
    assert command("check", path, "--out", str(tmp_path / "out"), *QUICK) == 3
    printed = " ".join(capsys.readouterr().out.split())
    assert "There is no MLUCallback in this training: what is checked is the module without it" in printed
    assert "branch_out: look at its multiplier or std" in printed
    written = json.loads((tmp_path / "out" / "check.json").read_text())
    assert (written["verdict"], written["base"]) == ("fail", {"depth": 2, "hidden": 1, "embedding": 1})
    assert {row["axis"] for row in written["rows"]} == {"depth"}
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["check.json", "check.png", "check.txt"]


@pytest.mark.parametrize(
    ("options", "code", "verdict"), [(SHORTEST, 4, "UNDECIDED: "), ([*QUICK, "--seeds", "5"], 0, "PASS: ")]
)
def test_exit_code(options: list[str], code: int, verdict: str, tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path, trainer={"max_steps": 9, "callbacks": [PLUGIN]})
    assert command("check", path, "--out", str(tmp_path / "out"), *options) == code
    assert verdict in capsys.readouterr().out


def test_base_is_that_of_the_callback_and_all_of_an_axis_grow_alike(tmp_path: Path) -> None:
    transformer = {"vocabulary": 9, "context": 8, "depth": 1, "embedding": 16, "heads": 2, "mlp_hidden": 24}
    large = transformer | {"depth": 12, "embedding": 128, "heads": 16, "mlp_hidden": 512}
    name = "mlu_lightning.models.CausalTransformer"
    trainer = {"callbacks": [plugin(name, **transformer)]}
    path = write(tmp_path, model={"class_path": name, "init_args": large}, trainer=trainer)
    configured = read_config(path, KEYS | {"hidden": ["heads", "mlp_hidden"]})
    assert configured.base == Shape(1, 2, 16)
    module: Any = configured.build(depth=3, hidden=8, embedding=16)
    assert len(module.branches) == 6 and module.branches[0].heads == 8
    assert module.branches[1].read.weight.shape == (96, 16)


def test_what_of_the_trainer_takes_part(tmp_path: Path) -> None:
    callbacks = [
        PLUGIN,
        {"class_path": "helpers.check_command.Twice"},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / "no")}},
        {"class_path": "mlu_lightning.FeatureUpdate"},
    ]
    trainer = {"max_steps": 9, "callbacks": callbacks, "gradient_clip_val": 0.5, "precision": "64-true", "devices": 4}
    configured = read_config(write(tmp_path, trainer=trainer), KEYS)
    assert configured.trainer == {"gradient_clip_val": 0.5, "precision": "64-true"}
    found = configured.callbacks(configured.build(2, 32, 8))
    assert [type(callback).__name__ for callback in found] == ["MLUCallback", "Twice"]
    assert type(configured.data()).__name__ == "Pairs"


def logger(name: str, folder: Path) -> dict[str, Any]:
    return {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": {"save_dir": str(folder)}}


def test_loggers_get_the_figure_and_the_verdict(tmp_path: Path) -> None:
    trainer = {"logger": [logger("TensorBoardLogger", tmp_path / "tb")], "callbacks": [PLUGIN]}
    configured = read_config(write(tmp_path, trainer=trainer), KEYS)
    assert [type(one).__name__ for one in configured.loggers()] == ["TensorBoardLogger"]
    for given in (True, False, None):
        assert read_config(write(tmp_path, trainer={"logger": given}), KEYS).loggers() == []


@pytest.mark.slow
def test_command_logs_to_the_loggers_of_the_configuration(tmp_path: Path) -> None:
    """The installed command in a process of its own, with real files of TensorBoard and of W&B without a network."""
    folders = {"TensorBoardLogger": tmp_path / "tensorboard", "WandbLogger": tmp_path / "wandb"}
    path = write(tmp_path, trainer={"logger": [*starmap(logger, folders.items())], "callbacks": [PLUGIN]})
    folders["WandbLogger"].mkdir()
    program = [str(Path(sys.executable).with_name("mlu-lightning")), "check", path, *QUICK, "--out", "out"]
    packages = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": packages, "WANDB_MODE": "offline"}
    done = subprocess.run([*program, "--log", "true"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 4), done.stderr
    verdict = {0: "pass", 4: "undecided"}[done.returncode]
    assert json.loads((tmp_path / "out" / "check.json").read_text())["verdict"] == verdict
    events = EventAccumulator(str(next(folders["TensorBoardLogger"].rglob("events.*")).parent)).Reload()
    assert [image.width > 100 for image in events.Images("mlu/check")] == [True]
    (text,) = events.Tensors("mlu/check/text_summary")
    assert f"{verdict.upper()}: " in text.tensor_proto.string_val[0].decode()
    (run,) = folders["WandbLogger"].glob("wandb/offline-run-*")
    assert len(list(run.glob("files/media/images/mlu/check_*.png"))) == 1
    assert len(list(run.glob("files/media/table/mlu/check/rows_*.json"))) == 1


def test_configuration_of_a_command_and_of_one_class(tmp_path: Path) -> None:
    """What ``LightningCLI(ResNet, Pairs)`` saves does not name its classes."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"fit": {"model": LARGE, "data": {}, "trainer": {"callbacks": [PLUGIN]}}}))
    refusal = r"does not say which class its model is of.* Give it: --model my_package.MyModule"
    with pytest.raises(ValueError, match=refusal):
        read_config(path, KEYS)
    configured: Any = read_config(path, KEYS, RESNET, f"{Pairs.__module__}.Pairs")
    assert (configured.base, type(configured.data()).__name__) == (Shape(2, 32, 8), "Pairs")
    assert len(configured.build(4, 32, 8).blocks) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read as a configuration"),
        *((text, "is not a LightningCLI configuration: it has no model") for text in ("[1, 2]", "name: value")),
        (yaml.safe_dump(content(data={"batch": 3})), "does not say which class its data are of"),
    ],
)
def test_files_that_are_no_configurations(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "config.yaml", KEYS)


def test_names_that_are_not_the_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path)
    assert command("check", path, "--hidden", "heads", "--out", str(tmp_path / "out")) == 1
    said = capsys.readouterr().err
    assert "has no argument 'heads' that is a whole number, to be its hidden" in said
    assert "Its arguments are depth, hidden, embedding, inputs, outputs; name those that make it up" in said
    assert command("check", str(tmp_path / "none.yaml")) == 1
    assert "none.yaml cannot be read as a configuration" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
