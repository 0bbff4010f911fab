"""Read and compare the residual stream, features and outputs of a run, without Lightning.

A plan or structure says where streams and outputs can be read; :func:`locate` chooses among these, :func:`observe` returns
their values on a probe batch, an :data:`Observation`, and :func:`compare` and :func:`feature_updates` measure how far two
are apart, by ``distances.py``; a :class:`Reference` reads those of a recorded run. Begin in ``locations.py``. :func:`verify`
follows a whole pass (``dataflow.py``) and compares what parameters do in it with a plan.
"""

from mlu_lightning.observation.comparison import MetricName, compare, compare_references, feature_updates, rms_change
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
from mlu_lightning.observation.verification import verify

__all__ = [
    "FeatureName",
    "Location",
    "LocationName",
    "MetricName",
    "Observation",
    "OutputName",
    "Reference",
    "StreamName",
    "compare",
    "compare_references",
    "feature_updates",
    "load_probe",
    "locate",
    "locate_features",
    "observe",
    "rms_change",
    "verify",
]
