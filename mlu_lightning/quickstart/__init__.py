"""The quickstart command: from a text to losses of small Transformers, with MLU and without, at several shapes.

:func:`run_study` trains what a :class:`Study` says on the text of :func:`load_text`; :func:`loss_table`,
:func:`verdicts` and :func:`save_figure` show the runs, :func:`save_runs` keeps them, and :func:`read_runs` goes on.
"""

from mlu_lightning.quickstart.results import loss_table, save_figure, verdicts
from mlu_lightning.quickstart.study import Study, load_text, read_runs, run_study, save_runs

__all__ = ["Study", "load_text", "loss_table", "read_runs", "run_study", "save_figure", "save_runs", "verdicts"]
