"""Train infinite models beside a run, on its own batches, to log its distance from the limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from mlu_lightning.callbacks.mlu_callback import MLUCallback
from mlu_lightning.callbacks.probe_batches import Layout, Probe, given_probe, on_rank_zero
from mlu_lightning.limit import InfiniteModel, Sampling, embedding_weights, infinite_model
from mlu_lightning.limit.infinite_model import HYPERPARAMETERS, check_gradient_descent, check_initialization
from mlu_lightning.limit.unit_sampling import check_sampling
from mlu_lightning.observation import MetricName, Observation, StreamName, compare, locate, observe
from mlu_lightning.observation.batches import clone_batch
from mlu_lightning.observation.schedule import Schedule, Steps
from mlu_lightning.planning import Plan
from mlu_lightning.utilities.lightning_steps import call_step, mute


@dataclass(frozen=True)
class Limit:
    """The infinite model as a reference: how finely it is computed, and where a run is compared with it.

    For gradient descent only; the models and conditions are those of :func:`mlu_lightning.limit.infinite_model`. Its noise
    is 1/sqrt(depth · units), its bias O(1/depth) (theory.md, section 5); a step costs depth · units · r, not L · M · D.

    Args:
        depth: Residual additions, the Euler steps of the limit.
        units: Hidden units of a perceptron branch, by default 1024, or what is exact for a linear activation.
        heads: Heads of an attention branch, by default units / (4 · head_dim).
        sampling: Sampling of units, ``"orthogonal"`` or ``"independent"``.
        seeds: Number of limits, each with other units; their distance from the first, ``.../floor``, is its error bar.
        steps: Optimizer steps to compare after: ``"log"`` for 0, 1, 2, 4, 8, ... and the last one, n for every n, or a list.
        depths: Relative depths s of the stream.
        positions: Rows to keep of the probe, the first samples of the validation (or else the training) data.

    Raises:
        ValueError: If an argument is not of these.

    >>> Limit(depth=64, units=512).seeds
    2
    """

    depth: int = 128
    units: int | None = None
    heads: int | None = None
    sampling: Sampling = "orthogonal"
    seeds: int = 2
    steps: Steps = "log"
    depths: tuple[float, ...] = (0, 0.25, 0.5, 0.75, 1)
    positions: int = 128

    def __post_init__(self) -> None:
        for name in ("depth", "units", "heads", "seeds", "positions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} of a Limit should be 1 or more.")
        check_sampling(self.sampling, *(size for size in (self.units, self.heads) if size is not None))
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths={self.depths!r} of a Limit should be relative depths between 0 and 1.")
        Schedule(self.steps)


class LimitRun:
    """Infinite models of one run, from its first step or the ``state_dict`` of an earlier one on, and a probe."""

    def __init__(
        self, settings: Limit, trainer: Trainer, module: LightningModule, state: dict[str, Any] | None = None
    ) -> None:
        layout = Layout.of(trainer, module)
        plan = _checked_plan(trainer, module, layout)
        if trainer.global_step > 0 and state is None:
            raise ValueError(
                f"This run goes on from step {trainer.global_step}, and the infinite model has to be trained from step 0. "
                "Resume from a checkpoint of a run with the same EmbeddingDistance, or begin at step 0."
            )
        check_gradient_descent(trainer.optimizers)
        if state is None:
            callbacks = vars(trainer)["callbacks"]
            if not any(isinstance(callback, MLUCallback) and callback.initialized for callback in callbacks):
                raise ValueError(
                    "The infinite model starts from initial weights, and MLUCallback did not initialize this module in this "
                    "fit: it has init=None, or the module was trained before. Build the module anew, and let MLUCallback "
                    'initialize it with init="rescale", "normal" or "coupled".'
                )
            check_initialization(module, plan)
        self.schedule = Schedule(settings.steps)
        self._settings = settings
        sizes = settings.depth, settings.units, settings.heads
        self._models = [infinite_model(module, plan, *sizes, settings.sampling, seed) for seed in range(settings.seeds)]
        for model in self._models:
            mute(model.module, [], lambda: [], lambda: [])
        self._optimizers = [model.optimizer(lr=0.0) for model in self._models]
        self._weights = embedding_weights(module, plan)
        if state is not None:
            self._restore(state)
        batch, step = on_rank_zero(trainer, lambda: given_probe(trainer, module, None, settings.positions))
        self._probe = Probe.of(trainer, module, batch, step, layout, settings.depths, settings.positions)

    def learn(self, trainer: Trainer, batch: Any) -> None:
        """Add the gradient of a batch of the run, as ``training_step`` is about to be given it."""
        for model in self._models:
            loss = call_step(model.module, "training_step", _converted(batch, model))
            (loss / trainer.accumulate_grad_batches).backward()

    def step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Update as the run is about to be updated, by its optimizer with its present learning rate."""
        check_gradient_descent([optimizer])  # a schedule may have given groups other learning rates meanwhile
        group = optimizer.param_groups[0]
        for limit_optimizer in self._optimizers:
            for parameters in limit_optimizer.param_groups:
                parameters.update({name: group[name] for name in HYPERPARAMETERS})
                if trainer.world_size > 1:
                    for parameter in parameters["params"]:
                        parameter.grad = trainer.strategy.reduce(parameter.grad, reduce_op="mean")
            limit_optimizer.step()
            limit_optimizer.zero_grad()

    def distances(self, trainer: Trainer, module: LightningModule, metrics: Sequence[MetricName]) -> dict[str, float]:
        """Distances of the run from the limit, and of limits with other units from it, by name and which of them it is."""
        limits = [self._observe(model) for model in self._models]
        observation = self._probe.observe(trainer, module)
        others: list[MetricName] = [metric for metric in metrics if metric != "rms"]
        values = compare(observation, limits[0], others)
        if "rms" in metrics:
            streams: Observation = {
                name: self._models[0].in_coordinates_of(self._weights, limit)
                for name, limit in limits[0].items()
                if isinstance(name, StreamName)
            }
            values |= compare(observation, streams, ["rms"])
        floors = [compare(other, limits[0], metrics) for other in limits[1:]]
        named = {f"{name}/limit": value for name, value in values.items()}
        return named | {f"{name}/floor": fmean(floor[name] for floor in floors) for name in values if floors}

    def state_dict(self) -> dict[str, Any]:
        """Weights of the limits, states of their optimizers, and the W that the run began with."""
        return {
            "weights": self._weights,
            "models": [model.module.state_dict() for model in self._models],
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }

    def _restore(self, state: dict[str, Any]) -> None:
        if len(state["models"]) != len(self._models):
            raise ValueError(
                f"The checkpoint is of a run that was compared with {len(state['models'])} limits, and Limit has "
                f"seeds={len(self._models)}. Give Limit(seeds={len(state['models'])})."
            )
        self._weights = state["weights"]
        saved = zip(state["models"], state["optimizers"], strict=True)
        for model, optimizer, (weights, optimizer_state) in zip(self._models, self._optimizers, saved, strict=True):
            try:
                model.module.load_state_dict(weights)
            except RuntimeError as error:
                raise ValueError(
                    "The checkpoint is of a run that was compared with a limit of other sizes. Give Limit the depth, units "
                    f"and heads of that run: {error}"
                ) from error
            optimizer.load_state_dict(optimizer_state)

    def _observe(self, model: InfiniteModel) -> Observation:
        streams = [stream.depth for stream in model.plan.streams]
        locations = locate(model.plan.taps, streams, self._settings.depths)
        batch = _converted(self._probe.batch, model)
        return observe(model.module, batch, locations, self._probe.step, self._settings.positions)


def _checked_plan(trainer: Trainer, module: LightningModule, layout: Layout) -> Plan:
    if layout.plan is None:
        raise ValueError(
            "The infinite model is the limit of runs in the MLU parameterization, and the Trainer has no MLUCallback. "
            "Add one, or compare with a run that ReferenceRecorder recorded."
        )
    if trainer.gradient_clip_val is not None:
        raise ValueError(
            f"The run clips gradients (gradient_clip_val={trainer.gradient_clip_val}), whose norm depends on the shape, so "
            "it has no infinite model. Train without, or compare with a run that ReferenceRecorder recorded."
        )
    if any(hasattr(parameter, "placements") for parameter in module.parameters()):
        raise ValueError(
            "The module's parameters are sharded (DTensor), and the infinite model needs its embedding and readout whole. "
            'Use one device or strategy="ddp", or compare with a run that ReferenceRecorder recorded.'
        )
    return layout.plan


def _converted(batch: Any, model: InfiniteModel) -> Any:
    """A copy of a batch, which steps may change, with floating-point numbers of the precision of an infinite model."""
    dtype = next(model.module.parameters()).dtype
    converted = tree_map_only(Tensor, lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, batch)
    return clone_batch(converted)
