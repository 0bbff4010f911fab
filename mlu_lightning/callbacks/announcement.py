"""What a fit reports when it starts: one line, and the plan saved beside its logs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from mlu_lightning.application.applied import Applied
from mlu_lightning.planning import Plan
from mlu_lightning.planning.rendering import TITLES
from mlu_lightning.table import Role
from mlu_lightning.utilities.whole_files import write_whole

PLAN_FILE = "plan.yaml"


def announce(trainer: Trainer, applied: Applied) -> None:
    """Say what the fit does, and save its plan beside its logs, unless it only tries whether it runs."""
    if getattr(trainer, "fast_dev_run", False):
        return
    rank_zero_info(one_line(applied))
    _save(trainer, applied.plan)


def one_line(applied: Applied) -> str:
    """Describe what is applied to a module: shape, roles, optimizers, multipliers and the number of warnings."""
    plan = applied.plan
    absolute = plan.base is None
    depths = _changes(((stream.depth, stream.base_depth) for stream in plan.streams), absolute)
    embeddings = _changes(((stream.embedding, stream.base_embedding) for stream in plan.streams), absolute)
    kinds = dict.fromkeys(branch.kind for branch in plan.branches)
    hidden = [
        f"{kind} {_changes(((b.hidden, b.base_hidden) for b in plan.branches if b.kind == kind), absolute)}"
        for kind in kinds
    ]
    ratios = [f"{d.kind} {d.ratio:.3g}" for d in plan.distances if d.ratio is not None and not plan.is_at_base]
    shape = ", ".join([f"depth {depths}", f"embedding {embeddings}", *hidden])
    counts = Counter(plan.roles.values())
    roles = ", ".join(f"{counts[role]} {role.value}" for role in Role if counts[role])
    optimizers = " and ".join(family.value for family in plan.optimizers) or "none yet"
    outside = len(applied.acting)
    held = len(plan.forward_factors) - outside
    places = [f"{count} {where}" for count, where in ((held, "in weights"), (outside, "in hooks")) if count]
    return "; ".join(
        [
            f"{TITLES[plan.parameterization]}: {shape}{', no base (absolute form)' if absolute else ''}",
            *([f"distance ratio {', '.join(ratios)}"] if ratios else []),
            f"roles {roles}",
            f"optimizer {optimizers}",
            f"multipliers {', '.join(places) or 'all 1'}",
            f"{len(plan.advice) or 'no'} warning{'' if len(plan.advice) == 1 else 's'}.",
        ]
    )


def _changes(sizes: Iterable[tuple[int, int]], absolute: bool) -> str:
    pairs = dict.fromkeys(sizes)
    return "/".join(f"{own}" if own == base or absolute else f"{own} (base {base})" for own, base in pairs)


@rank_zero_only
def _save(trainer: Trainer, plan: Plan) -> None:
    """Write the plan where loggers have the files of the run; the same one is not written again."""
    folders = [_folder(logger, trainer.default_root_dir) for logger in trainer.loggers]
    files = dict.fromkeys(folder / PLAN_FILE for folder in folders if folder is not None)
    text = plan.to_yaml().encode() if files else b""
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if not (file.is_file() and file.read_bytes() == text):
                write_whole({file: text})
        except OSError as error:
            rank_zero_warn(f"The plan could not be saved as {file}: {error}. Checkpoints hold it all the same.")


def _folder(logger: Logger, root: str) -> Path | None:
    """Folder of one run, in which its checkpoints are, too, where the logger is the first; None if it is not known here."""
    _ = getattr(logger, "experiment", None)  # which looks whether others have written there before
    own = getattr(logger, "log_dir", None)
    if own is None and logger.name and logger.version not in (None, ""):
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        own = os.path.join(logger.save_dir or root, logger.name, version)
    return None if own is None or "://" in str(own) else Path(own)
