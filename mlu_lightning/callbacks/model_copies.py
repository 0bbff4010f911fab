"""Handle Lightning callbacks that copy or prune a module (WeightAveraging, ModelPruning)."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from mlu_lightning.utilities.lightning_namespaces import of_both
from mlu_lightning.utilities.lightning_private import prunes_globally, resamples_parameters


def check_copies(others: Iterable[Callback]) -> None:
    """Refuse callbacks that give a module other initial weights than those of its plan."""
    if any(isinstance(each, of_both(callbacks.ModelPruning)) and resamples_parameters(each) for each in others):
        raise ValueError(
            "ModelPruning(resample_parameters=True) draws weights again as modules draw them when they are built, "
            "without the scale that MLUCallback has given them. Leave resample_parameters at False: weights go "
            "back to their initial values then, which have it."
        )


def warn_of_pruning(others: Iterable[Callback]) -> None:
    """Say that pruning compares weights that hold their multipliers with others."""
    if any(isinstance(callback, of_both(callbacks.ModelPruning)) and prunes_globally(callback) for callback in others):
        rank_zero_warn(
            "ModelPruning compares the sizes of weights of different layers (use_global_unstructured=True), and "
            'residual="fold" puts multipliers into some, so that it prunes others than the same run with residual="hook". '
            "Use that, or prune by yourself in unfolded_weights(module, plan)."
        )


def copy_again(others: Iterable[Callback], trainer: Trainer, module: LightningModule) -> None:
    """Let weight averaging and pruning, which go back to a copy of the module, copy it once more, now initialized."""
    for callback in others:
        if isinstance(callback, tuple(cls for copying in _COPYING for cls in of_both(copying))):
            callback.setup(trainer, module, TrainerFn.FITTING)


# weight averaging is newer than the oldest Lightning that will do
_COPYING = tuple(getattr(callbacks, name) for name in ("ModelPruning", "WeightAveraging") if name in callbacks.__all__)
