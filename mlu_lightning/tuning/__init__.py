"""Tuning: the learning rate and factors per role, found at the base by Optuna, for trainings of every shape.

``space`` says what is searched, ``training`` trains once, ``storage`` and ``trials`` make trials, ``found`` says what they
gain. Optuna is imported when a search begins.
"""

from mlu_lightning.tuning.found import Confirmed, Tuning
from mlu_lightning.tuning.tune import tune

__all__ = ["Confirmed", "Tuning", "tune"]
