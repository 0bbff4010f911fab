"""Optimizers of a module that MLUCallback trains: every form that they come in, and what is left of it afterwards."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import callback_runs as runs
from helpers.callback_runs import WIDE, Net, Optimizers, WatchedOptimizers, factors, fit, identical, loader, trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn, optim

from mlu_lightning import MLUCallback, fold, initialize


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


def rates(numbers: dict[str, dict[str, Any]]) -> dict[str, float]:
    return {name: group["lr"] for name, group in numbers.items()}


@pytest.mark.parametrize("optimizers", FORMS.values(), ids=FORMS)
def test_every_form_that_configure_optimizers_may_return(optimizers: Optimizers) -> None:
    callback, probe = MLUCallback(Net()), WatchedOptimizers(optimizers)
    run = fit(Net(**WIDE, optimizers=probe), callback, epochs=1)
    assert rates(probe.numbers[0]) == {name: 0.1 * factor for name, factor in factors(callback.plan, "adamw").items()}
    assert len(probe.numbers[0]) == 12 and len(run.optimizers[0].param_groups) == 1


class Manual(Net):  # two optimizers, one step of each per batch
    def __init__(self, optimizers: Optimizers = two, **shape: int) -> None:
        super().__init__(**shape, optimizers=optimizers)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss := nn.functional.mse_loss(self(batch[0]), batch[1]))
        first.step()
        second.step()
        return loss


def test_two_optimizers_under_manual_optimization() -> None:
    callback, probe = MLUCallback(Manual()), WatchedOptimizers(two)
    fit(Manual(probe, **WIDE), callback)
    sgd, adamw = factors(callback.plan, "sgd"), factors(callback.plan, "adamw")
    inner, outer = probe.numbers[:2]
    assert rates(inner) == {name: 0.1 * sgd[name] for name in inner}
    assert rates(outer) == {name: 0.2 * adamw[name] for name in outer}
    assert inner.keys() | outer.keys() == sgd.keys() and len(probe.numbers) == 16


def test_learning_rate_finder_keeps_the_factors(tmp_path: Path) -> None:
    found = []
    for callbacks in ([], [MLUCallback(Net())]):
        probe = WatchedOptimizers(lambda module: optim.AdamW(module.parameters(), lr=module.lr))
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
    assert identical(module, fold(initialize(Net(**WIDE), plan), plan))
    assert "configure_optimizers" not in vars(module)
    run.fit(module, loader())
    assert probe.numbers[-1]["embed.weight"]["lr"] == module.lr


class Reciprocal(optim.SGD):  # not of torch.optim
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        return super().step(closure)


def test_unsupported_optimizer_is_refused() -> None:
    module = Net(**WIDE, optimizers=lambda module: Reciprocal(module.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"How Reciprocal uses .* is not known: .* with family=\.\.\. of MLUCallback"):
        fit(module, MLUCallback(Net()))
    assert "configure_optimizers" not in vars(module)
    callback, probe = MLUCallback(Net(), family="sgd"), WatchedOptimizers(module.optimizers_of)
    fit(Net(**WIDE, optimizers=probe), callback, epochs=1)
    expected = {name: 0.1 * factor for name, factor in factors(callback.plan, "sgd").items()}
    assert rates(probe.numbers[0]) == expected


def test_afterwards_optimizers_are_plain_and_methods_the_modules_own() -> None:
    module = runs.InConfigureModelAfterSetup(**WIDE)
    vars(module)["configure_optimizers"] = own = lambda: runs.adamw(module)
    run = fit(module, MLUCallback(Net()))
    assert module.configure_optimizers is own and not {"setup", "configure_model"} & set(vars(module))
    optimizer = run.optimizers[0]
    plain = optim.AdamW(Net(**WIDE).parameters())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for ours, theirs in zip(module.parameters(), plain.param_groups[0]["params"], strict=True):
        theirs.data.copy_(ours.data)
        ours.grad, theirs.grad = torch.ones_like(ours), torch.ones_like(ours)
    optimizer.step()
    plain.step()
    assert all(map(torch.equal, module.parameters(), plain.param_groups[0]["params"]))


class Wraps(Callback):  # somebody else who wraps configure_optimizers, and may put back what was there
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
    assert seen == [1] and (module.configure_optimizers is other.after) is not restores
