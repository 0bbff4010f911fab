"""Modules of bare weights with a plan that says the same of all, and how large initial weights are."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from helpers.plans import entry
from mlu_lightning import Plan, Ratios, Role

MODES = ("rescale", "normal", "coupled")
GROWN = Ratios(depth=2.0, inputs=4.0, outputs=9.0)
# The table's std at these ratios (theory.md, section 3), worked out by hand; the other roles keep the base's
STD = dict.fromkeys(Role, 1.0) | {Role.BRANCH_OUT: 3 / 4, Role.STREAM_BOUNDED_MATRIX: 1 / 4}
_OF_INPUTS = (Role.EMBEDDING, Role.BRANCH_IN, Role.BRANCH_HIDDEN, Role.BRANCH_BOUNDED_MATRIX, Role.STREAM_MATRIX)
STD |= dict.fromkeys(_OF_INPUTS, 1 / 2)
BASE_STD = 0.1
FLOAT32 = 1e-6  # one rounding of every entry
SAMPLED = 0.025  # the root mean square of 2e4 normal numbers has a standard error of 1/sqrt(4e4): five of those


class Bag(nn.Module):  # parameters under the names that a test gives them
    def __init__(self, **values: Tensor) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value))


def plan_of(module: nn.Module, **says: Any) -> Plan:
    """A plan that says the same of every parameter, unless it has an entry of its own under its name."""
    parameters = {}
    for name, value in module.named_parameters():
        shape = tuple(value.shape)
        usual = {
            "role": Role.BRANCH_IN,
            "shape": shape,
            "base_shape": (1,) * len(shape),
            "ratios": GROWN,
            "base_std": BASE_STD,
            "fans": (shape[1], shape[0]) if len(shape) > 1 else (1, math.prod(shape)),
        }
        shared = {key: value for key, value in says.items() if not isinstance(value, dict)}
        parameters[name] = entry(**{**usual, **shared, **says.get(name, {})})
    return Plan(parameters, (), (), ())


def rms(*values: Tensor) -> float:
    flat = np.concatenate([value.detach().double().numpy().ravel() for value in values])
    return float(np.sqrt(np.mean(flat**2)))


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def values_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(module: nn.Module, before: dict[str, Tensor]) -> None:
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
