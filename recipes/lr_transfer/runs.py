"""Runs of ``lr_transfer.py``: what a study trains, which runs are the same, one run, and the file they are kept in."""

from __future__ import annotations

import json
import logging
import math
import signal
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from pydoc import locate
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim.lr_scheduler import LambdaLR

from mlu_lightning import MLUCallback, Plan
from mlu_lightning.models import CausalTransformer
from mlu_lightning.table import OptimizerFamily, Parameterization

__all__ = [
    "Run",
    "RunFile",
    "ScheduledTransformer",
    "Shape",
    "Study",
    "numbers",
    "plans_of",
    "shared_runs",
    "start_process",
    "train",
]

Shape = tuple[tuple[str, int], ...]
"""Arguments of the model that are sizes, and their values."""


@dataclass(frozen=True)
class Study:
    """What is trained. All of it can be given as YAML, with a model and data of one's own.

    Args:
        axes: by name, the sizes that grow together: arguments of the model, each with its values, the base's first.
        model: ``class_path`` of a LightningModule that logs ``val_loss``, and its ``init_args``; sizes and ``lr`` are
            put in.
        data: ``class_path`` of a LightningDataModule, and its ``init_args``; ``seed`` is put in.
        horizons: steps after which a run is validated; the last is the length of a run.
        exponents: powers of two that the base is trained at first, ``spacing`` apart.
        spacing: of the base's learning rates in octaves, 1/2 or 1; those of all other shapes are an octave apart.
        seeds: runs of each shape at each learning rate, with weights and data of their own.
        parameterization: parameterizations that are compared.
        trainer: arguments of the Trainer.

    Raises:
        ValueError: if axes begin at different values of an argument, or an axis has more values of one than of another.
    """

    axes: dict[str, dict[str, list[int]]]
    model: dict[str, Any]
    data: dict[str, Any]
    horizons: list[int]
    exponents: list[float]
    spacing: float = 0.5
    seeds: int = 3
    parameterization: list[str] = field(
        default_factory=lambda: [parameterization.value for parameterization in Parameterization]
    )
    trainer: dict[str, Any] = field(default_factory=lambda: {"accelerator": "cpu"})

    def __post_init__(self) -> None:
        first = dict(self.base)
        for axis, sizes in self.axes.items():
            if len({len(values) for values in sizes.values()}) != 1:
                raise ValueError(
                    f"The axis {axis!r} has arguments with different numbers of values. Give each as many."
                )
            for argument, (value, *_) in sizes.items():
                if value != first[argument]:
                    raise ValueError(
                        f"The axis {axis!r} begins at {argument} = {value}, and another at {first[argument]}. The first "
                        "value of an argument is the base's: give the same in all axes."
                    )

    @property
    def base(self) -> Shape:
        """Shape at which the learning rate is tuned."""
        return tuple({name: values[0] for sizes in self.axes.values() for name, values in sizes.items()}.items())

    def shapes(self, axis: str) -> list[Shape]:
        """Shapes along an axis, the base first.

        Args:
            axis: which.
        """
        grown = [
            dict(zip(self.axes[axis], values, strict=True)) for values in zip(*self.axes[axis].values(), strict=True)
        ]
        return [tuple((dict(self.base) | sizes).items()) for sizes in grown]

    def factors(self, axis: str) -> list[float]:
        """By what the first size of an axis has grown.

        Args:
            axis: which.
        """
        values = next(iter(self.axes[axis].values()))
        return [value / values[0] for value in values]


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        shape: of the model.
        parameterization: of its plan.
        exponent: of the learning rate, a power of two.
        seed: of weights and data.
        losses: on validation, at the horizons; NaN if the run diverged, nothing before it was made.
        seconds: of processor time that it took.
    """

    shape: Shape
    parameterization: str
    exponent: float
    seed: int
    losses: tuple[float, ...] = ()
    seconds: float = 0.0


class ScheduledTransformer(CausalTransformer):
    """``CausalTransformer`` on bytes with a warm-up and a cosine schedule, or with a constant learning rate after it.

    Args:
        depth: attention branches, and MLP branches.
        heads: of each attention branch.
        mlp_hidden: units of each MLP branch.
        embedding: dimension of the stream.
        lr: learning rate at its peak.
        steps: optimizer steps, at the last of which the cosine has come down to a tenth.
        warmup: first steps, over which the learning rate grows linearly.
        schedule: what follows.
        context: length of a sample in bytes.
        head_dim: of a head.
    """

    def __init__(
        self,
        depth: int,
        heads: int,
        mlp_hidden: int,
        embedding: int,
        lr: float,
        steps: int,
        warmup: int,
        schedule: Literal["cosine", "constant"] = "cosine",
        context: int = 32,
        head_dim: int = 16,
    ) -> None:
        super().__init__(256, context, depth, embedding, heads, head_dim, mlp_hidden, lr)
        self.steps, self.warmup, self.schedule = steps, warmup, schedule

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with the schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, self.betas, self.eps, self.weight_decay)
        schedule = LambdaLR(optimizer, self._factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _factor(self, step: int) -> float:
        """Share of the peak, from step 0 to the last one, ``steps - 1``."""
        if step < self.warmup or self.schedule == "constant":
            return min(1.0, (step + 1) / self.warmup)
        share = (step + 1 - self.warmup) / (self.steps - self.warmup)
        return 0.55 + 0.45 * math.cos(math.pi * min(share, 1.0))


def plans_of(study: Study) -> dict[tuple[Shape, str], Plan]:
    """Plans of all shapes, by shape and parameterization.

    Args:
        study: whose.
    """
    example = next(iter(_data(study, 0).train_dataloader()))
    base = _model(study, study.base, 1.0)
    shapes = dict.fromkeys(shape for axis in study.axes for shape in study.shapes(axis))
    return {
        (shape, parameterization): Plan.from_model(
            _model(study, shape, 1.0), example, base=base, parameterization=parameterization
        )
        for shape in shapes
        for parameterization in study.parameterizations
    }


def numbers(plan: Plan) -> tuple[Any, ...]:
    """All that a plan does to a run: AdamW's factors, from which those of any optimizer follow, and the forward pass's.

    Args:
        plan: whose.
    """
    multipliers = (plan.forward_multiplier(multiplier) for multiplier in plan.multipliers)
    return (*plan.scales(OptimizerFamily.ADAMW).items(), *multipliers)


def shared_runs(plans: Mapping[tuple[Shape, str], Plan]) -> dict[tuple[Shape, str], str]:
    """Parameterizations whose runs stand for those of another: the first ones with the same numbers at that shape.

    Args:
        plans: by shape and parameterization.
    """
    first: dict[tuple[Any, ...], str] = {}
    return {
        (shape, parameterization): first.setdefault((shape, numbers(plan)), parameterization)
        for (shape, parameterization), plan in plans.items()
    }


def train(study: Study, run: Run, plan: Plan) -> Run:
    """Train one model as any Lightning user would.

    Args:
        study: of the run.
        run: to be made.
        plan: of its shape and parameterization.
    """
    start = time.process_time()
    seed_everything(run.seed, verbose=False)
    model = _model(study, run.shape, 2.0**run.exponent)
    validations = _Validations()
    trainer = Trainer(
        max_steps=study.horizons[-1],
        val_check_interval=math.gcd(*study.horizons),
        callbacks=[MLUCallback(plan=plan), validations],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **study.trainer,
    )
    trainer.fit(model, datamodule=_data(study, run.seed))
    losses = tuple(validations.losses[step] for step in study.horizons)
    return replace(run, losses=losses, seconds=round(time.process_time() - start, 2))


def start_process() -> None:
    """One core for each run, none of the notes on hardware that these runs do not need, and a quiet Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


@dataclass(frozen=True)
class RunFile:
    """File of a study's runs, one JSON object a line; the first is the study.

    Args:
        path: of the file.
        study: whose runs they are.
    """

    path: Path
    study: Study

    def read(self) -> list[Run]:
        """Runs that were made, none without a file; a line that was cut off when it was written is taken out.

        Raises:
            ValueError: if the runs are those of another study.
        """
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        if not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
            self.path.write_text(text, encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        if not lines:
            return []
        mine = json.loads(json.dumps(asdict(self.study)))
        other = [name for name in mine.keys() | lines[0].keys() if mine.get(name) != lines[0].get(name)]
        if other:
            raise ValueError(
                f"{self.path} has runs of a study with other settings ({', '.join(sorted(other))}), which cannot be "
                "put together with these. Give --output another folder, or remove that one."
            )
        return [_run_of(line) for line in lines[1:]]

    def append(self, run: Run) -> None:
        """Write a run that has just been made.

        Args:
            run: to be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            if not file.tell():
                file.write(json.dumps(asdict(self.study)) + "\n")
            losses = [loss if math.isfinite(loss) else None for loss in run.losses]
            content = {**asdict(run), "shape": dict(run.shape), "losses": losses}
            file.write(json.dumps(content, allow_nan=False) + "\n")


class _Validations(Callback):
    """Keeps the losses of all validations, by step."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.losses[trainer.global_step] = trainer.callback_metrics["val_loss"].item()


def _run_of(line: Mapping[str, Any]) -> Run:
    losses = (math.nan if loss is None else loss for loss in line["losses"])
    return Run(**{**line, "shape": tuple(line["shape"].items()), "losses": tuple(losses)})


def _model(study: Study, shape: Shape, lr: float) -> Any:
    return _built(study.model, dict(shape) | {"lr": lr})


def _data(study: Study, seed: int) -> Any:
    data = _built(study.data, {"seed": seed})
    data.prepare_data()
    data.setup("fit")
    return data


def _built(spec: Mapping[str, Any], more: Mapping[str, Any]) -> Any:
    """An instance of a class that is named by its path."""
    found = locate(spec["class_path"])
    if not callable(found):
        raise ValueError(
            f"There is no class {spec['class_path']!r}. Give a path that can be imported, such as 'module.Class'."
        )
    return found(**{**spec.get("init_args", {}), **more})
