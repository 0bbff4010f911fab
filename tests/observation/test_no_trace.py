"""A probe leaves no trace in the model that it is passed through."""

import copy
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_observations import SHAPE, locations_in, pairs
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from mlu_lightning.models import ResNet
from mlu_lightning.observation import observe
from mlu_lightning.utilities.state import ParametersChangedError, preserve_state


class Untidy(LightningModule):  # changes whatever a forward pass can change, and logs
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop, self.norm = nn.Linear(3, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)
        self.branch = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 8))
        self.readout = nn.Linear(8, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(8))
        self.average, self.total = MeanMetric(), torch.zeros(())
        self.losses: list[Tensor] = []
        self.by_name: dict[str, float] = {}
        self.count = 0

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        h = self.norm(self.drop(self.embed(x)))
        h = h + self.branch(h)
        loss = nn.functional.mse_loss(self.readout(h), y) + 0 * random.random() * float(np.random.rand())
        self.calls += 1
        self.seen = h.detach().mean(0)
        self.average.update(loss)
        self.total += loss.detach()
        self.losses.append(loss)
        self.by_name["loss"] = float(loss)
        self.count += 1
        self.new = loss
        self.log("loss", loss)
        self.logger.log_metrics({"loss": loss})  # type: ignore[union-attr]
        return loss


def state_of(module: nn.Module) -> list[Any]:
    found: list[Any] = []
    for submodule in module.modules():
        found.append((type(submodule), None))
        for name, value in sorted(vars(submodule).items()):
            if name in ("_parameters", "_buffers"):
                parts = {key: None if part is None else (id(part), part.clone()) for key, part in value.items()}
                found.append((name, parts))
            else:
                copied = (id(value), value.clone()) if isinstance(value, Tensor) else copy.copy(value)
                found.append((name, copied))
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.equal(other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one is other or one == other)


def test_nothing_is_disturbed() -> None:
    module = Untidy()
    module.branch.eval()  # somebody may have frozen a part
    batch = torch.randn(6, 3), torch.randn(6, 2)
    locations = locations_in(module, batch)
    module.average.update(3.0)

    def everything() -> list[Any]:
        numbers: Any = np.random.get_state()
        return [state_of(module), torch.get_rng_state(), numbers[1].tolist(), random.getstate()]

    before = everything()
    observe(module, batch, locations)
    assert same(before, everything()) and all(parameter.grad is None for parameter in module.parameters())
    # and the comparison would have seen it
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    module._trainer = None
    assert same(before[0][:1], state_of(module)[:1])


def test_dropout_is_off_and_sampled_noise_is_the_same_in_every_pass() -> None:
    class Noisy(ResNet):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return nn.functional.mse_loss(self(batch[0] + torch.randn_like(batch[0])), batch[1])

    model, batch = Noisy(**SHAPE), pairs()
    locations = locations_in(model, batch)
    first = observe(model, batch, locations)
    torch.manual_seed(123)
    assert same(first, observe(model, batch, locations))


class Manual(ResNet):
    def __init__(self, **shape: int) -> None:
        super().__init__(**shape)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.manual_backward(loss)
        assert optimizer.param_groups[0]["lr"] == 0.1
        with optimizer.toggle_model():
            optimizer.step()
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()
        return loss


def test_manual_optimization_makes_no_step() -> None:
    model, batch = Manual(**SHAPE), pairs()
    locations = locations_in(model, batch)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=1.0)
    nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
    stub: Any = SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=[])
    model._trainer = stub
    before = [(parameter.clone(), parameter.grad.clone()) for parameter in model.parameters()]  # type: ignore[union-attr]
    observe(model, batch, locations)
    assert same(before, [(parameter, parameter.grad) for parameter in model.parameters()])


class Careless(ResNet):  # changes statistics, the batch itself, and weights, if it may, where nobody counts it
    def __init__(self, changes_weights: bool) -> None:
        super().__init__(**SHAPE)
        self.changes_weights, self.teacher = changes_weights, nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(4))
        self.generator, self.dice, self.numbers = torch.Generator(), random.Random(0), np.random.default_rng(0)
        self.outputs: dict[str, list[Any]] = {"training": [[torch.zeros(2)]]}

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        x, y = batch.pop("x"), batch["y"].mul_(2)
        if self.changes_weights:
            self.teacher.weight.data.mul_(0.9)
            self.readout.weight.data.clamp_(-0.01, 0.01)
        self.norm.train()
        x = self.norm(x) + torch.rand(4, generator=self.generator) + self.dice.random() + float(self.numbers.random())
        self.seen.data.add_(1)
        self.outputs["training"][0][0] += 1
        self.outputs["training"].append([1])
        return nn.functional.mse_loss(self(x), y)


class Frozen(dict[str, Any]):
    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("this cannot be changed")

    clear = __setitem__ = update  # type: ignore[assignment]


@pytest.mark.parametrize("changes_weights", [False, True])
def test_what_nobody_counts_is_not_disturbed_either(changes_weights: bool) -> None:
    module, batch = Careless(changes_weights), {"x": torch.randn(6, 4), "y": torch.randn(6, 2)}
    given = {name: value.clone() for name, value in batch.items()}
    locations = locations_in(module, batch)
    module.frozen = Frozen(a=1)

    def state() -> Any:
        values = {name: value.clone() for name, value in module.state_dict().items()}
        drawn = module.generator.get_state(), module.dice.getstate(), str(module.numbers.bit_generator.state)
        return [values, *drawn, copy.deepcopy(module.outputs), module.norm.training]

    before = state()
    passes = [observe(module, batch, locations, restore_parameters=changes_weights) for _ in range(2)]
    assert same(before, state()) and same(given, batch) and same(*passes)
    module.training_step(batch)
    assert not any(same(one, other) for one, other in zip(before[:5], state()[:5], strict=True))


def test_step_that_changes_parameters_is_an_error() -> None:
    batch = {"x": torch.randn(6, 4), "y": torch.randn(6, 2)}
    message = (
        r"Careless changes its parameters readout.weight, teacher.weight in a forward .*in a hook, .*validation_st"
    )
    with pytest.raises(ParametersChangedError, match=message):
        observe(Careless(changes_weights=True), batch, ())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64])
def test_changed_entry_is_found_in_every_dtype(dtype: torch.dtype) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(50, 60).to(dtype).T)
    with preserve_state(module), torch.no_grad():
        module.weight.mul_(1)  # nothing changes
    with pytest.raises(ParametersChangedError, match="weight"), preserve_state(module):
        module.weight.data[3, 4:6] *= -1


def test_parameters_in_attributes_are_not_copied() -> None:
    module = nn.LSTM(2, 3)  # which keeps a list of them
    with pytest.raises(ParametersChangedError, match="weight_ih_l0"), preserve_state(module):
        module.weight_ih_l0.data.add_(1)
    assert module._flat_weights[0] is module.weight_ih_l0


def test_tensors_of_an_inference_are_no_obstacle() -> None:
    model, batch = ResNet(**SHAPE), pairs()
    locations = locations_in(model, batch)
    with torch.inference_mode():
        model.cache = torch.ones(3)
        model.register_buffer("table", torch.ones(3))
    observe(model, batch, locations)


def test_no_gradient_is_computed() -> None:
    class Watching(ResNet):
        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled() or torch.compiler.is_compiling() or self.rehearsed
            assert not self.training or self.rehearsed
            return super().forward(x)

        rehearsed = True

    model, batch = Watching(**SHAPE), pairs()
    locations = locations_in(model, batch)
    Watching.rehearsed = False
    observe(model, batch, locations)
