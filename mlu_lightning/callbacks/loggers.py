"""What goes to the Trainer's loggers, and comes from them: values at their steps, plans, and reference files."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from mlu_lightning.observation import Reference
from mlu_lightning.planning import Plan
from mlu_lightning.table import OptimizerFamily
from mlu_lightning.utilities.names import name_pattern

__all__ = ["fetch_reference", "log_plan", "log_reference", "log_values", "show_values"]


def log_values(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    """Log values that are measured now and then, at their own steps.

    They become ``callback_metrics``, which other callbacks monitor, and ``logged_metrics``, as those of ``self.log`` do.
    That itself would send to loggers only what comes at a multiple of ``log_every_n_steps``, and takes a quarter of a
    millisecond for each value, more than measuring it. All loggers have the values under the same names and steps, in W&B
    along ``trainer/global_step``; only ``MLFlowLogger``, and ``TensorBoardLogger`` where it writes with tensorboardX, change
    characters of names such as "=".

    """
    if trainer.barebones:
        return
    show_values(trainer, values)
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)
        logger.save()


def show_values(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Let other callbacks monitor values, also those that were logged before the checkpoint that a run goes on from.

    The Trainer forgets them when a fit starts, and a run of which the next ones are due much later would have none until
    then, where the uninterrupted run still has the last ones.
    """
    metrics = {name: torch.tensor(value) for name, value in values.items()}
    trainer.callback_metrics.update(metrics)
    trainer.logged_metrics.update(metrics)


@rank_zero_only
def log_plan(loggers: Sequence[Logger], plan: Plan, residual: str, families: Mapping[str, OptimizerFamily]) -> None:
    """Show a plan where a run is shown.

    A ``WandbLogger`` gets the shape, that of the base, and the factors of each role as ``mlu`` in the run's config, to
    filter and group runs by, and the table ``mlu/plan`` with a row for all parameters that are alike but for their place
    along the depth. A ``TensorBoardLogger`` gets the printed plan as the text ``mlu/plan``. Where parameters that share an
    entry have different numbers, it is a list of them. ``families`` has the column of the table for every parameter that an
    optimizer has; learning rate, eps and weight decay of the others are None. All numbers are factors relative to the base,
    for weights into which no multiplier is folded; ``residual`` is how the multipliers are applied.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.config.update({"mlu": _summary(plan, residual, families)}, allow_val_change=True)
            logger.log_table("mlu/plan", columns=[*_COLUMNS], data=_rows(plan, families))
        elif isinstance(logger, TensorBoardLogger):
            tables = [plan.table(family) for family in _distinct(families.values())] or [str(plan)]
            logger.experiment.add_text("mlu/plan", "\n\n".join(f"```\n{table}\n```" for table in tables))


@rank_zero_only
def log_reference(loggers: Sequence[Logger], path: Path) -> None:
    """Make a reference file an artifact of type ``reference``, named as the file is without its extension.

    Loggers of W&B take artifacts; a run that is offline keeps a copy to be synced with it.
    """
    for logger in loggers:
        if not isinstance(logger, WandbLogger):
            continue
        import wandb

        reference = Reference.load(path)
        header = reference.header
        metadata: dict[str, Any] = {
            "depth": _short(header.depth),
            "embedding": _short(header.embedding),
            "hidden": header.hidden,
            "depths": list(header.depths),
            "steps": list(reference.steps),
            "positions": _short(_distinct(rows for rows, _ in header.locations.values())),
        }
        try:
            artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "-", path.stem)[:128], "reference", metadata=metadata)
            artifact.add_file(str(path))
            logger.experiment.log_artifact(artifact)
        except OSError as error:
            # the training is done, and the file is where it was asked for
            rank_zero_warn(f"The reference {path} did not become a W&B artifact: {error}. Upload the file later.")


def fetch_reference(trainer: Trainer, source: str) -> Path:
    """Find a reference file by its path or, by downloading it, by the name of a W&B artifact.

    The artifact becomes an input of the run of the Trainer's ``WandbLogger``, if it has one, and its file is stored under
    ``mlu_references`` in the Trainer's ``default_root_dir``. One process of each machine downloads while the others
    wait, so all of them have to call this. The name is ``entity/project/name:alias``, where the entity, or both it and the
    project, can be left out if they are those of the run. Every process gets the same path, or the error.

    Raises:
        FileNotFoundError: if it is neither.
        ValueError: if the artifact cannot be had, or does not hold one safetensors file.
    """
    found: Path | FileNotFoundError | ValueError = Path(source)
    if trainer.local_rank == 0:
        try:
            found = _find(trainer, source)
        except (FileNotFoundError, ValueError) as error:
            found = error
    everywhere = trainer.strategy.reduce_boolean_decision(isinstance(found, Path))
    first = trainer.strategy.broadcast(found)
    if isinstance(found, Exception):
        raise found
    if isinstance(first, Exception):
        raise first
    if not everywhere:
        raise ValueError(f"{source} could not be read on another machine of this run; see the error of its processes.")
    return first


_COLUMNS = "parameters", "tensors", "role", "shape", "optimizer", "multiplier", "std", "lr", "eps", "weight_decay"
_FACTORS = _COLUMNS[-5:]
_ARTIFACT = re.compile(r"(?P<project>(?:[^/:]+/){0,2})(?P<name>[^/:]+):(?P<alias>[^/:]+)")
_NOT_ONLINE = "offline", "dryrun", "disabled"
ValueT = TypeVar("ValueT")


def _summary(plan: Plan, residual: str, families: Mapping[str, OptimizerFamily]) -> dict[str, Any]:
    """A plan as a few numbers."""
    hidden: dict[str, list[int]] = {}
    base_hidden: dict[str, list[int]] = {}
    for branch in plan.branches:
        hidden.setdefault(branch.kind, []).append(branch.hidden)
        base_hidden.setdefault(branch.kind, []).append(branch.base_hidden)
    base = {
        "depth": _short([stream.base_depth for stream in plan.streams]),
        "embedding": _short([stream.base_embedding for stream in plan.streams]),
        "hidden": {kind: _short(_distinct(widths)) for kind, widths in base_hidden.items()},
    }
    roles: dict[str, list[dict[str, float | None]]] = {}
    for name, factors in _factors(plan, families).items():
        roles.setdefault(plan.parameters[name].role.value, []).append(factors)
    return {
        "depth": _short([stream.depth for stream in plan.streams]),
        "embedding": _short([stream.embedding for stream in plan.streams]),
        "hidden": {kind: _short(_distinct(widths)) for kind, widths in hidden.items()},
        "base": None if plan.base is None else base,
        "parameterization": plan.parameterization.value,
        "alpha": plan.alpha,
        "batch_ratio": plan.horizon.batch_ratio,
        "token_ratio": plan.horizon.token_ratio,
        "residual": residual,
        "optimizer": _short([family.value for family in _distinct(families.values())]),
        "factors": {
            role: {key: _short(_distinct(factors[key] for factors in members)) for key in _FACTORS}
            for role, members in roles.items()
        },
    }


def _rows(plan: Plan, families: Mapping[str, OptimizerFamily]) -> list[list[Any]]:
    """A plan with one row for all parameters that are alike but for their place along the depth."""
    rows = Counter[tuple[Any, ...]]()
    for name, factors in _factors(plan, families).items():
        parameter = plan.parameters[name]
        family = families[name].value if name in families else None
        shape = " x ".join(map(str, parameter.shape))
        rows[(name_pattern(name), parameter.role.value, shape, family, *factors.values())] += 1
    return [[row[0], count, *row[1:]] for row, count in rows.items()]


def _factors(plan: Plan, families: Mapping[str, OptimizerFamily]) -> dict[str, dict[str, float | None]]:
    """Factors of every parameter; those for the optimizer are None for a parameter that none has."""
    columns = {name: families.get(name, OptimizerFamily.ADAMW) for name in plan.parameters}
    scales = {family: plan.scales(family) for family in _distinct(columns.values())}
    found: dict[str, dict[str, float | None]] = {}
    for name, family in columns.items():
        factors = scales[family][name]
        found[name] = {key: getattr(factors, key) for key in _FACTORS}
        if name not in families:
            found[name].update(lr=None, eps=None, weight_decay=None)
    return found


def _distinct(values: Iterable[ValueT]) -> list[ValueT]:
    return list(dict.fromkeys(values))


def _short(values: Sequence[ValueT]) -> ValueT | list[ValueT]:
    """The value that all of them are, or all of them."""
    return values[0] if len(set(values)) == 1 else list(values)


def _find(trainer: Trainer, source: str) -> Path:
    """Find a reference file in the first process of a machine."""
    if Path(source).exists():
        return Path(source)
    artifact = _ARTIFACT.fullmatch(source)
    if artifact is None:
        raise FileNotFoundError(
            f"There is no file {source}, and it is not the name of a W&B artifact, entity/project/name:alias. Give the path "
            "of a file that ReferenceRecorder wrote, or the name of an artifact."
        )
    run = None
    if trainer.is_global_zero:
        run = next((logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)
    offline = os.environ.get("WANDB_MODE") in _NOT_ONLINE if run is None else run.offline or run.disabled
    installed = find_spec("wandb")
    if offline or installed is None or installed.origin is None:  # without origin it is a folder of runs named wandb
        raise ValueError(
            f"There is no file {source}, and as a W&B artifact it cannot be had: artifacts need W&B online, and it is "
            f"{'offline' if offline else 'not installed'} here. Give the path of the local file that ReferenceRecorder "
            "wrote."
        )
    folder = Path(trainer.default_root_dir, "mlu_references", artifact["project"])
    return _download(run, source, folder / f"{artifact['name']}-{artifact['alias']}")


def _download(run: Any, source: str, folder: Path) -> Path:
    """Download the file of an artifact, as an input of a run if there is one, into a folder."""
    import wandb

    try:
        artifact = wandb.Api().artifact(source) if run is None else run.use_artifact(source)
        names = [name for name in artifact.manifest.entries if name.endswith(".safetensors")]
        if len(names) != 1:
            raise ValueError(f"it holds {len(names)} safetensors files instead of one")
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as incomplete:  # the runs of a sweep may share the folder
            artifact.download(root=incomplete, path_prefix=names[0])
            return Path(incomplete, names[0]).replace(folder / Path(names[0]).name)
    except (wandb.Error, OSError, ValueError) as error:
        raise ValueError(
            f"There is no file {source}, and the W&B artifact cannot be used: {error}. Give the name of an artifact that "
            "ReferenceRecorder logged, as entity/project/name:alias, or the path of its local file."
        ) from error
