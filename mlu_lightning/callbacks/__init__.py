"""Lightning callbacks: thin adapters of the functions of the package, one file each.

In come a Trainer and its module; out go a run in the MLU parameterization (:class:`MLUCallback`), a reference file of a run
(:class:`ReferenceRecorder`), and logged values that say how far a run is from a reference (:class:`EmbeddingDistance`),
from the infinite model (:class:`Limit`), or from where it began (:class:`FeatureUpdate`). Begin with ``mlu_callback.py``.
"""

from mlu_lightning.callbacks.embedding_distance import EmbeddingDistance
from mlu_lightning.callbacks.feature_update import FeatureUpdate
from mlu_lightning.callbacks.infinite_limit import Limit
from mlu_lightning.callbacks.mlu_callback import MLUCallback
from mlu_lightning.callbacks.reference_recorder import ReferenceRecorder

__all__ = ["EmbeddingDistance", "FeatureUpdate", "Limit", "MLUCallback", "ReferenceRecorder"]
