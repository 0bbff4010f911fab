"""Looking at a model while it trains: what is read, and that nothing is disturbed."""

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.architectures import ARCHITECTURES
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from mlu_lightning.discovery.discover import discover
from mlu_lightning.discovery.structure import Tap
from mlu_lightning.models import CausalTransformer, ResNet
from mlu_lightning.observation.probe import first_samples, locate, observe


def stream_taps(depth: int, number: int = 0) -> list[Tap]:
    return [Tap("stream", number, position, f"block{position}", "input", 0, -1) for position in range(depth + 1)]


@pytest.mark.parametrize(
    ("depth", "s", "expected"),
    [
        (4, 0.0, {0: 1.0}),
        (4, 0.25, {1: 1.0}),
        (4, 1.0, {4: 1.0}),
        (2, 0.25, {0: 0.5, 1: 0.5}),
        (3, 0.25, {0: 0.25, 1: 0.75}),
        (1, 0.75, {0: 0.25, 1: 0.75}),
    ],
)
def test_relative_depth_lies_between_two_positions(depth: int, s: float, expected: dict[int, float]) -> None:
    (location,) = locate(stream_taps(depth), [depth], [s])
    assert location.name == f"s={s:g}"
    assert {taps[0].position: weight for weight, taps in location.parts} == pytest.approx(expected)


def test_streams_and_readouts_have_names() -> None:
    taps = [*stream_taps(2), *stream_taps(4, 1)]
    taps += [Tap("readout", number, 0, f"head{number}", "output", None, -1) for number in range(2)]
    names = [location.name for location in locate(taps, [2, 4], [0, 1])]
    assert names == ["s=0", "s=1", "stream1/s=0", "stream1/s=1", "output", "output1"]


def test_position_that_cannot_be_read_is_refused_with_a_remedy() -> None:
    taps = [tap for tap in stream_taps(4) if tap.position != 2]
    assert len(locate(taps, [4], [0, 0.25, 1])) == 3
    with pytest.raises(ValueError, match=r"after 2 of its 4 additions cannot be read.*nn.Identity.*other than 0.5"):
        locate(taps, [4], [0, 0.5])


def test_depth_outside_of_the_stream_is_refused() -> None:
    with pytest.raises(ValueError, match=r"between 0 \(the embedding\) and 1 .* 1.5 does not"):
        locate(stream_taps(2), [2], [1.5])


def test_resnet_is_read_as_the_formula_says() -> None:
    model = ResNet(depth=3, hidden=7, embedding=6, inputs=4, outputs=2)
    x = torch.randn(10, 4)
    h = [x @ model.embed.weight.T]
    for block in model.blocks:
        assert isinstance(block.read, nn.Linear)
        assert isinstance(block.write, nn.Linear)
        h.append(h[-1] + torch.tanh(h[-1] @ block.read.weight.T) @ block.write.weight.T)
    structure = discover(model, (x, torch.zeros(10, 2)))
    locations = locate(structure.taps, [3], [0, 1 / 3, 0.5, 1])
    found = observe(model, (x, torch.zeros(10, 2)), locations)
    for name, expected in {
        "s=0": h[0],
        "s=0.333333": h[1],
        "s=0.5": (h[1] + h[2]) / 2,
        "s=1": h[3],
        "output": h[3] @ model.readout.weight.T,
    }.items():
        torch.testing.assert_close(found[name], expected.detach())


def test_rows_are_evenly_spaced_over_samples_and_tokens() -> None:
    model = CausalTransformer(vocabulary=11, context=8, depth=1, embedding=6, heads=1, head_dim=4).eval()
    tokens = torch.randint(11, (5, 9))
    structure = discover(model, tokens)
    found = observe(model, tokens, locate(structure.taps, [2], [0]), positions=7)
    rows = [round(i * 39 / 6) for i in range(7)]
    with torch.no_grad():
        assert found["s=0"].equal(model.tokens(tokens[:, :-1]).flatten(0, 1)[rows])
        torch.testing.assert_close(found["output"], model(tokens[:, :-1]).flatten(0, 1)[rows])


class Untidy(LightningModule):
    """Changes whatever a forward pass can change, and logs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(8)
        self.branch = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 8))
        self.readout = nn.Linear(8, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(8))
        self.average = MeanMetric()
        self.total = torch.zeros(())
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
        found.append(type(submodule))
        for name, value in sorted(vars(submodule).items()):
            if name in ("_parameters", "_buffers"):
                found.append({key: None if part is None else (id(part), part.clone()) for key, part in value.items()})
            elif isinstance(value, Tensor):
                found.append((name, id(value), value.clone()))
            else:
                found.append((name, copy.copy(value)))
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
    locations = locate(discover(module, batch).taps, [1], [0, 1])
    module.average.update(3.0)
    before = state_of(module)
    randoms = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    observe(module, batch, locations)
    assert same(before, state_of(module))
    assert torch.get_rng_state().equal(randoms[0])
    assert np.array_equal(np.random.get_state()[1], randoms[1])  # type: ignore[index]
    assert random.getstate() == randoms[2]
    assert all(parameter.grad is None for parameter in module.parameters())
    # and the comparison would have seen it
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    module._trainer = None
    assert same(before[:1], state_of(module)[:1])


def test_everything_would_be_disturbed_by_the_step_itself() -> None:
    module = Untidy()
    module.__class__ = type("Silent", (Untidy,), {"log": lambda *a, **k: None, "logger": LoggerStub()})
    before = state_of(module)
    module.training_step((torch.randn(6, 3), torch.randn(6, 2)))
    assert not same(before, state_of(module))
    for name in ("total", "losses", "by_name", "count"):
        old = next(entry for entry in before if isinstance(entry, tuple) and entry[0] == name)
        new = next(entry for entry in state_of(module) if isinstance(entry, tuple) and entry[0] == name)
        assert not same(old, new), name


class LoggerStub:
    def log_metrics(self, metrics: dict[str, Any]) -> None: ...


def test_dropout_is_off_and_sampled_noise_is_the_same_in_every_pass() -> None:
    class Noisy(ResNet):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            x, y = batch
            return nn.functional.mse_loss(self(x + torch.randn_like(x)), y)

    model = Noisy(depth=2, hidden=7, embedding=6, inputs=4, outputs=2)
    batch = torch.randn(5, 4), torch.randn(5, 2)
    locations = locate(discover(model, batch).taps, [2], [0, 1])
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
    class StubTrainer:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizers = [optimizer]
            self.lr_scheduler_configs: list[Any] = []

    model = Manual(depth=2, hidden=7, embedding=6, inputs=4, outputs=2)
    batch = torch.randn(5, 4), torch.randn(5, 2)
    locations = locate(discover(model, batch).taps, [2], [1])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=1.0)
    nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
    model._trainer = StubTrainer(optimizer)  # type: ignore[assignment]
    before = [
        (parameter.clone(), parameter.grad.clone()) for parameter in model.parameters() if parameter.grad is not None
    ]
    observe(model, batch, locations)
    after = [(parameter, parameter.grad) for parameter in model.parameters()]
    assert same(before, after)


def test_compiled_module_is_read_and_its_code_is_not_used() -> None:
    model = ResNet(depth=2, hidden=7, embedding=6, inputs=4, outputs=2)
    batch = torch.randn(5, 4), torch.randn(5, 2)
    locations = locate(discover(model, batch).taps, [2], [0, 1])
    eager = observe(model, batch, locations)

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        raise AssertionError("compiled")

    model.compile(backend=backend)
    assert same(eager, observe(model, batch, locations))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_can_be_read(name: str) -> None:
    architecture = ARCHITECTURES[name]
    module = architecture.build(2, 2, 16)
    structure = discover(module, architecture.example)
    locations = locate(structure.taps, [stream.depth for stream in structure.streams], [0, 0.25, 1])
    found = observe(module, architecture.example, locations, positions=5)
    assert set(found) >= {"s=0", "s=0.25", "s=1"}
    for values in found.values():
        assert values.shape[0] <= 5
        assert values.isfinite().all()
    assert found["s=1"].shape[1] == structure.embedding


def test_location_that_is_not_passed_is_an_error() -> None:
    model = ResNet(depth=1, hidden=7, embedding=6, inputs=4, outputs=2)
    model.unused = nn.Identity()
    locations = locate([Tap("stream", 0, 0, "unused", "output", None, -1)], [1], [0])
    with pytest.raises(ValueError, match=r"'unused'.* was not called by training_step in evaluation mode"):
        observe(model, (torch.randn(5, 4), torch.randn(5, 2)), locations)


def test_only_first_samples_of_a_larger_probe_are_kept() -> None:
    batch = {"x": torch.arange(8).reshape(4, 2), "label": torch.arange(4), "name": "words"}
    cut = first_samples(batch, 3)
    assert cut["x"].equal(batch["x"][:3]) and cut["label"].equal(batch["label"][:3]) and cut["name"] == "words"  # type: ignore[index]
    assert first_samples(batch, 4) is batch
    uneven = torch.ones(4), torch.ones(3)
    assert first_samples(uneven, 2) is uneven


class Careless(ResNet):
    """Changes weights, statistics and the batch itself where nobody counts it."""

    def __init__(self) -> None:
        super().__init__(depth=2, hidden=7, embedding=6, inputs=4, outputs=2)
        self.teacher = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(4))
        self.generator = torch.Generator()
        self.dice = random.Random(0)
        self.numbers = np.random.default_rng(0)
        self.outputs: dict[str, list[Any]] = {"training": [[torch.zeros(2)]]}

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        x, y = batch.pop("x"), batch["y"].mul_(2)
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


def test_what_nobody_counts_is_not_disturbed_either() -> None:
    module = Careless()
    batch = {"x": torch.randn(6, 4), "y": torch.randn(6, 2)}
    given = {name: value.clone() for name, value in batch.items()}
    locations = locate(discover(module, batch).taps, [2], [0, 1])
    module.frozen = Frozen(a=1)

    def state() -> Any:
        return [
            {name: value.clone() for name, value in module.state_dict().items()},
            module.generator.get_state(),
            module.dice.getstate(),
            str(module.numbers.bit_generator.state),
            copy.deepcopy(module.outputs),
            module.norm.training,
        ]

    before = state()
    passes = [observe(module, batch, locations) for _ in range(2)]
    assert same(before, state())
    assert same(given, batch)
    assert same(*passes)
    module.training_step(batch)
    assert not any(same(one, other) for one, other in zip(before[:5], state()[:5], strict=True))


def test_tensors_of_an_inference_are_no_obstacle() -> None:
    model = ResNet(depth=1, hidden=7, embedding=6, inputs=4, outputs=2)
    batch = torch.randn(5, 4), torch.randn(5, 2)
    locations = locate(discover(model, batch).taps, [1], [0, 1])
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

    model = Watching(depth=1, hidden=7, embedding=6, inputs=4, outputs=2)
    batch = torch.randn(5, 4), torch.randn(5, 2)
    locations = locate(discover(model, batch).taps, [1], [0, 1])
    Watching.rehearsed = False
    observe(model, batch, locations)


@pytest.mark.parametrize(("depth", "s", "position"), [(10, 0.7, 7), (10, 0.3, 3), (7, 1 / 7, 1)])
def test_relative_depth_of_a_whole_position_is_that_position(depth: int, s: float, position: int) -> None:
    (location,) = locate(stream_taps(depth), [depth], [s])
    assert [taps[0].position for _, taps in location.parts] == [position]


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Linear(3, 8), nn.Linear(8, 4)
        self.one = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 8))
        self.two = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = h + self.one(h)
        h = self.down(h) + self.two(h)
        output: Tensor = self.head(h)
        return output


def test_between_two_stages_the_nearer_one_is_read() -> None:
    module, x = Stages(), torch.randn(5, 3)
    taps = discover(module, x).taps
    found = observe(module, x, locate(taps, [2], [0.5, 0.6, 0.75, 0.9, 1]))
    assert [values.shape[1] for name, values in found.items() if name != "output"] == [8, 8, 4, 4, 4]
    assert found["s=0.6"].equal(found["s=0.5"]) and found["s=0.9"].equal(found["s=1"])


def test_first_call_of_a_submodule_is_the_one_that_is_read() -> None:
    class Twice(Stages):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * super().forward(-x)

    module, x = Twice(), torch.randn(5, 3)
    found = observe(module, x, locate(discover(Stages(), x).taps, [2], [0]))
    assert found["s=0"].equal(module.stem(x).detach())


def test_readout_that_only_helps_in_training_is_left_out() -> None:
    class Helped(Stages):
        def __init__(self) -> None:
            super().__init__()
            self.helper = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            h = self.stem(x)
            h = h + self.one(h)
            h = self.down(h) + self.two(h)
            return (self.head(h), self.helper(h)) if self.training else (self.head(h),)

    module, x = Helped(), torch.randn(5, 3)
    locations = locate(discover(module, x).taps, [2], [0])
    assert {location.name for location in locations} == {"s=0", "output", "output1"}
    assert set(observe(module, x, locations)) == {"s=0", "output"}


def test_padding_in_an_encoder_of_torch() -> None:
    """Its fused code for evaluation drops padded positions."""

    class Padded(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(9, 8), nn.Linear(8, 2)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def training_step(self, batch: Tensor) -> Tensor:
            h = self.encoder(self.tokens(batch), src_key_padding_mask=batch == 0)
            logits: Tensor = self.head(h)
            return logits.square().mean()

    module = Padded()
    batch = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]])
    taps = discover(module, batch).taps
    found = observe(module, batch, locate(taps, [4], [0, 0.5, 1]))
    assert {values.shape[0] for values in found.values()} == {8}
    assert torch.backends.mha.get_fastpath_enabled()
