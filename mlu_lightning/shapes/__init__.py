"""Shapes of networks: from errors measured at some shapes to the best shape for a number of parameters.

:func:`error_bound` predicts how far a :class:`Shape` is from the infinite model, with constants that
:func:`fit_error_bound` finds from measured errors; :func:`optimal_shape` minimizes it over an :class:`Architecture`.
"""

from mlu_lightning.shapes.error_bound import ErrorConstants, Shape, error_bound, fit_error_bound
from mlu_lightning.shapes.search import Architecture, optimal_shape

__all__ = ["Architecture", "ErrorConstants", "Shape", "error_bound", "fit_error_bound", "optimal_shape"]
