"""Everything that goes wrong during a fit: what is left is the user's own, with the multipliers in it exactly once."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from test_mlu_callback import BASE, INPUTS, WIDE, Net, fit, loader, trainer
from torch import Tensor, nn, optim

from mlu_lightning.application.multipliers import attach_multipliers, residual_state
from mlu_lightning.application.optimization import scale_optimizer
from mlu_lightning.callbacks import EmbeddingDistance, FeatureUpdate, MLUCallback, ReferenceRecorder
from mlu_lightning.observation.reference import Reference
from mlu_lightning.planning.plan import Plan

LR, DECAY = 0.02, 0.1
BRANCH, READOUT = BASE["depth"] / WIDE["depth"], BASE["embedding"] / WIDE["embedding"]


def sgd(module: nn.Module) -> Any:
    optimizer = optim.SGD(module.parameters(), lr=LR, momentum=0.9, weight_decay=DECAY)
    schedule = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Broken(Net):
    """Keeps its optimizers, so that they can be looked at afterwards."""

    def __init__(self, **shape: int) -> None:
        super().__init__(**shape, optimizers=self.keep)
        self.made: list[optim.Optimizer] = []

    def keep(self, module: nn.Module) -> Any:
        configured = sgd(module)
        self.made.append(configured["optimizer"])
        return configured

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])


class At(Callback):
    """Does something in a hook, when so many steps were made."""

    def __init__(self, hook: str, do: Callable[[Trainer, Any], Any], step: int = 3) -> None:
        def act(run: Trainer, module: LightningModule, *args: Any, **kwargs: Any) -> None:
            if run.global_step >= step and not self.done:
                self.done = True
                do(run, module)

        self.done = False
        setattr(self, hook, act)


class Fault(Exception):
    pass


def fail(*args: Any, **kwargs: Any) -> Any:
    raise Fault("on purpose")


def patched(name: str) -> Callable[[Path], list[Callback]]:
    """A method of the module that fails from step 3 on."""
    return lambda folder: [At("on_train_batch_start", lambda run, module: vars(module).update({name: fail}))]


def in_hook(name: str, do: Callable[[Trainer, Any], Any] = fail, step: int = 3) -> Callable[[Path], list[Callback]]:
    return lambda folder: [At(name, do, step)]


def recorder_that(fails: str) -> Callable[[Path], list[Callback]]:
    """A recorder whose writer, or whose pass of the probe, fails after step 3."""

    def callbacks(folder: Path) -> list[Callback]:
        recorder = ReferenceRecorder(folder / "run.safetensors", probe=next(iter(loader(False))), steps=1)

        def spoil(run: Trainer, module: Net) -> None:
            if fails == "writer":
                assert recorder._writer is not None
                vars(recorder._writer)["write"] = fail
            else:
                module.blocks[1].register_forward_hook(lambda part, *_: None if part.training else fail())

        return [recorder, At("on_train_batch_start", spoil)]

    return callbacks


def raises(error: type[BaseException]) -> Callable[..., Any]:
    def do(*args: Any) -> None:
        raise error

    return do


def with_optimizer(do: Callable[[Net, optim.Optimizer], Any]) -> Callable[[Path], list[Callback]]:
    """Something that is done to the module's optimizer before step 4."""
    return in_hook("on_train_batch_start", lambda run, module: do(module, module.made[-1]))


def exchange_readout(module: Net, optimizer: optim.Optimizer) -> None:
    module.readout = nn.Linear(WIDE["embedding"], 2)
    optimizer.add_param_group({"params": module.readout.parameters()})


class FailsTwice(Callback):
    """Fails, and once more when it hears of that."""

    on_train_batch_end = fail
    on_exception = fail


@dataclass(frozen=True)
class Case:
    """A fault.

    Args:
        callbacks: that make it happen, before and after MLUCallback.
        error: that comes out of fit.
        message: of the error.
        residuals: where it can be found.
    """

    callbacks: Callable[[Path], list[Callback]]
    error: type[BaseException] = Fault
    message: str = "on purpose"
    residuals: tuple[str, ...] = ("hook", "fold")


REPLACED = r"put in the place of another since.*scale_optimizer\(optimizer, module, callback\.plan\)"
FOREIGN = r"in group 1 of the optimizer is not a parameter of the module that the plan was made for"
CASES: dict[str, Case] = {
    "training_step": Case(patched("training_step")),
    "forward": Case(patched("forward")),
    "configure_optimizers": Case(in_hook("setup", lambda _, module: vars(module).update(optimizers_of=fail), 0)),
    "lr_scheduler_step": Case(patched("lr_scheduler_step")),
    "optimizer_step": Case(patched("optimizer_step")),
    "backward": Case(in_hook("on_train_batch_start", lambda _, module: module.readout.weight.register_hook(fail))),
    "update begins": Case(with_optimizer(lambda _, optimizer: optimizer.register_step_pre_hook(fail))),
    "update ends": Case(with_optimizer(lambda _, optimizer: optimizer.register_step_post_hook(fail))),
    "forward hook": Case(in_hook("on_train_batch_start", lambda _, module: module.readout.register_forward_hook(fail))),
    "input hook": Case(
        in_hook("on_train_batch_start", lambda _, module: module.blocks[0].register_forward_pre_hook(fail))
    ),
    **{
        name: Case(in_hook(name, step=0 if name in ("setup", "on_fit_start", "on_train_start") else 3))
        for name in (
            "setup",
            "on_fit_start",
            "on_train_start",
            "on_train_batch_start",
            "on_before_backward",
            "on_after_backward",
            "on_before_optimizer_step",
            "on_before_zero_grad",
            "on_train_batch_end",
            "on_train_epoch_end",
            "on_train_end",
            "teardown",
        )
    },
    "two at once": Case(lambda folder: [FailsTwice()]),
    "writer of the recorder": Case(recorder_that("writer")),
    "probe of the recorder": Case(recorder_that("probe")),
    "keyboard": Case(in_hook("on_after_backward", raises(KeyboardInterrupt)), SystemExit, "1"),
    "exit": Case(in_hook("on_after_backward", raises(SystemExit)), SystemExit, ""),
    "memory": Case(in_hook("on_after_backward", raises(MemoryError)), MemoryError, ""),
    "another optimizer": Case(
        in_hook("on_train_batch_start", lambda run, module: setattr(run, "optimizers", [sgd(module)["optimizer"]])),
        ValueError,
        REPLACED,
    ),
    "copied optimizer": Case(
        in_hook(
            "on_train_batch_end", lambda run, _: setattr(run.strategy, "optimizers", copy.deepcopy(run.optimizers))
        ),
        ValueError,
        REPLACED,
    ),
    "parameter added": Case(
        with_optimizer(lambda _, optimizer: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})),
        ValueError,
        FOREIGN,
    ),
    "readout exchanged": Case(with_optimizer(exchange_readout), ValueError, "was exchanged for another", ("hook",)),
}


def own_hooks(module: nn.Module) -> int:
    """Number of hooks of the package on the parts of a module."""
    hooks = [h for part in module.modules() for h in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())]
    return sum(type(hook).__module__.startswith("mlu_lightning") for hook in hooks)


def by_hand(module: Net, x: Tensor, branch: float, readout: float) -> Tensor:
    """theory.md, section 2, with the multipliers of section 3."""
    h = x @ module.embed.weight.T + module.embed.bias
    for block in module.blocks:
        h = h + branch * torch.tanh(h @ block.read.weight.T) @ block.write.weight.T
    return readout * h @ module.readout.weight.T + module.readout.bias


def check_module(module: Net, residual: str) -> None:
    """Methods are the module's own, and its multipliers are on once."""
    assert not {"setup", "configure_model", "configure_optimizers"} & vars(module).keys()
    state = residual_state(module)
    assert state is not None and state.mode == residual
    hooks, branch, readout = (WIDE["depth"] + 1, BRANCH, READOUT) if residual == "hook" else (0, 1.0, 1.0)
    assert own_hooks(module) == hooks
    x = torch.ones(1, INPUTS)
    torch.testing.assert_close(Net.forward(module, x), by_hand(module, x, branch, readout))


def check_optimizer(optimizer: optim.Optimizer) -> None:
    """Groups hold the numbers of the user and his scheduler, also in an update."""
    seen: list[Any] = []
    optimizer._optimizer_step_pre_hooks.clear()
    optimizer._optimizer_step_post_hooks.clear()
    optimizer.register_step_post_hook(lambda one, *_: seen.extend(one.param_groups))
    del optimizer.param_groups[1:]  # what a fault has added
    optimizer.step()
    (group,) = seen
    assert group is optimizer.param_groups[0]
    assert group["lr"] in [LR * 0.5**step for step in range(9)]
    assert group["weight_decay"] == DECAY
    assert len(group["params"]) == 2 * WIDE["depth"] + 4


@pytest.mark.parametrize("first", [pytest.param(True, marks=pytest.mark.slow), False], ids=["before", "after"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_left_after_a_fault(name: str, first: bool, tmp_path: Path) -> None:
    """The callbacks that fail come before MLUCallback, or after it."""
    case = CASES[name]
    if first and name in ("setup", "configure_optimizers"):
        pytest.skip("MLUCallback has not begun")
    outputs = []
    for residual in case.residuals:
        module = Broken(**WIDE)
        mlu = MLUCallback(Net(), residual=residual)  # type: ignore[arg-type]  # one of its two
        others = case.callbacks(tmp_path / residual)
        with pytest.raises(case.error, match=case.message):
            fit(module, *(*others, mlu) if first else (mlu, *others))
        for key in ("training_step", "forward", "lr_scheduler_step", "optimizer_step", "optimizers_of"):
            vars(module).pop(key, None)
        for part in module.modules():
            for hooks in (part._forward_hooks, part._forward_pre_hooks):
                for key, hook in [*hooks.items()]:
                    if not type(hook).__module__.startswith("mlu_lightning"):
                        del hooks[key]
        module.readout.weight._backward_hooks = None
        module.optimizers_of = module.keep
        if name == "readout exchanged":
            continue
        if name == "two at once" and first:
            # the Trainer does not tell the others then; the next fit finds out
            fit(module, mlu, epochs=0)
        check_module(module, residual)
        assert module.training and type(module) is Broken
        path = tmp_path / residual / "run.safetensors"
        assert not path.exists() or Reference.load(path).steps == (0, 1, 2, 3)
        outputs.append(module(torch.ones(1, INPUTS)).detach())
        for optimizer in module.made:
            check_optimizer(optimizer)
        # and it can go on
        before = copy.deepcopy(module.state_dict())
        again = fit(module, MLUCallback(Net(), residual=residual), epochs=1)  # type: ignore[arg-type]  # the same
        check_module(module, residual)
        assert again.global_step == 4
        assert not torch.equal(module.embed.weight, before["embed.weight"])
    if len(outputs) == 2:
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("residual", ["hook", "fold"])
def test_losses_that_are_not_numbers(residual: Any, tmp_path: Path) -> None:
    """They are recorded and logged as they are, and the run goes on as it does without the package."""

    def spoil(run: Trainer, module: Broken) -> None:
        healthy = module.training_step
        vars(module)["training_step"] = lambda batch: healthy(batch) * torch.nan

    probe = next(iter(loader(False)))
    fit(Broken(**WIDE), MLUCallback(Net()), ReferenceRecorder(tmp_path / "a.safetensors", probe, steps=2))
    module, at = Broken(**WIDE), At("on_train_batch_start", spoil)
    watchers = [
        ReferenceRecorder(tmp_path / "b.safetensors", probe, steps=2),
        EmbeddingDistance(tmp_path / "a.safetensors", ["gram", "cka", "procrustes", "output"]),
        FeatureUpdate(probe, steps=2),
    ]
    run = fit(module, at, MLUCallback(Net(), residual=residual), *watchers)
    assert run.global_step == 8
    recorded = Reference.load(tmp_path / "b.safetensors")
    assert recorded.steps == (0, 2, 4, 6, 8)
    assert recorded.losses.isnan().tolist() == [False] * 3 + [True] * 5
    assert [bool(recorded.read(step)["output"].isnan().any()) for step in recorded.steps] == [False] * 2 + [True] * 3
    logged = {name: value for name, value in run.callback_metrics.items() if name.startswith("mlu/")}
    assert {name.split("/")[1] for name in logged} == {"distance", "update"}
    assert all(value.isnan() for value in logged.values())
    assert own_hooks(module) == (WIDE["depth"] + 1 if residual == "hook" else 0)
    check_optimizer(module.made[0])


def test_anomalies_that_torch_finds(tmp_path: Path) -> None:
    module = Broken(**WIDE)
    with torch.no_grad():
        module.embed.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):  # what has no size cannot be initialized
        fit(module, MLUCallback(Net()))
    module = Broken(**WIDE)
    spoil = At("on_train_batch_start", lambda run, module: module.embed.bias.data.fill_(torch.nan))
    with pytest.raises(RuntimeError, match="nan values"):
        fit(module, spoil, MLUCallback(Net()), detect_anomaly=True)
    check_optimizer(module.made[0])
    assert "configure_optimizers" not in vars(module) and own_hooks(module) == WIDE["depth"] + 1


# --- modules that are copied, stored, moved and frozen during a fit


COPIES: dict[str, Callable[[Any], Any]] = {
    "copied": copy.deepcopy,
    "pickled": lambda module: pickle.loads(pickle.dumps(module)),
}


class Storable(Broken):
    """Nothing in it is bound to another object than itself."""

    def __init__(self, **shape: int) -> None:
        super().__init__(**shape)
        self.optimizers_of = None  # type: ignore[assignment]  # which cannot be pickled

    def configure_optimizers(self) -> Any:
        return sgd(self)


@pytest.mark.parametrize("residual", ["hook", "fold"])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_that_is_made_during_a_fit_is_a_module_of_its_own(how: str, residual: Any) -> None:
    copies: list[Storable] = []

    def duplicate(run: Trainer, module: Storable) -> None:
        module.trainer, before = None, module.trainer
        copies.append(COPIES[how](module))
        module.trainer = before

    module = Storable(**WIDE)
    mlu = MLUCallback(Net(), residual=residual)
    fit(module, mlu, At("on_train_batch_start", duplicate))
    (other,) = copies
    optimizer = other.configure_optimizers()["optimizer"]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in other.parameters()}
    check_optimizer(optimizer)  # and it is plain, although the fit is not over for the copy
    check_module(module, residual)
    vars(other).pop("configure_optimizers", None)  # its own, too
    check_module(other, residual)
    before = module(torch.ones(1, INPUTS))
    fit(other, MLUCallback(Net(), residual=residual))
    check_module(other, residual)
    assert torch.equal(module(torch.ones(1, INPUTS)), before)


@pytest.mark.parametrize("residual", ["hook", "fold"])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_that_is_made_afterwards_has_the_multipliers(how: str, residual: Any) -> None:
    module = Storable(**WIDE)
    fit(module, MLUCallback(Net(), residual=residual))
    module.trainer = None
    other = COPIES[how](module)
    check_module(other, residual)
    del module
    fit(other, MLUCallback(Net(), residual=residual))
    check_module(other, residual)


@pytest.mark.parametrize("residual", ["hook", "fold"])
def test_a_module_that_is_moved_between_fits(residual: Any) -> None:
    module = Storable(**WIDE)
    fit(module, MLUCallback(Net(), residual=residual))
    before = module.state_dict()
    module.double().to("cpu").float()
    check_module(module, residual)
    module.to_empty(device="cpu").load_state_dict(before)
    fit(module, MLUCallback(Net(), residual=residual))
    check_module(module, residual)
    fresh = Storable(**WIDE)
    fit(fresh, MLUCallback(Net(), residual=residual))
    fresh.load_state_dict({name: value.clone() for name, value in before.items()}, assign=True)
    fit(fresh, MLUCallback(Net(), residual=residual))
    check_module(fresh, residual)


@pytest.mark.parametrize("residual", ["hook", "fold"])
def test_a_part_that_is_frozen_during_the_run(residual: Any) -> None:
    """The others go on at their own numbers: the run is that of groups by hand."""

    def by_hand(module: nn.Module) -> Any:
        plan = mlu.plan
        assert plan is not None
        state = residual_state(ours)
        assert state is not None
        scales = {n: s.folded("sgd") if n in state.folded else s for n, s in plan.scales("sgd").items()}
        groups = [
            {"params": [p], "lr": LR * scales[n].lr, "weight_decay": DECAY * scales[n].weight_decay}
            for n, p in module.named_parameters()
        ]
        optimizer = optim.SGD(groups, momentum=0.9)
        schedule = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def freeze() -> Callback:
        return At("on_train_batch_start", lambda run, module: module.blocks[1].requires_grad_(False))

    start: list[Any] = []
    ours, theirs = Storable(**WIDE), Broken(**WIDE)
    mlu = MLUCallback(Net(), residual=residual)
    keep = At("on_train_start", lambda run, module: start.append(copy.deepcopy(module.state_dict())), 0)
    fit(ours, mlu, freeze(), keep)
    theirs.load_state_dict(start[0])
    if residual == "hook":
        assert mlu.plan is not None
        attach_multipliers(theirs, mlu.plan)
    theirs.optimizers_of = by_hand
    fit(theirs, freeze())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=1e-5, atol=1e-7)


def test_an_exchanged_optimizer_that_is_scaled_goes_on() -> None:
    mlu = MLUCallback(Net())

    def exchange(run: Trainer, module: Broken) -> None:
        assert mlu.plan is not None
        run.optimizers = [optim.Adam(module.parameters(), lr=LR)]
        handles.append(scale_optimizer(run.optimizers[0], module, mlu.plan))

    handles: list[Any] = []
    assert fit(Broken(**WIDE), mlu, At("on_train_batch_start", exchange)).global_step == 8


def test_a_readout_that_is_exchanged_between_fits() -> None:
    module = Broken(**WIDE)
    fit(module, MLUCallback(Net()))
    module.readout = nn.Linear(WIDE["embedding"], 2)
    with pytest.raises(
        ValueError, match=r"had a multiplier was exchanged.*load new weights into the part that is there"
    ):
        fit(module, MLUCallback(Net()))


# --- signals and disks


def fit_until_terminated(folder: Path) -> None:
    module = Broken(**WIDE)
    kill = At("on_train_batch_start", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    recorder = ReferenceRecorder(folder / "run.safetensors", next(iter(loader(False))), steps=1)
    run = trainer(kill, MLUCallback(Net()), recorder)
    with pytest.raises(SIGTERMException):
        run.fit(module, loader())
    check_module(module, "hook")
    check_optimizer(module.made[0])


def test_a_process_that_is_told_to_end(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=fit_until_terminated, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert Reference.load(tmp_path / "run.safetensors").steps[:4] == (0, 1, 2, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


def test_a_plan_on_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    plan = Plan.from_model(Net(), next(iter(loader())), base=Net())
    plan.save(path)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            Plan.from_model(Net(), next(iter(loader()))).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert Plan.load(path) == plan
    assert os.listdir(tmp_path) == ["plan.yaml"]
