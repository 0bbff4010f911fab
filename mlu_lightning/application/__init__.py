"""From a plan to a module and its optimizer, and back.

In comes a module with its plan; out goes the module with the plan's initial weights and multipliers, and an optimizer that
is scaled for it. Begin with ``multipliers.py``, and ``optimization.py`` for optimizers. What was applied to a module is kept
on it as one value (``applied.py``); :func:`bake` and :func:`to_granite` make it a plain module again.
"""

from mlu_lightning.application.applied import folded_parameters, residual_state
from mlu_lightning.application.clipping import unfolded_gradients, unfolded_weights
from mlu_lightning.application.export import bake, restore_multipliers
from mlu_lightning.application.first_steps import verify_steps
from mlu_lightning.application.granite import to_granite
from mlu_lightning.application.initialization import InitMode, initialize, planned_stds, stream_axis
from mlu_lightning.application.multipliers import attach_multipliers, fold
from mlu_lightning.application.optimization import is_scaled, scale_optimizer

__all__ = [
    "InitMode",
    "attach_multipliers",
    "bake",
    "fold",
    "folded_parameters",
    "initialize",
    "is_scaled",
    "planned_stds",
    "residual_state",
    "restore_multipliers",
    "scale_optimizer",
    "stream_axis",
    "to_granite",
    "unfolded_gradients",
    "unfolded_weights",
    "verify_steps",
]
