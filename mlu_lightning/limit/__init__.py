"""The infinite model: what a residual network becomes as depth, hidden width and embedding grow (theory.md, section 5).

A module and its plan come in, and :func:`infinite_model` makes a network of small embedding dimension, whose stream is that
of the module in the limit; it is trained by :meth:`InfiniteModel.optimizer` on the same batches. Begin there.
"""

from mlu_lightning.limit.infinite_model import (
    HYPERPARAMETERS,
    InfiniteModel,
    check_gradient_descent,
    check_initialization,
    embedding_weights,
    infinite_model,
)
from mlu_lightning.limit.unit_sampling import Sampling, check_sampling

__all__ = [
    "HYPERPARAMETERS",
    "InfiniteModel",
    "Sampling",
    "check_gradient_descent",
    "check_initialization",
    "check_sampling",
    "embedding_weights",
    "infinite_model",
]
