"""Modules and bases that get their parameters, or the values of these, while the Trainer sets up."""

from typing import Any

import pytest
import torch
from helpers.callback_runs import MODULES, WIDE, InConfigureModel, Net, fit, identical
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from mlu_lightning import MLUCallback
from mlu_lightning.application import residual_state


class Materializing(SingleDeviceStrategy):
    """Gives parameters their values when the strategy is set up, as sharded strategies do."""

    def model_to_device(self) -> None:
        module = self.lightning_module
        values = Net(*module.shape)
        module.to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(values.get_parameter(name))


class OnMeta(InConfigureModel):
    def configure_model(self) -> None:
        with torch.device("meta"):
            super().configure_model()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])


@pytest.mark.parametrize("residual", ["hook", "fold"])
def test_module_on_meta_is_initialized_when_it_has_values(residual: Any) -> None:
    ours, theirs = OnMeta(**WIDE), Net(**WIDE, optimizers=lambda module: None)
    fit(ours, MLUCallback(Net(), residual=residual), strategy=Materializing("cpu"), epochs=0)
    fit(theirs, MLUCallback(Net(), residual=residual))
    assert residual_state(ours) == residual_state(theirs) and identical(ours, theirs)
    fit(ours, MLUCallback(Net(), residual=residual))
    assert not identical(ours, theirs)


class OnOtherDevice(SingleDeviceStrategy):  # makes new tensors elsewhere by default while the module is built
    def tensor_init_context(self, empty_init: bool | None = None) -> Any:
        return torch.device("meta")


class OnCPU(InConfigureModel):
    def configure_model(self) -> None:
        with torch.device("cpu"):
            super().configure_model()


def test_default_device_of_the_build_is_not_that_of_the_plan() -> None:
    ours, theirs = OnCPU(**WIDE), Net(**WIDE)
    fit(ours, MLUCallback(Net(), init="normal"), strategy=OnOtherDevice("cpu"))
    fit(theirs, MLUCallback(Net(), init="normal"))
    assert identical(ours, theirs)


@pytest.mark.parametrize("function", [False, True], ids=["module", "function"])
@pytest.mark.parametrize("make", MODULES)
def test_base_that_is_built_late(make: type[Net], function: bool) -> None:
    ours, theirs = Net(**WIDE), Net(**WIDE)
    base = make()
    fit(ours, MLUCallback((lambda: base) if function else base))
    fit(theirs, MLUCallback(Net()))
    assert identical(ours, theirs)
    assert base._trainer is None


class HeadInSetup(Net):
    def build(self) -> None:
        super().build()
        del self.readout

    def setup(self, stage: str) -> None:
        self.readout = Net(*self.shape).readout


@pytest.mark.parametrize("function", [False, True], ids=["module", "function"])
def test_base_of_which_a_part_is_built_late(function: bool) -> None:
    ours, theirs, base = HeadInSetup(**WIDE), Net(**WIDE), HeadInSetup()
    fit(ours, MLUCallback(HeadInSetup if function else base))
    fit(theirs, MLUCallback(Net()))
    assert identical(ours, theirs)
    assert not hasattr(base, "readout") and base._trainer is None
