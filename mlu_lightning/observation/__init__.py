"""What a run does to its residual stream, its features and its outputs, read and compared without Lightning.

A plan or structure says where streams and outputs can be read; :func:`locate` chooses among these, :func:`observe` passes a
probe batch through the model and returns an :data:`Observation`, values by location. :func:`compare` measures how far two
observations are from each other, :func:`feature_updates` how far one has moved; a :class:`Reference` reads those of a run
from the file that a writer keeps. Begin in ``locations.py``; distances as torchmetrics are in ``metrics.py``.
"""

from mlu_lightning.observation.comparison import MetricName, compare, compare_references
from mlu_lightning.observation.distances import (
    cka_distance,
    gram_distance,
    output_distance,
    procrustes_distance,
    rms_distance,
)
from mlu_lightning.observation.feature_change import feature_updates, rms_change
from mlu_lightning.observation.locations import (
    FeatureName,
    Location,
    LocationName,
    OutputName,
    StreamName,
    locate,
    locate_features,
)
from mlu_lightning.observation.probe import Observation, observe
from mlu_lightning.observation.reference import Reference, load_probe

__all__ = [
    "FeatureName",
    "Location",
    "LocationName",
    "MetricName",
    "Observation",
    "OutputName",
    "Reference",
    "StreamName",
    "cka_distance",
    "compare",
    "compare_references",
    "feature_updates",
    "gram_distance",
    "load_probe",
    "locate",
    "locate_features",
    "observe",
    "output_distance",
    "procrustes_distance",
    "rms_change",
    "rms_distance",
]
