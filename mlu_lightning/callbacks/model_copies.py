"""Copies of the module that other callbacks make when they are set up, and that should be of the initialized module."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.trainer.states import TrainerFn

__all__ = ["check_copies", "copy_again"]


def check_copies(others: Iterable[Callback]) -> None:
    """Refuse callbacks that give a module other initial weights than those of its plan.

    Args:
        others: the Trainer's callbacks.

    Raises:
        ValueError: if there is one.

    >>> check_copies([callbacks.EarlyStopping("loss")])
    """
    for callback in others:
        if isinstance(callback, callbacks.ModelPruning):
            settings = vars(callback)
            if settings["_use_lottery_ticket_hypothesis"] and settings["_resample_parameters"]:
                raise ValueError(
                    "ModelPruning(resample_parameters=True) draws weights again as modules draw them when they are built, "
                    "without the scale that MLUCallback has given them. Leave resample_parameters at False: weights go "
                    "back to their initial values then, which have it."
                )


def copy_again(others: Iterable[Callback], trainer: Trainer, module: LightningModule) -> None:
    """Let callbacks that have copied a module copy it once more, now that it is initialized.

    Weight averaging starts from its copy, and is validated and saved with it until there is something to average; pruning
    by the lottery ticket hypothesis goes back to its copy.

    Args:
        others: callbacks that were set up before the module was initialized.
        trainer: which is about to fit the module.
        module: with its initial weights.

    >>> from mlu_lightning.models import ResNet
    >>> averaging = callbacks.EMAWeightAveraging()
    >>> copy_again([averaging], Trainer(barebones=True), ResNet(depth=1, hidden=4, embedding=2, inputs=1, outputs=1))
    >>> averaging.state_dict()
    {'latest_update_step': 0}
    """
    for callback in others:
        if isinstance(callback, _COPYING):
            callback.setup(trainer, module, TrainerFn.FITTING)


# weight averaging is newer than the oldest Lightning that will do
_COPYING = tuple(getattr(callbacks, name) for name in ("ModelPruning", "WeightAveraging") if name in callbacks.__all__)
