"""What a probe reads in a model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.small_observations import SHAPE, locations_in, pairs
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mlu_lightning.discovery.discover import discover
from mlu_lightning.discovery.structure import Tap
from mlu_lightning.models import CausalTransformer, ResNet
from mlu_lightning.observation import locate, observe


def test_resnet_is_read_as_the_formula_says() -> None:
    model, batch = ResNet(**SHAPE | {"depth": 3}), pairs()
    h = [batch[0] @ model.embed.weight.T]
    for block in model.blocks:
        h.append(h[-1] + torch.tanh(h[-1] @ block.read.weight.T) @ block.write.weight.T)
    expected = {"s=0": h[0], "s=0.333333": h[1], "s=0.5": (h[1] + h[2]) / 2, "s=1": h[3]}
    found = observe(model, batch, locations_in(model, batch, [0, 1 / 3, 0.5, 1]))
    for name, values in (expected | {"output": h[3] @ model.readout.weight.T}).items():
        torch.testing.assert_close(found[name], values.detach())


def test_rows_are_evenly_spaced_over_samples_and_tokens() -> None:
    model = CausalTransformer(vocabulary=11, context=8, depth=1, embedding=6, heads=1, head_dim=4).eval()
    tokens = torch.randint(11, (5, 9))
    found = observe(model, tokens, locations_in(model, tokens, [0]), positions=7)
    rows = [round(i * 39 / 6) for i in range(7)]
    with torch.no_grad():
        assert found["s=0"].equal(model.tokens(tokens[:, :-1]).flatten(0, 1)[rows])
        torch.testing.assert_close(found["output"], model(tokens[:, :-1]).flatten(0, 1)[rows])


@pytest.mark.parametrize("own", [lambda y: y / 6**0.5, lambda y: (0.5 * (3.0 * y).T).T])
def test_outputs_have_the_constants_that_the_module_puts_on_them(own: Callable[[Tensor], Tensor]) -> None:
    class Constants(ResNet):
        def forward(self, x: Tensor) -> Tensor:
            return own(super().forward(x))

    model, batch = Constants(**SHAPE), pairs()
    torch.testing.assert_close(observe(model, batch, locations_in(model, batch))["output"], model(batch[0]).detach())


def test_compiled_module_is_read_and_its_code_is_not_used() -> None:
    model, batch = ResNet(**SHAPE), pairs()
    locations = locations_in(model, batch)
    eager = observe(model, batch, locations)

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        raise AssertionError("compiled")

    model.compile(backend=backend)
    torch.testing.assert_close(observe(model, batch, locations), eager, rtol=0, atol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_can_be_read(name: str) -> None:
    module, example = ARCHITECTURES[name].build(2, 2, 16), ARCHITECTURES[name].example
    found = observe(module, example, locations_in(module, example, [0, 0.25, 1]), positions=5)
    assert set(found) >= {"s=0", "s=0.25", "s=1"}
    assert all(values.shape[0] <= 5 and values.isfinite().all() for values in found.values())
    assert found["s=1"].shape[1] == discover(module, example).embedding


def test_location_that_is_not_passed_is_an_error() -> None:
    model = ResNet(**SHAPE)
    model.unused = nn.Identity()
    locations = locate([Tap("stream", 0, 0, "unused", "output", None, -1)], [1], [0])
    with pytest.raises(ValueError, match=r"'unused'.* was not called by training_step in evaluation mode"):
        observe(model, pairs(), locations)


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Linear(3, 8), nn.Linear(8, 4)
        self.one = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 8))
        self.two = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 4))
        self.head, self.helper = nn.Linear(4, 2), nn.Linear(4, 3)

    def last(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = h + self.one(h)
        h = self.down(h) + self.two(h)
        return h

    def forward(self, x: Tensor) -> Any:
        return self.head(self.last(x))


def test_between_two_stages_the_nearer_one_is_read() -> None:
    module, x = Stages(), torch.randn(5, 3)
    found = observe(module, x, locations_in(module, x, [0.5, 0.6, 0.75, 0.9, 1]))
    assert [values.shape[1] for name, values in found.items() if name != "output"] == [8, 8, 4, 4, 4]
    assert found["s=0.6"].equal(found["s=0.5"]) and found["s=0.9"].equal(found["s=1"])


def test_first_call_of_a_submodule_is_the_one_that_is_read() -> None:
    class Twice(Stages):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) + 0 * super().forward(-x)

    module, x = Twice(), torch.randn(5, 3)
    found = observe(module, x, locations_in(Stages(), x, [0]))
    assert found["s=0"].equal(module.stem(x).detach())


def test_readout_that_only_helps_in_training_is_left_out() -> None:
    class Helped(Stages):
        def forward(self, x: Tensor) -> Any:
            h = self.last(x)
            return (self.head(h), self.helper(h)) if self.training else (self.head(h),)

    module, x = Helped(), torch.randn(5, 3)
    locations = locations_in(module, x, [0])
    assert {location.name for location in locations} == {"s=0", "output", "output1"}
    assert set(observe(module, x, locations)) == {"s=0", "output"}


def test_padding_in_an_encoder_of_torch() -> None:
    """Its fused code for evaluation drops padded positions."""

    class Padded(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(9, 8), nn.Linear(8, 2)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

        def training_step(self, batch: Tensor) -> Any:
            h = self.encoder(self.tokens(batch), src_key_padding_mask=batch == 0)
            return self.head(h).square().mean()

    module, batch = Padded(), torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]])
    found = observe(module, batch, locations_in(module, batch, [0, 0.5, 1]))
    assert {values.shape[0] for values in found.values()} == {8} and torch.backends.mha.get_fastpath_enabled()
