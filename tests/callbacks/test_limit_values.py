"""EmbeddingDistance from the infinite model: logged values are those of infinite models that are trained by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.limit_runs import SMALL, decayed, measure, resnet, tokens, transformer, with_optimizer
from helpers.watched_runs import SHAPE, Weights, loader, samples, stream_of
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from mlu_lightning import MLUCallback
from mlu_lightning.callbacks.infinite_limit import Limit
from mlu_lightning.limit.infinite_model import InfiniteModel, infinite_model

DEPTHS = ("0", "0.25", "0.5", "0.75", "1")


class Batches(Callback):  # keeps what training_step is given
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any) -> None:
        self.seen.append([part.clone() for part in batch] if isinstance(batch, (list, tuple)) else batch.clone())


def cycled(optimizer: Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=8, base_momentum=0.5)


def limit_stream(limit: InfiniteModel, x: Tensor) -> tuple[list[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """theory.md, section 2, at embedding dimension r, with the stream between Euler steps interpolated."""
    weights = {name: value.double().numpy() for name, value in limit.module.state_dict().items()}
    h = [x.double().numpy() @ weights["embed.weight"].T]
    r, depth = h[0].shape[1], len(limit.module.blocks)  # type: ignore[arg-type]
    for block in range(depth):
        read, write = weights[f"blocks.{block}.read.weight"], weights[f"blocks.{block}.write.weight"]
        h.append(h[-1] + np.tanh(h[-1] @ read.T) @ write.T / depth)
    found = []
    for s in map(float, DEPTHS):
        below = min(int(s * depth), depth - 1)
        weight = s * depth - below
        found.append((1 - weight) * h[below] + weight * h[below + 1])
    return found, h[-1] @ weights["readout.weight"].T / r


def expected_distances(limits: list[InfiniteModel], start: Any, now: Any, x: Tensor) -> dict[str, float]:
    """Of a run with these weights at its start and now, by NumPy."""
    streams, outputs = zip(*(limit_stream(limit, x) for limit in limits), strict=True)
    h = [value.double().numpy() for value in stream_of(now, x, branch=1 / SHAPE["depth"])]
    w = np.concatenate((start["embed.weight"].numpy(), start["readout.weight"].numpy().T), 1).astype(float)
    spread = np.array([3**-0.5] * 3 + [1.0] * 2)  # of the absolute form, in theory.md, section 2: N(0, 1/d_in), N(0, 1)
    expected: dict[str, float] = {}

    def cka(a: Any, b: Any) -> float:
        a, b = a - a.mean(0), b - b.mean(0)
        return float(1 - np.linalg.norm(a.T @ b) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)))

    def compare(name: str, key: str, one: Any, other: Any, coordinates: Any) -> None:
        rows, grams = len(one), one @ one.T / one.shape[1] - other @ other.T / other.shape[1]
        nuclear = np.linalg.svd(one.T @ other / math.sqrt(one.shape[1] * other.shape[1]), compute_uv=False).sum()
        square = (one**2).sum() / one.shape[1] + (other**2).sum() / other.shape[1] - 2 * nuclear
        expected[f"rms/{key}{name}"] = float(np.sqrt(np.mean((one - coordinates) ** 2)))
        expected[f"gram/{key}{name}"] = float(np.linalg.norm(grams) / rows)
        expected[f"cka/{key}{name}"] = cka(one, other)
        expected[f"procrustes/{key}{name}"] = float(np.sqrt(max(0.0, square) / rows))

    for i, s in enumerate(DEPTHS):
        a = streams[0][i] / (math.sqrt(5) * spread)
        compare("", f"s={s}", h[i], streams[0][i], a @ w.T)
        if len(limits) > 1:
            compare("/floor", f"s={s}", streams[1][i], streams[0][i], streams[0][i])
    f = h[-1] @ now["readout.weight"].double().numpy().T / SHAPE["embedding"]
    expected["output"] = float(np.sqrt(np.mean((f - outputs[0]) ** 2)))
    if len(limits) > 1:
        expected["output/floor"] = float(np.sqrt(np.mean((outputs[1] - outputs[0]) ** 2)))
    return expected


SGD: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum and decay": {"momentum": 0.8, "weight_decay": 0.2},
    "nesterov": {"momentum": 0.8, "nesterov": True},
    "dampening": {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},
}


@pytest.mark.parametrize(
    ("sgd", "schedule", "accumulated"),
    [("plain", None, 1), ("momentum and decay", decayed, 1), ("nesterov", cycled, 1), ("dampening", decayed, 4)],
)
def test_logged_values_are_those_of_limits_trained_by_hand(sgd: str, schedule: Any, accumulated: int) -> None:
    """The probe is of three validation samples; there are six batches in an epoch."""
    weights, batches, mlu = Weights(), Batches(), MLUCallback(residual="hook")

    def configure(parameters: Any) -> Any:
        optimizer = torch.optim.SGD(parameters, 0.3, **SGD[sgd])
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}

    module = with_optimizer(resnet(), configure)
    settings = {"validation": loader(seed=1), "steps": 7, "accumulate_grad_batches": accumulated}
    logged = measure(replace(SMALL, positions=3), mlu, weights, batches, module=module, **settings)
    assert list(logged) == [0, 1, 2, 4, 7]
    start, initial = weights.at[0], resnet()
    initial.load_state_dict(start)
    limits = [infinite_model(initial, mlu.plan, 6, 16, seed=seed) for seed in (0, 1)]
    optimizers = [limit.optimizer(0.3) for limit in limits]
    schedules = []
    for optimizer in optimizers:
        optimizer.param_groups[0].update(SGD[sgd])
        schedules.append(None if schedule is None else schedule(optimizer))
    x = samples(seed=1).tensors[0][:3]
    made = 0
    found = {0: expected_distances(limits, start, start, x)}
    for number, (inputs, targets) in enumerate(batches.seen, 1):
        for limit in limits:
            (F.mse_loss(limit.module(inputs), targets) / accumulated).backward()
        if number % 6 % accumulated and number % 6:
            continue
        made += 1
        for optimizer, scheduler in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
        found[made] = expected_distances(limits, start, weights.at[made], x)
    assert made == 7
    for step, values in logged.items():
        # float32; cka and procrustes are small differences of larger numbers, and have their rounding
        assert values == pytest.approx(found[step], rel=1e-4, abs=1e-5), step
    moved = {name: abs(logged[7][name] - logged[0][name]) for name in logged[0]}
    assert moved["rms/s=1"] > 0.01 and moved["output"] > 0.01 and moved["rms/s=1/floor"] > 0.01, "all of them train"


def test_transformer_beside_its_limit() -> None:
    batches, weights, mlu = Batches(), Weights(), MLUCallback(residual="hook")
    module = transformer(momentum=0.5, schedule_steps=20)
    logged = measure(
        Limit(depth=6, units=32, heads=8, seeds=1), mlu, weights, batches, module=module, data=tokens(), steps=6
    )
    assert list(logged) == [0, 1, 2, 4, 6]
    initial = transformer()
    initial.load_state_dict(weights.at[0])
    limit = infinite_model(initial, mlu.plan, 6, 32, 8)
    optimizer = limit.optimizer(0.3, 0.5)
    w = torch.cat((weights.at[0]["tokens.weight"].T, weights.at[0]["readout.weight"].T), 1)
    x = tokens().dataset[:4][:, :-1]  # type: ignore[index]
    for step, batch in enumerate([*batches.seen, None]):
        if step in logged:
            stream = limit.module.tokens(x)  # type: ignore[operator]
            for branch in limit.module.branches:  # type: ignore[union-attr]
                stream = stream + branch(stream)
            if step == 6:  # the module is as it was after the last step, with its multipliers
                h = module.tokens(x)
                for branch in module.branches:
                    h = h + branch(h)
                rms = (h - stream / 14**0.5 @ w.T).square().mean().sqrt().item()  # S = 1
                assert logged[step]["rms/s=1"] == pytest.approx(rms, rel=1e-4)
                output = (module(x) - limit.module(x)).square().mean().sqrt().item()
                assert logged[step]["output"] == pytest.approx(output, rel=1e-3)
        if batch is not None:
            # a linear warm-up over a tenth of the steps, and a linear decay
            optimizer.param_groups[0]["lr"] = 0.3 * min((step + 1) / 2, (20 - step) / 19)
            F.cross_entropy(limit.module(batch[:, :-1]).mT, batch[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()


def test_folded_run_is_at_the_distances_of_the_attached_one() -> None:
    runs = []
    for residual in ("hook", "fold"):
        torch.manual_seed(1)
        runs.append(measure(SMALL, MLUCallback(residual=residual), module=resnet(momentum=0.9)))  # type: ignore[arg-type]
    attached, folded = runs
    assert list(folded) == list(attached) == [0, 1, 2, 4, 6]
    for step, values in attached.items():
        assert folded[step] == pytest.approx(values, rel=1e-4, abs=1e-5)  # multiplied in another order, in float32


def test_other_precisions_measure_nearly_the_same() -> None:
    expected = measure(SMALL, data=loader(shuffle=False))
    # rounding of values of size 1 over a few steps: 2^-24 in float32, and 2^-9 in bfloat16
    for precision, tolerance in (("64-true", 1e-5), ("bf16-true", 0.02), ("bf16-mixed", 0.02)):
        found = measure(SMALL, data=loader(shuffle=False), precision=precision)
        assert list(found) == [0, 1, 2, 4, 6] and found[4] != expected[4]
        for step, values in found.items():
            assert values == pytest.approx(expected[step], abs=tolerance, rel=0), (precision, step)
