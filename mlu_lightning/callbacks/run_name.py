"""Identify a run by what determines it, so that a run that is restarted from its beginning is recognized."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from mlu_lightning.observation.batches import batch_hash
from mlu_lightning.observation.reference_format import ReferenceHeader, RunName
from mlu_lightning.planning import Plan
from mlu_lightning.planning.fingerprint import fingerprint
from mlu_lightning.utilities.checksums import checksums

_START = {"initial weights", "seed"}
_JOBS = (("SLURM_JOB_ID", "SLURM_RESTART_COUNT"), ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"))
"""Where schedulers that start a job again tell its number, and how often they have."""


def name_run(
    trainer: Trainer, module: LightningModule, plan: Plan | None, header: ReferenceHeader, probe: Any
) -> RunName:
    """Name a run that begins: two of one name train the same module from the same weights in the same way."""
    optimizers = [
        [type(optimizer).__name__, [_of_group(group) for group in optimizer.param_groups]]
        for optimizer in trainer.optimizers
    ]
    schedulers = [
        [type(config.scheduler).__name__, config.interval, config.frequency, config.scheduler.state_dict()]
        for config in trainer.lr_scheduler_configs
    ]
    settings = (
        *(trainer.world_size, trainer.num_training_batches, trainer.accumulate_grad_batches),
        *(trainer.gradient_clip_val, trainer.gradient_clip_algorithm, trainer.precision),
    )
    state = checksums({**dict(module.named_parameters()), **dict(module.named_buffers())})
    parts = {
        "module": [type(module).__name__, dict(module.hparams)],
        "recordings": asdict(replace(header, plan=None)),
        "plan": None if plan is None else fingerprint(plan),
        "probe": batch_hash(probe),
        "optimizers": optimizers,
        "schedulers": schedulers,
        "settings of the Trainer": settings,
        "initial weights": {name: [str(sums.dtype), sums.shape, sums.sums] for name, sums in state.items()},
        "seed": torch.initial_seed(),
    }
    digests = {part: hashlib.sha256(json.dumps(_plain(value)).encode()).hexdigest() for part, value in parts.items()}
    for job, restarts in _JOBS:
        if os.environ.get(job, "none") != "none":  # which elastic launchers have if nobody gave them a name
            return RunName(digests, f"{job}={os.environ[job]}", int(os.environ.get(restarts, 0)))
    return RunName(digests)


def is_restarted(recorded: RunName, run: RunName) -> bool:
    """Whether a run is the recorded one, begun again: by its name, or by its scheduler where seeds are drawn anew."""
    others = {*recorded.differences(run)}
    requeued = run.job != "" and run.job == recorded.job and run.restarts > recorded.restarts
    return bool(recorded.parts) and not recorded.kept and (not others or (requeued and others <= _START))


def _of_group(group: Mapping[str, Any]) -> dict[str, Any]:
    sizes = [parameter.shape for parameter in group["params"]]
    return {name: value for name, value in group.items() if name != "params"} | {"sizes": sizes}


def _plain(value: Any) -> Any:
    """Numbers, texts and what holds them, as JSON; of other objects, which a process may write in its own way, the type."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, Mapping):
        return [[str(key), _plain(value[key])] for key in sorted(value, key=str)]
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
