"""What the study of learning rates trains: its settings, the plans, which runs are the same, and one run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field, replace
from pydoc import locate
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim.lr_scheduler import LambdaLR

from mlu_lightning import MLUCallback, Plan
from mlu_lightning.models import CausalTransformer
from mlu_lightning.table import OptimizerFamily, Parameterization, Role
from recipes.common.studies import QUIET

CAPPED = "capped"
"""MLU with a bounded std of ``branch_out``, which is no parameterization of the package."""

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
        parameterizations: names of those that are compared; ``"capped"`` is one of :func:`capped`.
        trainer: arguments of the Trainer.
    """

    axes: dict[str, dict[str, list[int]]]
    model: dict[str, Any]
    data: dict[str, Any]
    horizons: list[int]
    exponents: list[float]
    spacing: float = 0.5
    seeds: int = 3
    parameterizations: list[str] = field(default_factory=lambda: [name.value for name in Parameterization])
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

    def shapes(self, axis: str) -> dict[float, Shape]:
        """Shapes along an axis, the base first, by the factor by which its first size has grown."""
        columns = [[(name, value) for value in values] for name, values in self.axes[axis].items()]
        return {
            sizes[0][1] / columns[0][0][1]: tuple((dict(self.base) | dict(sizes)).items())
            for sizes in zip(*columns, strict=True)
        }


@dataclass(frozen=True)
class Run:
    """One training run."""

    shape: Shape
    parameterization: str
    exponent: float  # of the learning rate, a power of two
    seed: int  # of weights and data
    losses: tuple[float, ...] = ()  # on validation, at the horizons; NaN if the run diverged
    seconds: float = 0.0  # of processor time

    def encode(self) -> dict[str, Any]:
        """Content as JSON."""
        losses = [loss if math.isfinite(loss) else None for loss in self.losses]
        return {**asdict(self), "shape": dict(self.shape), "losses": losses}

    @classmethod
    def decode(cls, content: Mapping[str, Any]) -> Run:
        """Run of which this is the content."""
        losses = tuple(math.nan if loss is None else loss for loss in content["losses"])
        return cls(**{**content, "shape": tuple(content["shape"].items()), "losses": losses})


class ScheduledTransformer(CausalTransformer):
    """``CausalTransformer`` on bytes with a warm-up and a cosine schedule, or with a constant learning rate after it.

    Args:
        lr: learning rate at its peak.
        steps: optimizer steps, at the last of which the cosine has come down to a tenth.
        warmup: first steps, over which the learning rate grows linearly.
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
    """Plans by shape and parameterization."""
    example = next(iter(_data(study, 0).train_dataloader()))
    base = _model(study, study.base, 1.0)
    shapes = dict.fromkeys(shape for axis in study.axes for shape in study.shapes(axis).values())

    def plan(shape: Shape, name: str) -> Plan:
        table = Parameterization.MLU if name == CAPPED else name
        made = Plan.from_model(_model(study, shape, 1.0), example, base=base, parameterization=table)
        return capped(made) if name == CAPPED else made

    return {(shape, name): plan(shape, name) for shape in shapes for name in study.parameterizations}


def capped(plan: Plan) -> Plan:
    """The plan with stds of ``branch_out`` at which the initial random part √(D/(L·M)) is at most 1, or the base's."""
    tuned: dict[str, dict[str, float]] = {}
    for name, parameter in plan.parameters.items():
        if parameter.role is Role.BRANCH_OUT and parameter.branch is not None:
            branch = plan.branches[parameter.branch]
            stream = plan.streams[branch.stream]
            own = math.sqrt(stream.embedding / (stream.depth * branch.hidden))
            most = max(1.0, math.sqrt(stream.base_embedding / (stream.base_depth * branch.base_hidden)))
            if own > most:
                tuned[name] = {"std": most / own}
    return replace(plan, tuned=tuned)


def numbers(plan: Plan) -> tuple[Any, ...]:
    """All that a plan does to a run: AdamW's factors, from which those of any optimizer follow, and the forward pass's.

    They are rounded, because a product of factors may be that of others but for its last digit.
    """
    factors = ((name, astuple(scale)) for name, scale in plan.scales(OptimizerFamily.ADAMW).items())
    multipliers = (f"{plan.forward_multiplier(multiplier):.9g}" for multiplier in plan.multipliers)
    return (*((name, *(f"{number:.9g}" for number in scale)) for name, scale in factors), *multipliers)


def shared_runs(plans: Mapping[tuple[Shape, str], Plan]) -> dict[tuple[Shape, str], str]:
    """Parameterizations whose runs stand for those of another: the first ones with the same numbers at that shape."""
    first: dict[tuple[Any, ...], str] = {}
    return {(shape, name): first.setdefault((shape, numbers(plan)), name) for (shape, name), plan in plans.items()}


def train(study: Study, run: Run, plan: Plan) -> Run:
    """Train one model as any Lightning user would, and return the run with its losses."""
    start = time.process_time()
    seed_everything(run.seed, verbose=False)
    model = _model(study, run.shape, 2.0**run.exponent)
    validations = _Validations()
    trainer = Trainer(
        max_steps=study.horizons[-1],
        val_check_interval=math.gcd(*study.horizons),
        callbacks=[MLUCallback(plan=plan), validations],
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        **QUIET,
        **study.trainer,
    )
    trainer.fit(model, datamodule=_data(study, run.seed))
    losses = tuple(validations.losses[step] for step in study.horizons)
    return replace(run, losses=losses, seconds=round(time.process_time() - start, 2))


class _Validations(Callback):
    """Keeps the losses of all validations, by step."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.losses[trainer.global_step] = trainer.callback_metrics["val_loss"].item()


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
