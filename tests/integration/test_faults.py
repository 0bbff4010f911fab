"""Everything that goes wrong during a fit: what is left is the user's own, with the multipliers in it exactly once."""

import copy
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import faulty_runs
from helpers.damage import small_disk
from helpers.faulty_runs import PROBE, At, Watched, check_module, check_optimizer, fit, own_hooks
from helpers.processes import exit_code
from helpers.runs_by_hand import BASE, SHAPE, Net
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from mlu_lightning.callbacks import EmbeddingDistance, FeatureUpdate, MLUCallback, ReferenceRecorder
from mlu_lightning.observation.reference import Reference
from mlu_lightning.planning.plan import Plan


class Fault(Exception): ...


def fail(*args: Any, **kwargs: Any) -> Any:
    raise Fault("on purpose")


Callbacks = Callable[[Path], list[Callback]]


def in_hook(name: str, do: Callable[[Trainer, Any], Any] = fail, step: int = 3) -> Callbacks:
    return lambda folder: [At(name, do, step)]


def before_step_4(do: Callable[[Any], Any]) -> Callbacks:
    return in_hook("on_train_batch_start", lambda run, module: do(module))


def recorder_that(fails: str) -> Callbacks:
    """A recorder whose writer, or whose pass of the probe, fails after step 3."""

    def callbacks(folder: Path) -> list[Callback]:
        recorder = ReferenceRecorder(folder / "run.safetensors", probe=PROBE, steps=1)

        def spoil(run: Trainer, module: Net) -> None:
            if fails == "writer":
                assert recorder._writer is not None
                vars(recorder._writer)["write"] = fail
            else:
                module.blocks[1].register_forward_hook(lambda part, *_: None if part.training else fail())

        return [recorder, At("on_train_batch_start", spoil)]

    return callbacks


def raises(error: type[BaseException]) -> Callbacks:
    def do(*args: Any) -> None:
        raise error

    return in_hook("on_after_backward", do)


def copy_optimizer(run: Trainer, module: Watched) -> None:
    run.strategy.optimizers = copy.deepcopy(run.optimizers)


def add_parameter(module: Watched) -> None:
    module.made[-1].add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def exchange_readout(module: Watched) -> None:
    module.readout = nn.Linear(SHAPE[2], 2)
    module.made[-1].add_param_group({"params": module.readout.parameters()})


class FailsTwice(Callback):  # fails, and once more when it hears of that
    on_train_batch_end = fail
    on_exception = fail


@dataclass(frozen=True)
class Case:  # callbacks that make a fault happen, and the error that comes out of fit
    callbacks: Callbacks
    error: type[BaseException] = Fault
    message: str = "on purpose"
    residuals: tuple[str, ...] = ("hook", "fold")  # where it can be found


METHODS = ("training_step", "forward", "lr_scheduler_step", "optimizer_step")
STARTS = ("setup", "on_fit_start", "on_train_start")
HOOKS = """on_train_batch_start on_before_backward on_after_backward on_before_optimizer_step on_before_zero_grad
on_train_batch_end on_train_epoch_end on_train_end teardown""".split()
REPLACED = r"has none of the module's parameters, as a copy of an optimizer has not.*put in the place of another since"
FOREIGN = r"in group 1 of the optimizer is not a parameter of the module that the plan was made for"
CASES: dict[str, Case] = {
    **{name: Case(before_step_4(lambda module, name=name: vars(module).update({name: fail}))) for name in METHODS},
    **{name: Case(in_hook(name, step=0)) for name in STARTS},
    **{name: Case(in_hook(name)) for name in HOOKS},
    "configure_optimizers": Case(in_hook("setup", lambda _, module: vars(module).update(optimizer=fail), 0)),
    "backward": Case(before_step_4(lambda module: module.readout.weight.register_hook(fail))),
    "update begins": Case(before_step_4(lambda module: module.made[-1].register_step_pre_hook(fail))),
    "update ends": Case(before_step_4(lambda module: module.made[-1].register_step_post_hook(fail))),
    "forward hook": Case(before_step_4(lambda module: module.readout.register_forward_hook(fail))),
    "input hook": Case(before_step_4(lambda module: module.blocks[0].register_forward_pre_hook(fail))),
    "two at once": Case(lambda folder: [FailsTwice()]),
    "writer of the recorder": Case(recorder_that("writer")),
    "probe of the recorder": Case(recorder_that("probe")),
    "keyboard": Case(raises(KeyboardInterrupt), SystemExit, "1"),
    "exit": Case(raises(SystemExit), SystemExit, "^$"),
    "memory": Case(raises(MemoryError), MemoryError, "^$"),
    "copied optimizer": Case(in_hook("on_train_batch_end", copy_optimizer), ValueError, REPLACED),
    "parameter added": Case(before_step_4(add_parameter), ValueError, FOREIGN),
    "readout exchanged": Case(before_step_4(exchange_readout), ValueError, "was exchanged for another", ("hook",)),
}


@pytest.mark.parametrize("first", [pytest.param(True, marks=pytest.mark.slow), False], ids=["before", "after"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_left_after_a_fault(name: str, first: bool, tmp_path: Path) -> None:
    """The callbacks that fail come before MLUCallback, or after it."""
    case = CASES[name]
    if first and name in ("setup", "configure_optimizers"):
        pytest.skip("MLUCallback has not begun")
    outputs = []
    for residual in case.residuals:
        module = Watched()
        mlu = MLUCallback(Net(BASE), residual=residual)  # type: ignore[arg-type]  # one of its two
        others = case.callbacks(tmp_path / residual)
        with pytest.raises(case.error, match=case.message):
            fit(module, *(*others, mlu) if first else (mlu, *others))
        for key in (*METHODS, "optimizer"):
            vars(module).pop(key, None)
        for hooks in (h for part in module.modules() for h in (part._forward_hooks, part._forward_pre_hooks)):
            for key, hook in [*hooks.items()]:
                if not type(hook).__module__.startswith("mlu_lightning"):
                    del hooks[key]
        module.readout.weight._backward_hooks = None
        if name == "readout exchanged":
            continue
        if name == "two at once" and first:
            # the Trainer does not tell the others then; the next fit finds out
            fit(module, mlu, max_epochs=0)
        check_module(module, residual)
        assert module.training and type(module) is Watched
        path = tmp_path / residual / "run.safetensors"
        assert not path.exists() or Reference.load(path).steps == (0, 1, 2, 3)
        outputs.append(module(torch.ones(1, 3)).detach())
        for optimizer in module.made:
            check_optimizer(optimizer)
        # and it can go on
        before = copy.deepcopy(module.state_dict())
        again = fit(module, MLUCallback(Net(BASE), residual=residual), max_epochs=1)  # type: ignore[arg-type]  # the same
        check_module(module, residual)
        assert again.global_step == 4 and not torch.equal(module.embed.weight, before["embed.weight"])
    if len(outputs) == 2:
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("residual", ["hook", "fold"])
def test_losses_that_are_not_numbers(residual: Any, tmp_path: Path) -> None:
    """They are recorded and logged as they are, and the run goes on as it does without the package."""

    def spoil(run: Trainer, module: Watched) -> None:
        healthy = module.training_step
        vars(module)["training_step"] = lambda batch: healthy(batch) * torch.nan

    fit(Watched(), MLUCallback(Net(BASE)), ReferenceRecorder(tmp_path / "a.safetensors", PROBE, steps=2))
    module, at = Watched(), At("on_train_batch_start", spoil)
    watchers = [
        ReferenceRecorder(tmp_path / "b.safetensors", PROBE, steps=2),
        EmbeddingDistance(tmp_path / "a.safetensors", ["gram", "cka", "procrustes", "output"]),
        FeatureUpdate(PROBE, steps=2),
    ]
    run = fit(module, at, MLUCallback(Net(BASE), residual=residual), *watchers)
    assert run.global_step == faulty_runs.STEPS
    recorded = Reference.load(tmp_path / "b.safetensors")
    assert recorded.steps == (0, 2, 4, 6, 8) and recorded.losses.isnan().tolist() == [False] * 3 + [True] * 5
    assert [bool(recorded.read(step)["output"].isnan().any()) for step in recorded.steps] == [False] * 2 + [True] * 3
    logged = {name: value for name, value in run.callback_metrics.items() if name.startswith("mlu/")}
    assert {name.split("/")[1] for name in logged} == {"distance", "update"}
    assert all(value.isnan() for value in logged.values())
    assert own_hooks(module) == faulty_runs.expected_hooks(residual)
    check_optimizer(module.made[0])


def test_anomalies_that_torch_finds(tmp_path: Path) -> None:
    module = Watched()
    with torch.no_grad():
        module.embed.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):  # what has no size cannot be initialized
        fit(module, MLUCallback(Net(BASE), residual="hook"))
    module = Watched()
    spoil = At("on_train_batch_start", lambda run, module: module.embed.weight.data.fill_(torch.nan))
    with pytest.raises(RuntimeError, match="nan values"):
        fit(module, spoil, MLUCallback(Net(BASE), residual="hook"), detect_anomaly=True)
    check_optimizer(module.made[0])
    assert "configure_optimizers" not in vars(module) and own_hooks(module) == faulty_runs.expected_hooks("hook")


def fit_until_terminated(folder: Path) -> None:
    module = Watched()
    kill = At("on_train_batch_start", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    recorder = ReferenceRecorder(folder / "run.safetensors", PROBE, steps=1)
    with pytest.raises(SIGTERMException):
        fit(module, kill, MLUCallback(Net(BASE), residual="hook"), recorder)
    check_module(module, "hook")
    check_optimizer(module.made[0])


def test_a_process_that_is_told_to_end(tmp_path: Path) -> None:
    assert exit_code(fit_until_terminated, tmp_path) == 0 and Reference.load(tmp_path / "run.safetensors").steps[
        :4
    ] == (0, 1, 2, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


def test_a_plan_on_a_full_disk(tmp_path: Path) -> None:
    path, plan = tmp_path / "plan.yaml", Plan.from_model(Net(), PROBE, base=Net(BASE))
    plan.save(path)
    with small_disk(), pytest.raises(OSError, match="too large"):
        Plan.from_model(Net(), PROBE).save(path)
    assert Plan.load(path) == plan and os.listdir(tmp_path) == ["plan.yaml"]
