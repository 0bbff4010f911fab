"""Lightning callbacks: thin adapters of the functions of the package."""

from mlu_lightning.callbacks.embedding_distance import EmbeddingDistance
from mlu_lightning.callbacks.feature_update import FeatureUpdate
from mlu_lightning.callbacks.infinite_limit import Limit
from mlu_lightning.callbacks.mlu_callback import MLUCallback
from mlu_lightning.callbacks.reference_recorder import ReferenceRecorder

__all__ = ["EmbeddingDistance", "FeatureUpdate", "Limit", "MLUCallback", "ReferenceRecorder"]
