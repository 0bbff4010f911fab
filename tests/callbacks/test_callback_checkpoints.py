"""Checkpoints of runs with MLUCallback, and fits that go on from them or from a module that was fitted before."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import callback_runs as runs
from helpers.callback_runs import INPUTS, MODULES, WIDE, Net, fit, identical, loader, trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from mlu_lightning import MLUCallback, Plan, attach_multipliers, fold, initialize
from mlu_lightning.application import residual_state
from mlu_lightning.callbacks.saved_plans import wrap_saving


@pytest.mark.parametrize("residual", ["hook", "fold"])
@pytest.mark.parametrize("make", MODULES)
def test_resumed_run_is_the_uninterrupted_run(make: Any, residual: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[Net, Trainer]:
        module, callback = make(**WIDE), MLUCallback(Net(), residual=residual)
        return module, fit(module, callback, data=loader(False), epochs=epochs, ckpt_path=ckpt_path)

    def quiet(self: Net, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    monkeypatch.setattr(Net, "training_step", quiet)  # the Trainer does not restore random states
    whole, _ = run(2)
    _, half = run(1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(2, tmp_path / "half.ckpt")
    assert identical(resumed, whole) and resumed.losses == whole.losses[4:]


ONE = torch.ones(1, INPUTS)


def planned(module: Net) -> Plan:
    return Plan.from_model(module, next(iter(loader())), base=Net())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    trained: dict[str, Any] = {name: [MLUCallback(Net(), residual=name)] for name in ("hook", "fold")} | {"plain": []}
    for name, callbacks in trained.items():
        module = Net(**WIDE)
        fit(module, *callbacks).save_checkpoint(folder / f"{name}.ckpt")
        torch.save(module(ONE), folder / f"{name}.pt")
    return {name: folder / f"{name}.ckpt" for name in trained}


@pytest.mark.parametrize("residual", ["hook", "fold"])
def test_evaluation_of_a_checkpoint_has_its_multipliers(residual: Any, checkpoints: dict[str, Path]) -> None:
    module, run = Net(**WIDE), trainer(MLUCallback(Net(), residual=residual))
    for _ in range(2):
        outputs = run.predict(module, loader(False), ckpt_path=checkpoints[residual], weights_only=True)
    assert torch.equal(module(ONE), torch.load(checkpoints[residual].with_suffix(".pt"))) and outputs is not None
    expected = run.validate(module, loader(False), verbose=False)[0]["val_loss"]
    targets = loader(False).dataset.tensors[1]
    assert expected == pytest.approx(float(nn.functional.mse_loss(torch.cat(outputs), targets)), rel=1e-5)


def test_fit_after_evaluation_goes_on_from_the_checkpoint(checkpoints: dict[str, Path]) -> None:
    module = Net(**WIDE, optimizers=lambda module: None)
    run = trainer(MLUCallback(Net(), residual="hook"))
    run.validate(module, loader(False), ckpt_path=checkpoints["hook"], verbose=False)
    before = module(ONE)
    run.fit(module, loader())
    assert torch.equal(module(ONE), before)


def test_plain_checkpoint_is_warned_about_in_an_evaluation(checkpoints: dict[str, Path]) -> None:
    module, run = Net(**WIDE), trainer(MLUCallback(Net(), residual="hook"))
    attach_multipliers(module, planned(module))
    with pytest.warns(UserWarning, match="checkpoint is of a run without MLUCallback. Its weights were trained as"):
        run.validate(module, loader(), ckpt_path=checkpoints["plain"])


def test_checkpoint_of_another_plan_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"run with another plan .* base, overrides, alpha and tuned of that run"):
        fit(Net(**WIDE), MLUCallback(Net(depth=1), residual="hook"), ckpt_path=checkpoints["hook"])


@pytest.mark.filterwarnings("error:.*MLUCallback.*")
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_alone_does_nothing(stage: str, checkpoints: dict[str, Path]) -> None:
    module, plain = Net(**WIDE), Net(**WIDE)
    getattr(trainer(), stage)(plain, loader(False))
    getattr(trainer(MLUCallback(Net())), stage)(module, loader(False))
    assert identical(module, plain) and vars(module).keys() == vars(plain).keys()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    getattr(trainer(MLUCallback(Net())), stage)(module, loader(False), ckpt_path=checkpoints["plain"])
    assert residual_state(module) is None


@pytest.mark.parametrize("own", ["none", "of the class", "of the instance"])
def test_a_module_and_its_copies_save_their_own_plans(own: str) -> None:
    """Also with weights alone, of which Lightning tells only the module; its own method is still called."""

    class Saves(Net):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["shape"] = self.shape

    module = (Saves if own == "of the class" else Net)(**WIDE)
    if own == "of the instance":
        vars(module)["on_save_checkpoint"] = lambda checkpoint: checkpoint.update(shape=module.shape)
    handle = attach_multipliers(module, plan := planned(module))
    for _ in range(2):
        wrap_saving(module)
    copied = fold(copy.deepcopy(module), plan)
    handle.remove()
    for each, expected in ((copied, "fold"), (module, None)):
        checkpoint: dict[str, Any] = {}
        each.on_save_checkpoint(checkpoint)
        assert checkpoint.get("shape") == (None if own == "none" else module.shape)
        assert checkpoint.get("callbacks", {}).get("MLUCallback", {}).get("mode") == expected


def test_an_unpickled_module_saves_its_plan_when_it_is_fitted_again() -> None:
    module = Net(**WIDE)
    attach_multipliers(module, planned(module))
    wrap_saving(module)
    again = pickle.loads(pickle.dumps(module))
    wrap_saving(again)
    again.on_save_checkpoint(checkpoint := {})
    assert checkpoint["callbacks"]["MLUCallback"]["mode"] == "hook"


@pytest.mark.parametrize("residual", ["hook", "fold"])
@pytest.mark.parametrize("same", [True, False], ids=["same-callback", "new-callback"])
@pytest.mark.parametrize("make", MODULES)
def test_second_fit_goes_on_from_the_weights(make: type[Net], same: bool, residual: Any) -> None:
    module, callback = make(**WIDE), MLUCallback(Net(), residual=residual)
    fit(module, callback)
    output, weights = module(ONE), {n: p.detach().clone() for n, p in module.named_parameters()}

    class AtStart(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert torch.equal(pl_module(ONE), output)
            assert all(torch.equal(parameter, weights[name]) for name, parameter in pl_module.named_parameters())

    second = callback if same else MLUCallback(Net(), residual=residual)
    module.optimizers_of = probe = runs.WatchedOptimizers()
    fit(module, second, AtStart())
    assert second.plan == callback.plan
    lr, expected = probe.numbers[0], runs.factors(second.plan, "adamw", folded=residual == "fold")
    assert {name: numbers["lr"] / lr["embed.weight"]["lr"] for name, numbers in lr.items()} == pytest.approx(expected)


def test_second_fit_after_hooks_moved_into_the_weights_does_not_initialize_them() -> None:
    module, first, second = Net(**WIDE), MLUCallback(Net(), residual="hook"), MLUCallback(Net())
    fit(module, first)
    fit(fold(module, first.plan), second)
    assert (first.initialized, second.initialized) == (True, False)


@pytest.mark.parametrize(
    ("base", "residual", "message"),
    [
        ({"depth": 1}, "hook", r"multipliers of another plan than that of this MLUCallback"),
        ({}, "fold", r"in hooks already, but MLUCallback has residual='fold'.*residual='hook'"),
    ],
)
def test_second_fit_with_another_plan_or_residual_is_refused(base: Any, residual: Any, message: str) -> None:
    fit(module := Net(**WIDE), MLUCallback(Net(), residual="hook"))
    with pytest.raises(ValueError, match=message):
        fit(module, MLUCallback(Net(**base), residual=residual))


def test_multipliers_of_somebody_else_leave_the_initialization_open() -> None:
    module = Net(**WIDE)
    plan = planned(module)
    attach_multipliers(initialize(module, plan), plan)
    with pytest.raises(ValueError, match=r"not from an MLUCallback.* give init=None"):
        fit(module, MLUCallback(Net(), residual="hook"))
    fit(module, MLUCallback(Net(), init=None, residual="hook"))
    theirs = Net(**WIDE)
    fit(theirs, MLUCallback(Net(), residual="hook"))
    assert identical(module, theirs)
