"""Checks of whether features move alike at every shape: from a function that builds modules to a verdict with causes.

:func:`check` trains a module at several shapes for a few steps and returns a :class:`CheckReport`, which prints as a
table and is saved to a folder; :func:`log_check` writes it to loggers. Begin with ``check.py``, which sizes,
measures (``measurement.py``) and judges (``verdicts.py``).
"""

from mlu_lightning.checking.check import check
from mlu_lightning.checking.publishing import log_check
from mlu_lightning.checking.report import CheckReport

__all__ = ["CheckReport", "check", "log_check"]
