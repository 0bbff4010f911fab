"""MLU parameterization of residual networks for PyTorch Lightning."""

from mlu_lightning.discovery import discover
from mlu_lightning.plan import Plan
from mlu_lightning.rules import OptimizerFamily, Ratios, Role, Scale
from mlu_lightning.structure import Structure

__all__ = ["OptimizerFamily", "Plan", "Ratios", "Role", "Scale", "Structure", "discover"]
