"""Send values, plans and reference files to the Trainer's loggers, and fetch reference files from W&B."""

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
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from mlu_lightning.observation import Reference
from mlu_lightning.planning import Plan
from mlu_lightning.table import OptimizerFamily
from mlu_lightning.utilities.lightning_namespaces import of_both
from mlu_lightning.utilities.names import name_pattern


def log_values(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Log values that are measured now and then to all loggers, at the present optimizer step.

    ``self.log`` would drop what does not fall on a multiple of ``log_every_n_steps``, and takes longer than measuring.
    """
    if trainer.barebones or not values:
        return
    show_values(trainer, values)
    for logger in trainer.loggers:
        for part in _as_taken(values, logger):
            logger.log_metrics(part, step=trainer.global_step)
        logger.save()


def show_values(trainer: Trainer, values: Mapping[str, float]) -> None:
    """Let other callbacks monitor values, also those of before a checkpoint, which the Trainer forgets when a fit starts."""
    metrics = {name: torch.tensor(value) for name, value in values.items()}
    trainer.callback_metrics.update(metrics)
    trainer.logged_metrics.update(metrics)


@rank_zero_only
def log_plan(loggers: Sequence[Logger], plan: Plan, residual: str, families: Mapping[str, OptimizerFamily]) -> None:
    """Log a plan to W&B, as ``mlu`` in the run's config and as a table, and to TensorBoard, as text.

    Numbers are factors relative to the base, for weights into which no multiplier is folded.
    """
    for logger in loggers:
        if isinstance(logger, of_both(WandbLogger)):
            logger.experiment.config.update({"mlu": _summary(plan, residual, families)}, allow_val_change=True)
            logger.log_table("mlu/plan", columns=[*_COLUMNS], data=_rows(plan, families))
        elif isinstance(logger, of_both(TensorBoardLogger)):
            logger.experiment.add_text("mlu/plan", f"```\n{plan}\n```")


@rank_zero_only
def log_reference(loggers: Sequence[Logger], path: Path) -> None:
    """Make a reference file an artifact of type ``reference`` in W&B; an offline run keeps a copy to be synced."""
    for logger in loggers:
        if not isinstance(logger, of_both(WandbLogger)):
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
    """Find a reference file by its path, or download it by the name ``entity/project/name:alias`` of a W&B artifact.

    The artifact becomes an input of the Trainer's W&B run. One process of each machine downloads; all of them have to
    call this.
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


def _as_taken(values: Mapping[str, float], logger: Logger) -> list[dict[str, float]]:
    """Values as a logger takes them: MLflow takes 1000 at once, and no "=" in names, of each of which Lightning warns."""
    if not isinstance(logger, of_both(MLFlowLogger)):
        return [dict(values)]
    named = [(name.replace("=", ""), value) for name, value in values.items()]
    return [dict(named[start : start + 1000]) for start in range(0, len(named), 1000)]


_COLUMNS = "parameters", "tensors", "role", "shape", "optimizer", "multiplier", "std", "lr", "eps", "weight_decay"
_FACTORS = _COLUMNS[-5:]
_ARTIFACT = re.compile(r"(?P<project>(?:[^/:]+/){0,2})(?P<name>[^/:]+):(?P<alias>[^/:]+)")
_NOT_ONLINE = "offline", "dryrun", "disabled"
ValueT = TypeVar("ValueT")


def _summary(plan: Plan, residual: str, families: Mapping[str, OptimizerFamily]) -> dict[str, Any]:
    streams, branches = plan.streams, plan.branches
    shape = _shape([(at.depth, at.embedding) for at in streams], [(branch.kind, branch.hidden) for branch in branches])
    base = _shape(
        [(at.base_depth, at.base_embedding) for at in streams],
        [(branch.kind, branch.base_hidden) for branch in branches],
    )
    ratios: dict[str, float | list[float]] = {}
    for kind in dict.fromkeys(distance.kind for distance in plan.distances):
        of_kind = [each.ratio for each in plan.distances if each.kind == kind and each.ratio is not None]
        if of_kind:
            ratios[kind] = _short(of_kind)
    roles: dict[str, list[dict[str, float | None]]] = {}
    for name, factors in _factors(plan, families).items():
        roles.setdefault(plan.parameters[name].role.value, []).append(factors)
    return {
        **shape,
        "base": None if plan.base is None else base,
        "parameterization": plan.parameterization.value,
        "alpha": plan.alpha,
        "batch_ratio": plan.horizon.batch_ratio,
        "token_ratio": plan.horizon.token_ratio,
        **({"distance_ratio": ratios} if ratios else {}),
        **({"tuned": plan.tuned} if plan.tuned else {}),
        "residual": residual,
        "optimizer": _short([family.value for family in _distinct(families.values())]),
        "factors": {
            role: {key: _short(_distinct(factors[key] for factors in members)) for key in _FACTORS}
            for role, members in roles.items()
        },
    }


def _shape(streams: Sequence[tuple[int, int]], branches: Sequence[tuple[str, int]]) -> dict[str, Any]:
    hidden: dict[str, list[int]] = {}
    for kind, width in branches:
        hidden.setdefault(kind, []).append(width)
    return {
        "depth": _short([depth for depth, _ in streams]),
        "embedding": _short([embedding for _, embedding in streams]),
        "hidden": {kind: _short(_distinct(widths)) for kind, widths in hidden.items()},
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
    applied = {name: _FACTORS if name in families else ("multiplier", "std") for name in columns}
    return {
        name: {key: getattr(scales[family][name], key) if key in applied[name] else None for key in _FACTORS}
        for name, family in columns.items()
    }


def _distinct(values: Iterable[ValueT]) -> list[ValueT]:
    return list(dict.fromkeys(values))


def _short(values: Sequence[ValueT]) -> ValueT | list[ValueT]:
    return values[0] if len(set(values)) == 1 else list(values)


def _find(trainer: Trainer, source: str) -> Path:
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
        run = next((logger.experiment for logger in trainer.loggers if isinstance(logger, of_both(WandbLogger))), None)
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
