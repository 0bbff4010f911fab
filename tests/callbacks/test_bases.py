"""What may be given as the base, and what is refused or warned of."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.callback_runs import loader
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI
from torch import nn

from mlu_lightning import MLUCallback, Plan
from mlu_lightning.checking.configuration import read_config
from mlu_lightning.models import ResNet
from mlu_lightning.observation.verification import verify

SIZES: dict[str, Any] = {"inputs": 3, "outputs": 2}
FORGOTTEN = "neither base nor plan"


def net(depth: int = 2, hidden: int = 8) -> ResNet:
    seed_everything(0, verbose=False)
    return ResNet(depth, hidden, 4, **SIZES)


def fit(module: LightningModule, *callbacks: Any) -> LightningModule:
    Trainer(accelerator="cpu", max_steps=1, barebones=True, callbacks=[*callbacks]).fit(module, loader(False))
    return module


def trained() -> LightningModule:
    return fit(net())


def with_gradients() -> ResNet:
    module = net()
    module(torch.ones(1, 3)).sum().backward()
    return module


def multiplied() -> LightningModule:
    module = fit(net(4), MLUCallback(net()))
    module.zero_grad()
    module._trainer = None
    return module


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.readout = net().embed, net().blocks, net().readout

    forward = ResNet.forward


REFUSED: list[tuple[Any, str]] = [
    (trained, "base ResNet was trained for 1 steps"),
    (with_gradients, "base ResNet has gradients"),
    (multiplied, "base ResNet has multipliers of a plan"),
    (Plain, "base is a Plain and the module a ResNet, and only the module is a LightningModule"),
    (lambda: 5, "base is a int"),
    (lambda: "Absolute", "base is 'Absolute', and there is no file of that name.* or 'absolute'"),
    (lambda: Path(__file__).parent, "there is no file of that name"),
    (lambda: lambda: None, "returned None instead of a module|base is a function"),
]


@pytest.mark.parametrize(("base", "message"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_refused(base: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        fit(net(4), MLUCallback(base()))
    if base is not multiplied:
        with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
            Plan.from_model(net(4), next(iter(loader())), base=base())


def test_the_module_itself() -> None:
    module, batch = net(4), next(iter(loader()))
    with pytest.raises(ValueError, match="is the module that is trained, so nothing would be scaled"):
        fit(module, MLUCallback(module))
    plan = Plan.from_model(module, batch, base=module)  # as the base of others
    with pytest.raises(ValueError, match="The base is the module itself"):
        verify(module, module, plan, batch)


@pytest.mark.filterwarnings(f"error:.*{FORGOTTEN}")
def test_plans_and_paths(tmp_path: Path) -> None:
    module, batch, path = net(4), next(iter(loader())), tmp_path / "plan.yaml"
    expected = Plan.from_model(module, batch, base=net())
    expected.save(path)
    for base in (expected, path, str(path)):
        assert Plan.from_model(module, batch, base=base) == expected
        for argument in ("base", "plan"):
            fit(net(4), callback := MLUCallback(**{argument: base}))
            assert callback.plan == expected


def test_forgotten_and_absolute(recwarn: pytest.WarningsRecorder) -> None:
    absolute = MLUCallback(base="absolute")
    fit(net(), absolute)
    assert not [warning for warning in recwarn if FORGOTTEN in str(warning.message)]
    with pytest.warns(UserWarning, match=FORGOTTEN):
        fit(net(), callback := MLUCallback())
    assert absolute.plan == callback.plan == Plan.from_model(net(), next(iter(loader())), base="absolute")
    assert callback.plan is not None and callback.plan.base is None


def test_absolute_in_yaml(tmp_path: Path) -> None:
    entry = {"class_path": "mlu_lightning.MLUCallback", "init_args": {"base": "absolute"}}
    model = {
        "class_path": "mlu_lightning.models.ResNet",
        "init_args": {"depth": 2, "hidden": 8, "embedding": 4, **SIZES},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": model, "trainer": {"callbacks": [entry]}}))
    cli = LightningCLI(save_config_callback=None, run=False, args=["--config", str(path)])
    assert any(isinstance(callback, MLUCallback) for callback in cli.trainer.callbacks)
    assert read_config(path, {"depth": ["depth"], "hidden": ["hidden"], "embedding": ["embedding"]}).base.depth == 2
