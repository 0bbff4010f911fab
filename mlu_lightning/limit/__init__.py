"""The infinite model: what a residual network becomes as depth, hidden width and embedding grow (theory.md, section 5).

A module and its plan come in, and :func:`infinite_model` makes a network of small embedding dimension, whose stream is that
of the module in the limit; it is trained by :meth:`InfiniteModel.optimizer` on the same batches. Begin there.
"""

from mlu_lightning.limit.infinite_model import InfiniteModel, embedding_weights, infinite_model
from mlu_lightning.limit.unit_sampling import Sampling

__all__ = ["InfiniteModel", "Sampling", "embedding_weights", "infinite_model"]
