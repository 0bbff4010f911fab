"""Forward passes that decide at random what they run, and that run twice: the same plan for every state of generators."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.residual_networks import Net, X, stepwise
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F
from transformers import HubertConfig, HubertModel

from mlu_lightning import Plan, discover

RUNS: dict[str, Callable[[], Any]] = {
    "a number of torch": lambda: torch.rand([]) > 0.3,
    "one of several": lambda: torch.rand(1).item() > 0.3,
    "kept where it is small": lambda: bool(torch.rand(()) < 0.7),
    "a vector": lambda: torch.empty(2).uniform_().tolist()[0] > 0.3,
    "bernoulli": lambda: torch.bernoulli(torch.tensor(0.7)) == 1,
    "an index": lambda: torch.randint(0, 10, (1,)) > 3,
    "numpy": lambda: np.random.uniform(0, 1) > 0.3,
    "python": lambda: random.random() < 0.7,
    "two sources": lambda: random.uniform(0, 2) < 1.4 and np.random.rand() > 0.3,
}


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_blocks_that_are_left_out_at_random_are_planned(runs: Callable[[], Any]) -> None:
    module = stepwise(lambda net, h, block: h + block(h) if runs() else h)
    for seed in range(4):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1:3]
        structure = discover(module, X)
        assert (structure.depth, structure.unassigned) == (2, {})
        assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
        np.testing.assert_equal(np.random.get_state()[1:3], states[2])


def test_a_pretrained_model_of_speech_at_its_defaults() -> None:
    """Blocks are left out, and time steps masked, at random."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_conv_pos_embeddings": 4}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    config = HubertConfig(num_hidden_layers=4, **sizes, **convolutions)
    assert config.layerdrop > 0 and config.apply_spec_augment
    found = []
    for seed in range(2):
        torch.manual_seed(seed), np.random.seed(seed)
        module = HubertModel(config).train()
        module.feature_extractor._requires_grad = False
        structure = discover(module, {"input_values": torch.zeros(2, 800)})
        found.append((structure.depth, *structure.roles.items()))
    assert found[0][0] == 1 + 2 * 4, "positions by a convolution, and blocks"
    assert found[0] == found[1]


class Twice(LightningModule):
    """A network that is also run for something beside the loss."""

    def __init__(self, beside: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.beside = Net(), beside

    def training_step(self, x: Tensor) -> Tensor:
        self.beside(self.net, x)
        loss = self.net(x).square().mean()
        self.beside(self.net, x)
        return loss


def _without_gradient(net: Net, x: Tensor) -> Any:
    with torch.no_grad():
        return net(x)


@pytest.mark.parametrize(
    "beside", [lambda net, x: F.l1_loss(net(x), net(-x)), _without_gradient], ids=["metric", "no grad"]
)
def test_passes_beside_the_loss_change_nothing(beside: Callable[[Any, Tensor], Any]) -> None:
    module, once = Twice(beside), Twice(lambda net, x: None)
    plan, usual = (Plan.from_model(each, X, base=each) for each in (module, once))
    assert plan.multipliers == usual.multipliers and all(multiplier.site for multiplier in plan.multipliers)
