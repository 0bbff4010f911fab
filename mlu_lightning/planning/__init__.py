"""From a structure and a base shape to a plan: the table's factors for every parameter.

In come the :class:`~mlu_lightning.Structure` of a module and its base (a module, another plan, or none); out goes a
:class:`Plan`, a plain value that prints as a table and is saved as YAML. Begin with :meth:`Plan.from_model` in
``plan.py``; what a plan says about one parameter, stream, branch or multiplier is in ``entries.py``.
"""

from mlu_lightning.planning.entries import BranchPlan, Multiplier, ParameterPlan, StreamPlan
from mlu_lightning.planning.horizon import Horizon
from mlu_lightning.planning.initial_stds import std_groups
from mlu_lightning.planning.plan import Plan

__all__ = ["BranchPlan", "Horizon", "Multiplier", "ParameterPlan", "Plan", "StreamPlan", "std_groups"]
