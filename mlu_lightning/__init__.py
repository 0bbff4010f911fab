"""Train residual networks of every shape with the hyperparameters of a small one: the MLU parameterization for Lightning.

Begin with :class:`MLUCallback`, which takes a module of the base shape and does everything in a ``Trainer``. Its stages
also work without Lightning: :func:`discover` finds the structure of a module, :meth:`Plan.from_model` puts it next to a
base, :func:`initialize`, :func:`attach_multipliers` (or :func:`fold`) and :func:`scale_optimizer` apply the plan.
:class:`FeatureUpdate`, :class:`ReferenceRecorder` and :class:`EmbeddingDistance` watch a run, :func:`check` tests a
parameterization, :func:`tune` finds factors per role at the base, and :func:`bake` makes a plain module of a trained one.
The mathematics is in ``theory.md``.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if find_spec("lightning") is None:
    raise ImportError(
        "mlu_lightning needs the package 'lightning' (import lightning.pytorch), and it is not installed. The package "
        "'pytorch_lightning' alone is not enough, because its Trainer and LightningModule are different classes: "
        "pip install 'lightning>=2.6,<3' and import Trainer and LightningModule from lightning.pytorch."
    )

if TYPE_CHECKING:
    __version__: str
    from mlu_lightning.application import (
        attach_multipliers,
        bake,
        fold,
        initialize,
        restore_multipliers,
        scale_optimizer,
        to_granite,
        unfolded_gradients,
        unfolded_weights,
    )
    from mlu_lightning.callbacks import EmbeddingDistance, FeatureUpdate, Limit, MLUCallback, ReferenceRecorder
    from mlu_lightning.checking import CheckReport, check, log_check
    from mlu_lightning.discovery.discover import discover
    from mlu_lightning.discovery.structure import Branch, Structure
    from mlu_lightning.planning.plan import Plan
    from mlu_lightning.shapes import Architecture, ErrorConstants, Shape, error_bound, fit_error_bound, optimal_shape
    from mlu_lightning.table import OptimizerFamily, Parameterization, Ratios, Role, Scale
    from mlu_lightning.tuning import Tuning, tune

__all__ = [
    "Architecture",
    "Branch",
    "CheckReport",
    "EmbeddingDistance",
    "ErrorConstants",
    "FeatureUpdate",
    "Limit",
    "MLUCallback",
    "OptimizerFamily",
    "Parameterization",
    "Plan",
    "Ratios",
    "ReferenceRecorder",
    "Role",
    "Scale",
    "Shape",
    "Structure",
    "Tuning",
    "attach_multipliers",
    "bake",
    "check",
    "discover",
    "error_bound",
    "fit_error_bound",
    "fold",
    "initialize",
    "log_check",
    "optimal_shape",
    "restore_multipliers",
    "scale_optimizer",
    "to_granite",
    "tune",
    "unfolded_gradients",
    "unfolded_weights",
]

_HOMES = {
    "application": "attach_multipliers bake fold initialize restore_multipliers scale_optimizer to_granite "
    "unfolded_gradients unfolded_weights",
    "callbacks": "EmbeddingDistance FeatureUpdate Limit MLUCallback ReferenceRecorder",
    "checking": "CheckReport check log_check",
    "discovery": "Branch Structure discover",
    "planning": "Plan",
    "shapes": "Architecture ErrorConstants Shape error_bound fit_error_bound optimal_shape",
    "table": "OptimizerFamily Parameterization Ratios Role Scale",
    "tuning": "Tuning tune",
}
"""Where the public names are, which are imported when they are used first: all of them together take 0.2 s."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    home = next((home for home, names in _HOMES.items() if name in names.split()), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("mlu-lightning")
    except PackageNotFoundError:  # a checkout that was not installed
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
