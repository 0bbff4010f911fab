"""The plan of the training that a configuration describes, as its fit would make it."""

from __future__ import annotations

import warnings
from contextlib import suppress

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.seed import isolate_rng

from mlu_lightning.callbacks.mlu_callback import MLUCallback
from mlu_lightning.checking.configuration import Configured
from mlu_lightning.checking.preparation import make_trainer, quiet
from mlu_lightning.planning import Plan

_OWN_SHAPE = (
    "There is no MLUCallback in this configuration, so the plan is relative to the module's own shape, and all factors are "
    "1. With an MLUCallback and its base they are those of the base; a larger module can have this plan as its base."
)
_STEPS = 1000  # of a Trainer that is stopped before the first one, for schedulers that ask
_OF_DEVICES = ("accelerator", "precision")


def plan_of_fit(configured: Configured) -> tuple[Plan, list[str]]:
    """Run the fit of a configuration on the CPU until it is planned; return the plan, with notes about it."""
    settings = {name: value for name, value in configured.trainer.items() if name not in _OF_DEVICES}
    with isolate_rng(), quiet(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seed = configured.content.get("seed_everything")
        seed_everything(seed if type(seed) is int else 0, verbose=False)
        module, callbacks, data = configured.parts()
        notes = list(configured.notes)
        plugin = next((callback for callback in callbacks if isinstance(callback, MLUCallback)), None)
        if plugin is None:
            plugin = MLUCallback(lambda: configured.parts()[0])
            callbacks.append(plugin)
            notes.append(_OWN_SHAPE)
        with suppress(_Planned):
            make_trainer([*callbacks, _End()], _STEPS, settings).fit(module, datamodule=data)
    assert plugin.plan is not None
    said = dict.fromkeys(str(warning.message) for warning in caught if "mlu_lightning" in warning.filename)
    return plugin.plan, [*notes, *(text for text in said if text not in plugin.plan.warnings)]


class _Planned(Exception):
    """The fit has got as far as it should."""


class _End(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise _Planned
