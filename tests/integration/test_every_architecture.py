"""Every module of the registry trained with MLUCallback: the base's own shape, hook and fold, checkpoints, saved plans."""

import copy
import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.architecture_runs import EPOCHS, SMALL, Seeded, attachable, batches_like, built, fit, in_double
from helpers.architectures import ARCHITECTURES, Architecture
from helpers.runs_by_hand import listed
from helpers.trainers import identical, loader, quiet
from lightning.pytorch import Trainer

from mlu_lightning import Plan, Role, attach_multipliers, fold, initialize
from mlu_lightning.application.multipliers import residual_state
from mlu_lightning.application.state_mark import MARK, without_mark
from mlu_lightning.callbacks import MLUCallback
from mlu_lightning.planning.plan import Multiplier

BATCHES = 1  # in an epoch


@dataclass(frozen=True)
class Run:  # what a training in double precision at another shape than the base's leaves behind
    module: Any
    trainer: Trainer
    plan: Plan
    folder: Path  # of the checkpoints of each epoch


Runs = Callable[[str], Run]


@pytest.fixture(params=ARCHITECTURES, scope="module")
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="module")
def batches(architecture: Architecture) -> list[Any]:
    return batches_like(in_double(architecture.example), BATCHES)


@pytest.fixture(scope="module")
def runs(architecture: Architecture, batches: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    base = built(architecture, SMALL, seed=1, double=True)

    @functools.cache
    def run(residual: str) -> Run:
        module, folder = built(architecture, double=True), tmp_path_factory.mktemp(residual)
        folds = residual == "fold"
        by_base = MLUCallback(base, residual="fold", alpha=1.5)
        callback = by_base if folds else MLUCallback(plan=run("fold").plan, residual="hook")
        trainer = fit(module, batches, callback, Seeded(), folder=folder)
        return Run(module, trainer, callback.plan, folder)

    return run


@pytest.fixture
def run(request: pytest.FixtureRequest, runs: Runs, residual: str) -> Run:
    if residual == "hook" and not attachable(runs("fold").plan):
        pytest.skip("its multipliers can be folded only: test_hook_and_fold_are_the_same_run")
    return runs(residual)


def evaluated(module: Any, batches: list[Any]) -> list[float]:
    module.eval()
    with torch.no_grad():
        return [float(module.training_step(batch)) for batch in batches]


@pytest.fixture(params=["hook", "fold"])
def residual(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_run_at_the_base_shape_is_the_run_without_the_callback(architecture: Architecture) -> None:
    """Weights, buffers, losses, states of the optimizer and random numbers, in single precision, bit for bit."""
    data, plain = batches_like(architecture.example, BATCHES), built(architecture, SMALL)
    expected = fit(plain, data)
    state = torch.get_rng_state()

    def is_the_same_with(callback: MLUCallback) -> None:
        module = built(architecture, SMALL)
        trainer = fit(module, data, callback)
        assert torch.equal(torch.get_rng_state(), state) and module.losses == plain.losses
        assert identical(module, plain) and module.state_dict().keys() == plain.state_dict().keys()
        assert listed(trainer.optimizers[0].state_dict()) == listed(expected.optimizers[0].state_dict())

    hook = MLUCallback(built(architecture, SMALL, seed=1), residual="hook")
    is_the_same_with(hook)
    is_the_same_with(MLUCallback(plan=hook.plan, residual="fold"))
    assert len(set(plain.losses)) == BATCHES * EPOCHS and not identical(plain, built(architecture, SMALL))


def test_hook_and_fold_are_the_same_run(runs: Runs, architecture: Architecture, batches: list[Any]) -> None:
    """With dropout, a schedule, and buffers: test_hook_and_fold.py has more optimizers and steps in plain loops."""
    folded = runs("fold")
    if not attachable(folded.plan):
        with pytest.raises(ValueError, match=r'cannot be attached as a hook.*residual="fold"'):
            runs("hook")
        return
    hooked = runs("hook")
    state = residual_state(folded.module)
    assert state.folded == {name for multiplier in folded.plan.multipliers for name in multiplier.folds}
    assert all(hooked.plan.forward_multiplier(multiplier) != 1 for multiplier in hooked.plan.multipliers)
    # rounding of float64, which grows from step to step
    assert folded.module.losses == pytest.approx(hooked.module.losses, rel=1e-9)
    factors = {name: scale.multiplier for name, scale in hooked.plan.scales("adamw").items()}
    ours = dict(hooked.module.named_parameters())
    for name, value in folded.module.named_parameters():
        torch.testing.assert_close(value, ours[name] * factors[name], rtol=1e-8, atol=1e-10, msg=_in(name))
    ours = dict(hooked.module.named_buffers())
    for name, value in folded.module.named_buffers():
        torch.testing.assert_close(value, ours[name], rtol=1e-8, atol=1e-10, msg=_in(name))


def test_resumed_run_is_the_whole_run(run: Run, architecture: Architecture, batches: list[Any], residual: Any) -> None:
    module, callback = built(architecture, seed=5, double=True), MLUCallback(plan=run.plan, residual=residual)
    resumed = fit(module, batches, callback, Seeded(), ckpt_path=run.folder / "epoch=0.ckpt")
    assert module.losses == run.module.losses[BATCHES:] and len(module.losses) == BATCHES * (EPOCHS - 1)
    assert identical(module, run.module)
    assert listed(resumed.optimizers[0].state_dict()) == listed(run.trainer.optimizers[0].state_dict())
    schedules = [trainer.lr_scheduler_configs[0].scheduler for trainer in (resumed, run.trainer)]
    assert schedules[0].get_last_lr() == schedules[1].get_last_lr()


def test_checkpoint_in_a_plain_module(run: Run, architecture: Architecture, batches: list[Any], residual: str) -> None:
    """It has the same weights; the same outputs too, if all multipliers are in them, or as soon as they are put in.

    Until then it refuses them, unless the one thing that says so is taken out by hand.
    """
    checkpoint = torch.load(run.folder / "epoch=1.ckpt", weights_only=True)
    plain = built(architecture, seed=5, double=True)
    complete = residual == "fold" and all(multiplier.folds for multiplier in run.plan.multipliers)
    with nullcontext() if complete else pytest.raises(RuntimeError, match=MARK):
        plain.load_state_dict(checkpoint["state_dict"])
    plain.load_state_dict(without_mark(checkpoint["state_dict"]))
    assert identical(plain, run.module)
    expected, found = evaluated(run.module, batches), evaluated(plain, batches)
    assert (found == expected) is complete
    if complete:
        return
    plan = Plan.from_yaml(checkpoint["callbacks"]["MLUCallback"]["plan"], "checkpoint")
    if residual == "hook":
        attach_multipliers(plain, plan)
    else:
        fold(plain, plan, multiplied=True)
    assert evaluated(plain, batches) == expected


def test_checkpoint_in_a_run_with_the_callback(run: Run, architecture: Architecture, batches: list[Any]) -> None:
    """Its multipliers come along into an evaluation, whatever the callback's base."""
    module = built(architecture, seed=5, double=True)
    quiet(MLUCallback()).validate(module, loader(batches), ckpt_path=run.folder / "epoch=1.ckpt", verbose=False)
    assert module.validated == evaluated(run.module, batches) and identical(module, run.module)


def test_saved_plan_is_the_plan(runs: Runs, architecture: Architecture, batches: list[Any], tmp_path: Path) -> None:
    plan = runs("fold").plan
    plan.save(tmp_path / "plan.yaml")
    loaded = Plan.load(tmp_path / "plan.yaml")
    assert loaded == plan
    ours, theirs = built(architecture, double=True), built(architecture, double=True)
    initialize(ours, plan)
    initialize(theirs, loaded)
    assert identical(ours, theirs) and not identical(ours, built(architecture, double=True))
    before = evaluated(ours, batches)
    for put in [attach_multipliers, fold] if attachable(plan) else [fold]:
        one, other = copy.deepcopy(ours), copy.deepcopy(theirs)
        put(one, plan)
        put(other, loaded)
        assert evaluated(one, batches) == evaluated(other, batches) != before


def test_saved_plan_can_be_edited(runs: Runs) -> None:
    """Every parameter and multiplier has one line; a change of every second is a change of these and nothing else."""
    plan = runs("fold").plan
    lines = plan.to_yaml().splitlines()
    parameters, multipliers = {**plan.parameters}, [*plan.multipliers]
    for name, parameter in [*parameters.items()][::2]:
        (index,) = [index for index, line in enumerate(lines) if line.startswith(f"  {name}: ")]
        role = Role.STREAM_NORM if parameter.role is not Role.STREAM_NORM else Role.BRANCH_NORM
        lines[index] = lines[index].replace(f"role: {parameter.role},", f"role: {role},")
        parameters[name] = replace(parameter, role=role)
    for place, multiplier in [*enumerate(multipliers)][::2]:
        start = f"  - {{name: {multiplier.name}, kind: {multiplier.kind}, value: "
        index = [index for index, line in enumerate(lines) if line.startswith(start)][_before(multipliers, place)]
        lines[index] = lines[index].replace(f"{start}{multiplier.value},", f"{start}0.125,")
        multipliers[place] = replace(multiplier, value=0.125)
    edited = Plan.from_yaml("\n".join(lines), "edited")
    assert edited == replace(plan, parameters=parameters, multipliers=tuple(multipliers)) and edited != plan


def _in(name: str) -> Callable[[str], str]:
    return lambda text: f"{name}: {text}"


def _before(multipliers: list[Multiplier], place: int) -> int:
    """How many multipliers before one have its name and kind: parallel branches can share a name."""
    own = multipliers[place]
    return sum((other.name, other.kind) == (own.name, own.kind) for other in multipliers[:place])
