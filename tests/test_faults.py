"""Everything that goes wrong during a fit: what is left is the user's own, with the multipliers in it exactly once."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from test_callback import BASE, INPUTS, WIDE, Net, fit, loader, trainer
from torch import Tensor, nn, optim

from mlu_lightning.callbacks import EmbeddingDistance, FeatureUpdate, MLUCallback, ReferenceRecorder
from mlu_lightning.multipliers import attach_multipliers, residual_state
from mlu_lightning.optimization import scale_optimizer
from mlu_lightning.plan import Plan
from mlu_lightning.reference import Reference, ReferenceWriter

LR, DECAY = 0.02, 0.1
BRANCH, READOUT = BASE["depth"] / WIDE["depth"], BASE["embedding"] / WIDE["embedding"]


def sgd(module: nn.Module) -> Any:
    optimizer = optim.SGD(module.parameters(), lr=LR, momentum=0.9, weight_decay=DECAY)
    schedule = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Broken(Net):
    """Keeps its optimizers; what it does may be made to fail at a step of the training."""

    def __init__(self, **shape: int) -> None:
        super().__init__(**shape, optimizers=self.keep)
        self.made: list[optim.Optimizer] = []
        self.fault: Callable[[], None] = lambda: None

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


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_left_after_a_fault(name: str, first: bool, tmp_path: Path) -> None:
    """The callbacks that fail come before MLUCallback, or after it."""
    case = CASES[name]
    if first and name in ("setup", "configure_optimizers"):
        pytest.skip("MLUCallback has not begun")
    outputs = []
    for residual in case.residuals:
        module = Broken(**WIDE)
        mlu = MLUCallback(Net(), residual=residual)  # type: ignore[arg-type]
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
        again = fit(module, MLUCallback(Net(), residual=residual), epochs=1)  # type: ignore[arg-type]
        check_module(module, residual)
        assert again.global_step == 4
        assert not torch.equal(module.embed.weight, before["embed.weight"])
    if len(outputs) == 2:
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
