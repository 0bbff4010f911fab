"""``mlu-lightning check`` of configurations that LightningCLI has saved, of CLIs with links and arguments of their own."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.check_command import BASE, KEYS, QUICK, RESNET, SHORTEST, Pairs, command, plugin, write
from helpers.watched_runs import SILENT
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, OptimizerCallable
from torch.utils.data import DataLoader, TensorDataset

from mlu_lightning.checking.configuration import read_config
from mlu_lightning.models import ResNet
from mlu_lightning.shapes import Shape

CLASSES = [f"{__name__}.Net", f"{__name__}.Wide"]


class Net(ResNet):  # a module all of whose arguments have defaults
    def __init__(
        self, depth: int = 2, hidden: int = 32, embedding: int = 8, inputs: int = 3, rate: float = 0.1
    ) -> None:
        super().__init__(depth, hidden, embedding, inputs, 2, lr=rate)


class Wide(LightningDataModule):  # pairs with a number of inputs to be chosen
    def __init__(self, inputs: int = 3, rate: float = 0.1) -> None:
        super().__init__()
        self.inputs = inputs

    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(64, self.inputs, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x[:, :2].abs()), batch_size=16)


class Linked(LightningCLI):  # a user's CLI, one of whose arguments is another's
    links: tuple[tuple[str, str], ...] = (("data.inputs", "model.inputs"),)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for source, target in self.links:
            parser.link_arguments(source, target)


class WithNotes(LightningCLI):  # a user's CLI with an argument of its own
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--notes", default="")


net = partial(plugin, CLASSES[0])


def saved(folder: Path, cli: Any, *args: str, callbacks: Any = (), **kwargs: Any) -> tuple[str, Any]:
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder)}}
    trainer = SILENT | {"max_steps": 1, "logger": logger, "callbacks": [*callbacks]}
    (folder / "given.yaml").write_text(yaml.safe_dump({"trainer": trainer, "seed_everything": 1}))
    classes = {"model_class": Net, "datamodule_class": Wide} | kwargs
    made = cli(args=["fit", "--config", str(folder / "given.yaml"), *args], **classes)
    (path,) = folder.rglob("config.yaml")
    return str(path), made


def read(path: object) -> Any:
    return read_config(str(path), KEYS, *CLASSES)


def shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def check_shortly(path: str, folder: Path) -> int:
    classes = ["--model", CLASSES[0], "--data", CLASSES[1]]
    return command("check", path, "--out", str(folder / "out"), *SHORTEST, *classes)


def test_what_a_cli_links_is_taken_from_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [net(depth=2, hidden=32, embedding=8, inputs=5)]
    path, cli = saved(tmp_path, Linked, "--data.inputs=5", callbacks=callbacks)
    assert "inputs" not in yaml.safe_load(Path(path).read_text())["model"]
    configured = read(path)
    assert shapes(configured.build(2, 32, 8)) == shapes(cli.model) != shapes(Net())
    note = "Taken from the MLUCallback's base, because the model has no value for them: inputs=5."
    assert configured.notes == (note,) and check_shortly(path, tmp_path) == 4
    assert note in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("links", "callbacks", "missing"),
    [
        ([("data.inputs", "model.inputs")], [], "model.inputs"),
        ([("data.rate", "model.rate")], [net(inputs=5)], "model.rate"),  # of which the base has the default
        ([("data.inputs", "model.inputs"), ("data.rate", "model.rate")], [net(inputs=5)], "model.rate"),
        ([("data.inputs", "model.inputs"), ("model.rate", "data.rate")], [], "model.inputs, data.rate"),
    ],
)
def test_what_a_cli_links_has_to_be_written(links: Any, callbacks: list[Any], missing: str, tmp_path: Path) -> None:
    args = ["--data.inputs=5"] + ([] if ("data.inputs", "model.inputs") in links else ["--model.inputs=5"])
    path, _ = saved(tmp_path, type("Other", (Linked,), {"links": tuple(links)}), *args, callbacks=callbacks)
    with pytest.raises(ValueError, match=rf"has no value of {missing}, although LightningCLI has saved it") as error:
        read(path)
    assert "Write what is missing into a copy of the file, beside the other arguments" in str(error.value)
    changed = yaml.safe_load(Path(path).read_text())
    for name in ("model_registry", "enable_autolog_hparams"):  # which an earlier Lightning did not have
        changed["trainer"].pop(name, None)
    (tmp_path / "earlier.yaml").write_text(yaml.safe_dump(changed))
    with pytest.raises(ValueError, match=f"has no value of {missing},"):
        read(tmp_path / "earlier.yaml")
    for name in missing.split(", "):
        section, _, argument = name.partition(".")
        changed[section][argument] = 5 if argument == "inputs" else 0.2
    (tmp_path / "copy.yaml").write_text(yaml.safe_dump(changed))
    assert read(tmp_path / "copy.yaml").build(2, 32, 8).embed.weight.shape == (8, 5)


@pytest.mark.parametrize("subclasses", [False, True])
@pytest.mark.parametrize("has_base", [False, True])
def test_without_links_saved_files_are_whole(subclasses: bool, has_base: bool, tmp_path: Path) -> None:
    classes = [f"--model={CLASSES[0]}", f"--data={CLASSES[1]}"] if subclasses else []
    settings: dict[str, Any] = {"subclass_mode_model": subclasses, "subclass_mode_data": subclasses}
    settings["callbacks"] = [net(inputs=5, depth=2)] if has_base else []
    path, cli = saved(tmp_path, LightningCLI, *classes, "--model.inputs=5", "--data.inputs=5", **settings)
    configured = read_config(path, KEYS) if subclasses else read(path)
    assert configured.notes == () and shapes(configured.build(2, 32, 8)) == shapes(cli.model)


class Rate(torch.nn.Module):  # a factor, that a module is given as an object
    def __init__(self, value: float = 1.0, other: int = 2) -> None:
        super().__init__()


@dataclass
class Sizes:  # arguments that come together
    inputs: int = 3
    outputs: int = 2


class Nested(ResNet):  # a module with arguments that have arguments, and one that is a function
    def __init__(
        self,
        depth: int = 2,
        hidden: int = 32,
        embedding: int = 8,
        rate: Rate | None = None,
        sizes: Sizes = Sizes(),  # noqa: B008  # nothing changes it
        optimizer: OptimizerCallable = torch.optim.Adam,
        names: Any = None,
    ) -> None:
        super().__init__(depth, hidden, embedding, sizes.inputs, sizes.outputs)


@pytest.mark.parametrize("given", [[], [f"--model.rate={__name__}.Rate", "--model.sizes.inputs=3"]])
def test_arguments_with_arguments_are_no_links(given: list[str], tmp_path: Path) -> None:
    """Neither is there a link where a class, as that of the data, has no arguments."""
    callbacks = [plugin(f"{__name__}.Nested", depth=2)]
    path, cli = saved(tmp_path, LightningCLI, *given, model_class=Nested, datamodule_class=Pairs, callbacks=callbacks)
    configured = read_config(path, KEYS, f"{__name__}.Nested", f"{Pairs.__module__}.Pairs")
    assert configured.notes == () and shapes(configured.build(2, 32, 8)) == shapes(cli.model)


def test_short_configurations_leave_arguments_at_defaults(tmp_path: Path) -> None:
    model = {"class_path": f"{__name__}.Net", "init_args": {"depth": 4, "hidden": 16, "embedding": 4}}
    configured = read_config(write(tmp_path, model=model, trainer={"max_steps": 5}, data=None), KEYS)
    module: Any = configured.build(4, 16, 4)
    assert module.embed.weight.shape == (4, 3) and configured.notes == ()


def test_arguments_of_a_base_of_another_class_are_its_own(tmp_path: Path) -> None:
    model = {"class_path": f"{__name__}.Net", "init_args": {"depth": 4}}
    configured = read_config(write(tmp_path, model=model, trainer={"callbacks": [plugin(**BASE)]}), KEYS)
    assert configured.notes == () and configured.base == Shape(2, 32, 8)
    assert "outputs" not in configured.content["model"]["init_args"]


def test_arguments_of_a_cli_itself_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, cli = saved(tmp_path, WithNotes, "--notes=first")
    assert yaml.safe_load(Path(path).read_text())["notes"] == "first"
    assert shapes(read(path).build(2, 32, 8)) == shapes(cli.model) and check_shortly(path, tmp_path) in (3, 4)
    printed = " ".join(capsys.readouterr().out.split())
    assert "Left out, because LightningCLI itself does not have them: notes. Optimizers and callbacks that" in printed


def test_optimizers_stay(tmp_path: Path) -> None:
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.02}}
    made: Any = read_config(write(tmp_path, optimizer=optimizer), KEYS).build(2, 32, 8).configure_optimizers()
    assert type(made) is torch.optim.Adam and made.param_groups[0]["lr"] == 0.02
    for name in ("optimizer", "lr_scheduler"):
        refusal = f"not say which class its {name} is of.* as class_path under {name}, with"
        with pytest.raises(ValueError, match=refusal):
            read_config(write(tmp_path, **{name: {"lr": 0.02}}), KEYS)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"class_path": RESNET, "init_args": BASE | {"dept": 3}}, "'dept' is not"),
        ({"class_path": "nowhere.Net", "init_args": BASE}, "No module named 'nowhere'"),
        ({"class_path": RESNET, "init_args": dict.fromkeys(KEYS, 8)}, "required"),
    ],
)
def test_what_cannot_be_parsed_is_an_error(model: dict[str, Any], says: str, tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path, model=model, trainer={"max_steps": 3})
    assert command("check", path, "--out", str(tmp_path / "out"), *QUICK) == 1
    said = capsys.readouterr().err
    assert said.startswith("mlu-lightning: LightningCLI cannot read the configuration: ") and says in said
    assert "Correct it in the file, or in a copy." in said and "usage:" not in said
    assert not (tmp_path / "out").exists()


A_BASE = r"The base of the MLUCallback of .*config.yaml is a saved plan, from which .* Give it another,"
A_PLAN = r"The MLUCallback of .*config.yaml has a finished plan, which is for one .* Give it a base instead,"


@pytest.mark.parametrize(("given", "says"), [("base", A_BASE), ("plan", A_PLAN)])
def test_a_saved_plan_is_for_one_shape(given: str, says: str, tmp_path: Path) -> None:
    callback = {"class_path": "mlu_lightning.MLUCallback", "init_args": {given: "plan.yaml"}}
    path = write(tmp_path, trainer={"callbacks": [callback]})
    with pytest.raises(ValueError, match=f"{says} as base: {{class_path: my_package.MyModule, init_args: ") as error:
        read_config(path, KEYS)
    assert str(error.value).endswith("in a copy of the file, and check the copy.")


NESTED = "model: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "is not a LightningCLI configuration: it has no model"),
        ("model: 3", "has 3 as its model: it should be a mapping"),
        ("model: {class_path: 1}", "as its model: it should be a mapping, and its class_path a text"),
        ("model: {class_path: a.B, init_args: [1]}", r"has \[1\] as init_args of its model"),
        ("trainer: {callbacks: [3]}", r"has 3 as its trainer.callbacks\[0\]"),
        (NESTED, "its aliases stand for more than 100,000 values"),
        ("model: &a [*a]", "one of its aliases stands for what it is in"),
        ("model: " + "[" * 100_000, "it has more than 50 levels"),
        ("model: !!timestamp x", "cannot be read as a configuration"),
        (
            f"model: {{class_path: {RESNET}, init_args: {{depth: 1000000000}}}}",
            "has depth=1000000000, .* from 1 to 10,000",
        ),
    ],
)
def test_what_is_no_configuration_is_one_sentence(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/config.yaml .*{says}"):
        read_config(tmp_path / "config.yaml", KEYS)


def test_factors_that_nobody_can_build_are_refused(tmp_path: Path) -> None:
    configured = read_config(write(tmp_path), KEYS)
    with pytest.raises(ValueError, match=r"A factor of 1000000 makes depth=.*small factors"):
        configured.build(**vars(replace(configured.base, depth=configured.base.depth * 10**6)))
