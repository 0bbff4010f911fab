"""One HTML page about a run, made from what the run has left in its folder.

:func:`read_run` collects logs of CSVLogger and TensorBoard, checkpoints, plans, checks and references into a
:class:`RunRecord`; :func:`run_page` renders that as a page which needs no other file.
"""

from mlu_lightning.reporting.page import run_page
from mlu_lightning.reporting.run_folder import RunRecord, read_run

__all__ = ["RunRecord", "read_run", "run_page"]
