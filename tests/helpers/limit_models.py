"""Small modules that have an infinite model, with their plans, data and training."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mlu_lightning import Plan
from mlu_lightning.models import CausalTransformer, ResNet

Array = NDArray[np.float64]

INPUTS, OUTPUTS, SAMPLES = 3, 2, 4
VOCABULARY, CONTEXT = 5, 4
STDS = {"embed.weight": 0.7, "readout.weight": 1.9}  # S is far from a multiple of the identity
S = np.repeat(np.square([*STDS.values()]), [INPUTS, OUTPUTS])


def data() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(INPUTS, SAMPLES)), rng.normal(size=(OUTPUTS, SAMPLES))


def tensors() -> tuple[Tensor, Tensor]:
    x, y = data()
    return torch.from_numpy(x.T.copy()), torch.from_numpy(y.T.copy())


def with_stds(plan: Plan, stds: dict[str, float]) -> Plan:
    parameters = {name: replace(p, base_std=stds.get(name, p.base_std)) for name, p in plan.parameters.items()}
    return replace(plan, parameters=parameters)


def planned(activation: str = "tanh", trained: bool = True, alpha: float = 1.0, **shape: int) -> tuple[ResNet, Plan]:
    """A network in float64 and its plan in the absolute form, with the variances of S."""
    shape = {"depth": 2, "hidden": 8, "embedding": 6} | shape
    module = ResNet(**shape, inputs=INPUTS, outputs=OUTPUTS, activation=activation, train_embedding=trained).double()
    return module, with_stds(Plan.from_model(module, alpha=alpha), STDS)


def descend(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x, y = tensors()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(module(x), y).backward()
        optimizer.step()


def slope(sizes: list[int], errors: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


def tokens(samples: int = 4) -> Tensor:
    return torch.randint(VOCABULARY, (samples, CONTEXT + 1), generator=torch.Generator().manual_seed(0))


def transformer(**sizes: Any) -> CausalTransformer:
    usual = {"depth": 2, "embedding": 8, "heads": 2, "head_dim": 4, "mlp_hidden": 8, "norm_gains": False}
    return CausalTransformer(VOCABULARY, CONTEXT, **usual | {"optimizer": "sgd"} | sizes)


def planned_transformer(**sizes: Any) -> tuple[CausalTransformer, Plan]:
    """With norms of 1 and 2 of the entries of W, by which norms and logits differ from those of any other S."""
    module = transformer(**sizes)
    return module, with_stds(Plan.from_model(module), {"tokens.weight": 1.0, "readout.weight": 2.0})
