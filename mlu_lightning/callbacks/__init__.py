"""Lightning callbacks: thin adapters of the functions of the package."""

from mlu_lightning.callbacks.distance import EmbeddingDistance
from mlu_lightning.callbacks.features import FeatureUpdate
from mlu_lightning.callbacks.limit_run import Limit
from mlu_lightning.callbacks.parameterization import MLUCallback
from mlu_lightning.callbacks.recorder import ReferenceRecorder

__all__ = ["EmbeddingDistance", "FeatureUpdate", "Limit", "MLUCallback", "ReferenceRecorder"]
