"""MLUCallback in the Trainer: what it leaves alone, what it does, and when."""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.core.optimizer import _configure_optimizers
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset

from mlu_lightning.application.initialization import initialize
from mlu_lightning.application.multipliers import attach_multipliers, fold, residual_state
from mlu_lightning.callbacks import MLUCallback
from mlu_lightning.models import ResidualBlock
from mlu_lightning.planning.plan import Plan

INPUTS, OUTPUTS, SAMPLES, BATCH = 3, 2, 32, 8
BASE = {"depth": 2, "hidden": 8, "embedding": 4}
WIDE = {"depth": 4, "hidden": 32, "embedding": 16}
Optimizers = Callable[[nn.Module], Any]


def adamw(module: nn.Module) -> Any:
    optimizer = optim.AdamW(module.parameters(), lr=0.02, weight_decay=0.1)
    schedule = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=16)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Net(LightningModule):
    """A residual network whose training draws from torch, NumPy and Python."""

    def __init__(self, depth: int = 2, hidden: int = 8, embedding: int = 4, optimizers: Optimizers = adamw) -> None:
        super().__init__()
        self.shape = (depth, hidden, embedding)
        self.optimizers_of = optimizers
        self.losses: list[float] = []
        self.build()

    def build(self) -> None:
        depth, hidden, embedding = self.shape
        with isolate_rng():
            torch.manual_seed(7)
            self.embed = nn.Linear(INPUTS, embedding)
            self.blocks = nn.ModuleList(ResidualBlock(hidden, embedding, "tanh") for _ in range(depth))
            self.readout = nn.Linear(embedding, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embed(x)
        for block in self.blocks:
            stream = stream + block(stream)
        return self.readout(stream)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        noise = torch.rand(()) + np.random.rand() + random.random()
        loss = nn.functional.mse_loss(self(nn.functional.dropout(inputs, 0.2)), targets + 0.1 * noise)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.validation_step(batch)

    def predict_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return self.optimizers_of(self)


class InSetup(Net):
    def build(self) -> None: ...

    def setup(self, stage: str) -> None:
        if not hasattr(self, "embed"):
            assert self.trainer.max_epochs
            Net.build(self)


class InConfigureModel(Net):
    def build(self) -> None: ...

    def configure_model(self) -> None:
        if not hasattr(self, "embed"):
            Net.build(self)


class InConfigureModelAfterSetup(InConfigureModel):
    def setup(self, stage: str) -> None: ...


MODULES = [Net, InSetup, InConfigureModel, InConfigureModelAfterSetup]


def loader(shuffle: bool = True) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (
        torch.randn(SAMPLES, INPUTS, generator=generator),
        torch.randn(SAMPLES, OUTPUTS, generator=generator),
    )
    return DataLoader(TensorDataset(inputs, targets), BATCH, shuffle=shuffle)


def trainer(*callbacks: Callback, epochs: int = 2, **settings: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[*callbacks], **{**quiet, **settings})


def fit(module: Net, *callbacks: Callback, data: Any = None, ckpt_path: Any = None, **settings: Any) -> Trainer:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    run = trainer(*callbacks, **settings)
    run.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return run


def identical(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Probe:
    """Makes optimizers, and notes the numbers in their groups as the update sees them, by parameter."""

    def __init__(self, optimizers: Optimizers = adamw) -> None:
        self.optimizers = optimizers
        self.numbers: list[dict[str, dict[str, Any]]] = []

    def __call__(self, module: nn.Module) -> Any:
        names = {id(parameter): name for name, parameter in module.named_parameters()}

        def note(optimizer: optim.Optimizer, *_: Any) -> None:
            groups = optimizer.param_groups
            self.numbers.append({names[id(p)]: {**group} for group in groups for p in group["params"]})

        configured = self.optimizers(module)
        for optimizer in _configure_optimizers(configured)[0]:
            optimizer.register_step_post_hook(note)
        return configured


def factors(plan: Plan, family: str, folded: bool = False) -> dict[str, float]:
    scales = plan.scales(family)
    folds = {name: scale.folded(family) if folded else scale for name, scale in scales.items()}
    return {name: scale.lr for name, scale in folds.items()}


# The base shape: nothing changes


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return loader()


@pytest.mark.parametrize("residual", ["hook", "fold"])
@pytest.mark.parametrize("make", MODULES)
def test_run_at_the_base_shape_is_the_run_without_the_callback(make: type[Net], residual: Any) -> None:
    runs = []
    for callbacks in ([], [MLUCallback(Net(), residual=residual)]):
        module = make()
        generator = torch.Generator().manual_seed(5)
        shuffled = DataLoader(loader().dataset, BATCH, shuffle=True, generator=generator)
        fit(module, *callbacks, data=shuffled)
        states = (
            torch.get_rng_state(),
            generator.get_state(),
            torch.tensor(np.random.rand()),
            torch.tensor(random.random()),
        )
        runs.append((module, states))
    (ours, states), (theirs, others) = runs
    assert identical(ours, theirs)
    assert ours.losses == theirs.losses
    assert all(map(torch.equal, states, others))
    assert len(ours.losses) == 8


def test_run_at_the_base_shape_with_a_datamodule_and_a_saved_plan(tmp_path: Path) -> None:
    Plan.from_model(Net(**WIDE), next(iter(loader())), base=Net()).save(tmp_path / "plan.yaml")
    ours, theirs = Net(), Net()
    fit(ours, MLUCallback(str(tmp_path / "plan.yaml")), data=Data())
    fit(theirs, data=Data())
    assert identical(ours, theirs)
    assert ours.losses == theirs.losses


# Another shape: the functions of the package, in the right order


@pytest.mark.parametrize("residual", ["hook", "fold"])
@pytest.mark.parametrize("make", MODULES)
def test_run_is_that_of_the_functions_called_by_hand(make: type[Net], residual: Any) -> None:
    ours, theirs = make(**WIDE), Net(**WIDE)
    callback = MLUCallback(Net(), residual=residual, seed=4, init="normal")
    fit(ours, callback)

    plan = Plan.from_model(theirs, next(iter(loader())), base=Net())
    initialize(theirs, plan, "normal", seed=4)
    (attach_multipliers if residual == "hook" else fold)(theirs, plan)
    scales = plan.scales("adamw")
    state = residual_state(theirs)
    assert state is not None
    scales = {name: scale.folded("adamw") if name in state.folded else scale for name, scale in scales.items()}

    def by_hand(module: nn.Module) -> Any:
        groups = [
            {
                "params": [parameter],
                "eps": 1e-8 * scales[name].eps,
                "weight_decay": 0.1 * scales[name].weight_decay,
            }
            for name, parameter in module.named_parameters()
        ]
        optimizer = optim.AdamW(groups, lr=0.02)
        rates = [0.05 * scales[name].lr for name, _ in module.named_parameters()]
        schedule = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=16)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    theirs.optimizers_of = by_hand
    fit(theirs)
    assert callback.plan == plan
    assert not identical(ours, make(**WIDE) if make is Net else Net(**WIDE))
    for name, parameter in theirs.named_parameters():
        # the schedule interpolates between learning rates before or after they are multiplied
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("optimizers", "tolerance"),
    [
        (lambda module: optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01), 1e-12),
        (lambda module: optim.AdamW(module.parameters(), lr=0.01, eps=1e-4, weight_decay=0.1), 1e-10),
        (lambda module: optim.Adam(module.parameters(), lr=0.01, eps=1e-4, weight_decay=0.01), 1e-10),
    ],
    ids=["sgd-momentum", "adamw", "adam-l2"],
)
def test_hook_and_fold_are_the_same_run(optimizers: Optimizers, tolerance: float) -> None:
    """Effective weights after 20 steps, in float64."""
    effective = []
    for residual in ("hook", "fold"):
        module = Net(**WIDE, optimizers=optimizers).double()
        callback = MLUCallback(Net().double(), residual=residual)
        dataset = TensorDataset(*(tensor.double() for tensor in loader().dataset.tensors))
        fit(module, callback, data=DataLoader(dataset, BATCH, shuffle=True), epochs=5)
        assert callback.plan is not None
        multipliers = {name: scale.multiplier for name, scale in callback.plan.scales("sgd").items()}
        held = residual == "fold"
        effective.append({n: p.detach() * (1 if held else multipliers[n]) for n, p in module.named_parameters()})
        assert len(module.losses) == 20
        assert set(multipliers.values()) == {1.0, 0.5, 0.25}
    for name, weight in effective[0].items():
        torch.testing.assert_close(effective[1][name], weight, rtol=tolerance, atol=tolerance)  # float64 rounding


def test_weights_that_are_folded_already_take_the_numbers_of_fold() -> None:
    fresh, folded = Net(**WIDE), Net(**WIDE)
    plan = Plan.from_model(fresh, next(iter(loader())), base=Net())
    folded.load_state_dict(fold(initialize(Net(**WIDE), plan), plan).state_dict())
    fit(fresh, MLUCallback(plan=plan, residual="fold"))
    fit(fold(folded, plan, multiplied=True), MLUCallback(Net(), residual="fold", init=None))
    assert identical(fresh, folded)
    assert fresh.losses == folded.losses


def test_init_none_leaves_the_weights() -> None:
    module, before = Net(**WIDE, optimizers=lambda module: None), Net(**WIDE)
    fit(module, MLUCallback(Net(), init=None))
    assert identical(module, before)
    fit(module := Net(**WIDE, optimizers=lambda module: None), MLUCallback(Net()))
    assert not identical(module, before)


def test_frozen_parameters_are_planned_and_left_alone() -> None:
    module = Net(**WIDE)
    module.embed.requires_grad_(False)
    callback = MLUCallback(Net())
    fit(module, callback)
    assert callback.plan is not None
    assert callback.plan.roles["embed.weight"] == "embedding"
    start = initialize(Net(**WIDE), callback.plan)
    assert torch.equal(module.embed.weight, start.embed.weight)
    assert not torch.equal(module.readout.weight, start.readout.weight)


# Checkpoints


@pytest.mark.parametrize("residual", ["hook", "fold"])
@pytest.mark.parametrize("make", MODULES)
def test_resumed_run_is_the_uninterrupted_run(make: type[Net], residual: Any, tmp_path: Path) -> None:
    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[Net, Trainer]:
        module = make(**WIDE)
        return module, fit(
            module, MLUCallback(Net(), residual=residual), data=loader(False), epochs=epochs, ckpt_path=ckpt_path
        )

    def quiet(self: Net, batch: Any) -> Tensor:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Net, "training_step", quiet)  # the Trainer does not restore random states
        whole, _ = run(4)
        _, half = run(2)
        half.save_checkpoint(tmp_path / "half.ckpt")
        resumed, _ = run(4, tmp_path / "half.ckpt")
    assert identical(resumed, whole)
    assert resumed.losses == whole.losses[8:]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained modules: by MLUCallback in both ways, and without it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, callbacks in {
        "hook": [MLUCallback(Net())],
        "fold": [MLUCallback(Net(), residual="fold")],
        "plain": [],
    }.items():
        module = Net(**WIDE)
        run = fit(module, *callbacks)
        run.save_checkpoint(folder / f"{name}.ckpt")
        torch.save(module(torch.ones(1, INPUTS)), folder / f"{name}.pt")
    return {name: folder / f"{name}.ckpt" for name in ("hook", "fold", "plain")}


@pytest.mark.parametrize("residual", ["hook", "fold"])
def test_evaluation_of_a_checkpoint_has_its_multipliers(residual: Any, checkpoints: dict[str, Path]) -> None:
    trained = torch.load(checkpoints[residual].with_suffix(".pt"))
    module = Net(**WIDE)
    run = trainer(MLUCallback(Net(), residual=residual))
    for _ in range(2):
        outputs = run.predict(module, loader(False), ckpt_path=checkpoints[residual], weights_only=True)
    assert torch.equal(module(torch.ones(1, INPUTS)), trained)
    assert outputs is not None
    expected = run.validate(module, loader(False), verbose=False)[0]["val_loss"]
    targets = loader(False).dataset.tensors[1]
    assert expected == pytest.approx(float(nn.functional.mse_loss(torch.cat(outputs), targets)), rel=1e-5)


def test_fit_after_evaluation_goes_on_from_the_checkpoint(checkpoints: dict[str, Path]) -> None:
    module = Net(**WIDE, optimizers=lambda module: None)
    run = trainer(MLUCallback(Net()))
    run.validate(module, loader(False), ckpt_path=checkpoints["hook"], verbose=False)
    before = module(torch.ones(1, INPUTS))
    run.fit(module, loader())
    assert torch.equal(module(torch.ones(1, INPUTS)), before)


def test_folded_checkpoint_is_a_plain_module(checkpoints: dict[str, Path]) -> None:
    module = Net(**WIDE)
    module.load_state_dict(torch.load(checkpoints["fold"], weights_only=True)["state_dict"])
    torch.testing.assert_close(module(torch.ones(1, INPUTS)), torch.load(checkpoints["fold"].with_suffix(".pt")))


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_plain_checkpoint_is_warned_about(stage: str, checkpoints: dict[str, Path]) -> None:
    module = Net(**WIDE)
    callback = MLUCallback(Net())
    if stage == "validate":
        attach_multipliers(module, Plan.from_model(module, next(iter(loader())), base=Net()))
    run = trainer(callback, epochs=3)
    with pytest.warns(UserWarning, match="checkpoint is of a run without MLUCallback. Its weights were trained as"):
        getattr(run, stage)(module, loader(), ckpt_path=checkpoints["plain"])


def test_checkpoint_of_the_other_residual_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"multipliers in its weights, and .* in hooks, .* Give residual='fold'"):
        fit(Net(**WIDE), MLUCallback(Net()), ckpt_path=checkpoints["fold"])


def test_checkpoint_of_another_plan_is_refused(checkpoints: dict[str, Path]) -> None:
    callback = MLUCallback(Net(depth=1))
    with pytest.raises(ValueError, match=r"run with another plan .* base, overrides and alpha of that run"):
        fit(Net(**WIDE), callback, ckpt_path=checkpoints["hook"])


@pytest.mark.filterwarnings("error:.*MLUCallback.*")
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_alone_does_nothing(stage: str, checkpoints: dict[str, Path]) -> None:
    module, plain = Net(**WIDE), Net(**WIDE)
    getattr(trainer(), stage)(plain, loader(False))
    getattr(trainer(MLUCallback(Net())), stage)(module, loader(False))
    assert identical(module, plain)
    assert vars(module).keys() == vars(plain).keys()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    getattr(trainer(MLUCallback(Net())), stage)(module, loader(False), ckpt_path=checkpoints["plain"])
    assert residual_state(module) is None


# A second fit


@pytest.mark.parametrize("residual", ["hook", "fold"])
@pytest.mark.parametrize("same", [True, False], ids=["same-callback", "new-callback"])
@pytest.mark.parametrize("make", MODULES)
def test_second_fit_goes_on_from_the_weights(make: type[Net], same: bool, residual: Any) -> None:
    module = make(**WIDE)
    callback = MLUCallback(Net(), residual=residual)
    fit(module, callback)
    output, weights = module(torch.ones(1, INPUTS)), {n: p.detach().clone() for n, p in module.named_parameters()}

    class AtStart(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert torch.equal(pl_module(torch.ones(1, INPUTS)), output)
            assert all(torch.equal(parameter, weights[name]) for name, parameter in pl_module.named_parameters())

    second = callback if same else MLUCallback(Net(), residual=residual)
    module.optimizers_of = probe = Probe()
    fit(module, second, AtStart())
    assert second.plan == callback.plan
    lr, expected = probe.numbers[0], factors(second.plan, "adamw", folded=residual == "fold")
    assert {name: numbers["lr"] / lr["embed.weight"]["lr"] for name, numbers in lr.items()} == pytest.approx(expected)


def test_second_fit_with_another_plan_is_refused() -> None:
    module = Net(**WIDE)
    fit(module, MLUCallback(Net()))
    with pytest.raises(ValueError, match=r"multipliers of another plan than that of this MLUCallback"):
        fit(module, MLUCallback(Net(depth=1)))


def test_second_fit_with_another_residual_is_refused() -> None:
    module = Net(**WIDE)
    fit(module, MLUCallback(Net()))
    with pytest.raises(ValueError, match=r"in hooks already, but MLUCallback has residual='fold'.*residual='hook'"):
        fit(module, MLUCallback(Net(), residual="fold"))


def test_multipliers_of_somebody_else_leave_the_initialization_open() -> None:
    module = Net(**WIDE)
    plan = Plan.from_model(module, next(iter(loader())), base=Net())
    attach_multipliers(initialize(module, plan), plan)
    with pytest.raises(ValueError, match=r"not from an MLUCallback.* give init=None"):
        fit(module, MLUCallback(Net()))
    fit(module, MLUCallback(Net(), init=None))
    theirs = Net(**WIDE)
    fit(theirs, MLUCallback(Net()))
    assert identical(module, theirs)


# Optimizers


def two(module: Any) -> list[optim.Optimizer]:
    inner = [*module.blocks.parameters()]
    outer = [*module.embed.parameters(), *module.readout.parameters()]
    return [optim.SGD(inner, lr=0.1), optim.AdamW(outer, lr=0.2)]


def with_scheduler(module: nn.Module) -> tuple[list[Any], list[Any]]:
    optimizer = optim.AdamW(module.parameters(), lr=0.1)
    return [optimizer], [optim.lr_scheduler.StepLR(optimizer, 1)]


FORMS: dict[str, Optimizers] = {
    "single": lambda module: optim.AdamW(module.parameters(), lr=0.1),
    "list": lambda module: [optim.AdamW(module.parameters(), lr=0.1)],
    "tuple": lambda module: (optim.AdamW(module.parameters(), lr=0.1),),
    "two-lists": with_scheduler,
    "dictionary": lambda module: {"optimizer": optim.AdamW(module.parameters(), lr=0.1)},
    "dictionaries": lambda module: [{"optimizer": optim.AdamW(module.parameters(), lr=0.1)}],
}


@pytest.mark.parametrize("optimizers", FORMS.values(), ids=FORMS)
def test_every_form_that_configure_optimizers_may_return(optimizers: Optimizers) -> None:
    callback, probe = MLUCallback(Net()), Probe(optimizers)
    run = fit(Net(**WIDE, optimizers=probe), callback, epochs=1)
    expected = {name: 0.1 * factor for name, factor in factors(callback.plan, "adamw").items()}
    assert {name: numbers["lr"] for name, numbers in probe.numbers[0].items()} == expected
    assert len(probe.numbers[0]) == 12
    assert len(run.optimizers[0].param_groups) == 1


class Manual(Net):
    """Two optimizers, one step of each per batch."""

    def __init__(self, optimizers: Optimizers = two, **shape: int) -> None:
        super().__init__(**shape, optimizers=optimizers)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(nn.functional.mse_loss(self(batch[0]), batch[1]))
        first.step()
        second.step()


def test_two_optimizers_under_manual_optimization() -> None:
    callback, probe = MLUCallback(Manual()), Probe(two)
    fit(Manual(probe, **WIDE), callback)
    sgd, adamw = factors(callback.plan, "sgd"), factors(callback.plan, "adamw")
    inner, outer = probe.numbers[:2]
    assert {name: numbers["lr"] for name, numbers in inner.items()} == {name: 0.1 * sgd[name] for name in inner}
    assert {name: numbers["lr"] for name, numbers in outer.items()} == {name: 0.2 * adamw[name] for name in outer}
    assert inner.keys() | outer.keys() == sgd.keys()
    assert len(probe.numbers) == 16


def test_learning_rate_finder_keeps_the_factors(tmp_path: Path) -> None:
    found = []
    for callbacks in ([], [MLUCallback(Net())]):
        probe = Probe(lambda module: optim.AdamW(module.parameters(), lr=module.lr))
        module = Net(**WIDE, optimizers=probe)
        module.lr = 0.1
        run = trainer(*callbacks, default_root_dir=tmp_path)
        Tuner(run).lr_find(module, loader(), num_training=8, early_stop_threshold=None)
        found.append(probe.numbers)
    plain, scaled = found
    plan = callbacks[0].plan
    expected = factors(plan, "adamw")
    assert len(scaled) == 8
    for ours, theirs in zip(scaled, plain, strict=True):
        assert {name: group["lr"] for name, group in ours.items()} == {
            n: theirs[n]["lr"] * f for n, f in expected.items()
        }
    assert identical(module, initialize(Net(**WIDE), plan))
    assert "configure_optimizers" not in vars(module)
    run.fit(module, loader())
    assert probe.numbers[-1]["embed.weight"]["lr"] == module.lr


class Reciprocal(optim.SGD):
    """Not of torch.optim."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        return super().step(closure)


def test_unsupported_optimizer_is_refused() -> None:
    module = Net(**WIDE, optimizers=lambda module: Reciprocal(module.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"How Reciprocal uses its learning rate.* is not known"):
        fit(module, MLUCallback(Net()))
    assert "configure_optimizers" not in vars(module)
    callback, probe = MLUCallback(Net(), family="sgd"), Probe(module.optimizers_of)
    fit(Net(**WIDE, optimizers=probe), callback, epochs=1)
    expected = {name: 0.1 * factor for name, factor in factors(callback.plan, "sgd").items()}
    assert {name: numbers["lr"] for name, numbers in probe.numbers[0].items()} == expected


def test_afterwards_optimizers_are_plain_and_methods_the_modules_own() -> None:
    module = InConfigureModelAfterSetup(**WIDE)
    vars(module)["configure_optimizers"] = own = lambda: adamw(module)
    run = fit(module, MLUCallback(Net()))
    assert module.configure_optimizers is own
    assert not {"setup", "configure_model"} & set(vars(module))
    optimizer = run.optimizers[0]
    plain = optim.AdamW(Net(**WIDE).parameters())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for ours, theirs in zip(module.parameters(), plain.param_groups[0]["params"], strict=True):
        theirs.data.copy_(ours.data)
        ours.grad, theirs.grad = torch.ones_like(ours), torch.ones_like(ours)
    optimizer.step()
    plain.step()
    assert all(map(torch.equal, module.parameters(), plain.param_groups[0]["params"]))


class Breaks(Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        raise KeyError("in a callback")


def test_after_an_error_optimizers_are_plain_and_methods_the_modules_own() -> None:
    module = InSetup(**WIDE)
    optimizers: list[optim.Optimizer] = []
    own = module.optimizers_of
    module.optimizers_of = lambda module: optimizers.append(own(module)["optimizer"]) or optimizers[0]
    with pytest.raises(KeyError, match="in a callback"):
        fit(module, MLUCallback(Net()), Breaks())
    assert not {"setup", "configure_optimizers"} & set(vars(module))
    seen: list[int] = []
    optimizers[0].register_step_post_hook(lambda opt, *_: seen.append(len(opt.param_groups)))
    optimizers[0].step()
    assert seen == [1]


class Wraps(Callback):
    """Somebody else who wraps configure_optimizers, and may put back what was there."""

    def __init__(self, restores: bool) -> None:
        self.restores = restores

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.before = pl_module.configure_optimizers
        vars(pl_module)["configure_optimizers"] = self.after = lambda: self.before()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.restores:
            vars(pl_module)["configure_optimizers"] = self.before


@pytest.mark.parametrize("restores", [False, True])
def test_another_wrapper_of_configure_optimizers_is_left_alone(restores: bool) -> None:
    module, other = Net(**WIDE), Wraps(restores)
    fit(module, MLUCallback(Net()), other)
    seen: list[int] = []
    optimizer = module.configure_optimizers()["optimizer"]
    optimizer.register_step_post_hook(lambda opt, *_: seen.append(len(opt.param_groups)))
    optimizer.step()
    assert seen == [1]
    assert (module.configure_optimizers is other.after) is not restores


# Modules that get their values late


class Materializing(SingleDeviceStrategy):
    """Gives parameters their values when the strategy is set up, as sharded strategies do."""

    def model_to_device(self) -> None:
        module = self.lightning_module
        values = Net(*module.shape)
        module.to_empty(device="cpu")
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(values.get_parameter(name))


class OnMeta(InConfigureModel):
    def configure_model(self) -> None:
        with torch.device("meta"):
            super().configure_model()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])


@pytest.mark.parametrize("residual", ["hook", "fold"])
def test_module_on_meta_is_initialized_when_it_has_values(residual: Any) -> None:
    ours, theirs = OnMeta(**WIDE), Net(**WIDE, optimizers=lambda module: None)
    fit(ours, MLUCallback(Net(), residual=residual), strategy=Materializing("cpu"), epochs=0)
    fit(theirs, MLUCallback(Net(), residual=residual))
    assert residual_state(ours) == residual_state(theirs)
    assert identical(ours, theirs)
    fit(ours, MLUCallback(Net(), residual=residual))
    assert not identical(ours, theirs)


class OnOtherDevice(SingleDeviceStrategy):
    """Makes new tensors elsewhere by default while the module is built."""

    def tensor_init_context(self, empty_init: bool | None = None) -> Any:
        return torch.device("meta")


class OnCPU(InConfigureModel):
    def configure_model(self) -> None:
        with torch.device("cpu"):
            super().configure_model()


def test_default_device_of_the_build_is_not_that_of_the_plan() -> None:
    ours, theirs = OnCPU(**WIDE), Net(**WIDE)
    fit(ours, MLUCallback(Net(), init="normal"), strategy=OnOtherDevice("cpu"))
    fit(theirs, MLUCallback(Net(), init="normal"))
    assert identical(ours, theirs)


@pytest.mark.parametrize("function", [False, True], ids=["module", "function"])
@pytest.mark.parametrize("make", MODULES)
def test_base_that_is_built_late(make: type[Net], function: bool) -> None:
    ours, theirs = Net(**WIDE), Net(**WIDE)
    base = make()
    fit(ours, MLUCallback((lambda: base) if function else base))
    fit(theirs, MLUCallback(Net()))
    assert identical(ours, theirs)
    assert base._trainer is None


# Arguments, and what is wrong with them


def test_warnings_of_the_plan_are_given() -> None:
    plan = Plan.from_model(Net(**WIDE), next(iter(loader())), base=Net())
    with pytest.warns(UserWarning, match="heads have grown"):
        fit(Net(**WIDE), MLUCallback(plan=replace(plan, warnings=("heads have grown",))))


def test_processes_that_send_only_weights_back_are_warned_about() -> None:
    callback, module = MLUCallback(Net(), example=next(iter(loader()))), Net(**WIDE)
    run = trainer(callback, strategy="ddp_spawn", devices=1)
    with pytest.warns(UserWarning, match=r"only weights come back.* Go on from a checkpoint"):
        callback.setup(run, module, "fit")


def test_plan_from_a_file(tmp_path: Path) -> None:
    ours, theirs = Net(**WIDE), Net(**WIDE)
    plan = Plan.from_model(ours, next(iter(loader())), base=Net(), alpha=2.0)
    plan.save(tmp_path / "plan.yaml")
    fit(ours, MLUCallback(plan=str(tmp_path / "plan.yaml")))
    fit(theirs, MLUCallback(Net(), alpha=2.0))
    assert identical(ours, theirs)


def test_overrides_reach_the_plan() -> None:
    callback = MLUCallback(Net(), overrides={"blocks.*.read.weight": "branch_hidden"})
    fit(Net(**WIDE), callback)
    assert callback.plan is not None
    assert callback.plan.roles["blocks.3.read.weight"] == "branch_hidden"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "xavier"}, "init='xavier' is none of: rescale, normal, coupled, None"),
        ({"residual": "scale"}, "residual='scale' is none of: hook, fold"),
        ({"plan": "plan.yaml", "base": "base.yaml"}, "cannot be given together with base, overrides, alpha"),
        ({"plan": "plan.yaml", "overrides": {}}, "cannot be given together with base, overrides, alpha"),
        ({"plan": "plan.yaml", "alpha": 2.0}, "cannot be given together with base, overrides, alpha"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLUCallback(**arguments)


def test_second_callback_is_refused() -> None:
    class Other(MLUCallback): ...

    module = Net(**WIDE)
    run = trainer(MLUCallback(Net()), Other(Net()))
    with pytest.raises(ValueError, match=r"more than one MLUCallback.*Leave one of them"):
        run.fit(module, loader())
    assert identical(module, Net(**WIDE))


def test_plan_of_another_module_is_refused() -> None:
    plan = Plan.from_model(Net(**WIDE), next(iter(loader())), base=Net())
    module = Net()
    with pytest.raises(ValueError, match="The plan was not made for this Net"):
        fit(module, MLUCallback(plan=plan))
    assert identical(module, Net())


def test_trainer_of_the_other_package_is_refused() -> None:
    other = pytest.importorskip("pytorch_lightning")
    run = other.Trainer(accelerator="cpu", barebones=True, callbacks=[MLUCallback(Net())])
    with pytest.raises(TypeError, match=r"given to a pytorch_lightning.*Import Trainer .* from lightning\.pytorch"):
        run.callbacks[0].setup(run, Net(), "fit")
