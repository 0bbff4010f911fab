"""Runs that look like faults and are none: nothing stops them, and nothing is warned about."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from helpers.faulty_runs import At
from helpers.planted_runs import NUMBERS, Module, Run, at, outcome, plan, run
from helpers.runs_by_hand import Net, fit
from helpers.trainers import quiet
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateFinder
from torch import Tensor, nn, optim
from torch.utils.checkpoint import checkpoint

from mlu_lightning import MLUCallback, unfolded_gradients


def in_turn(module: Module, loss: Tensor) -> None:
    """Two optimizers, one of which steps in the third batch only."""
    module.manual_backward(loss)
    first, second = module.optimizers()
    (second if module.losses[2:] else first).step()


def two(module: Module) -> list[optim.Optimizer]:
    return [
        optim.AdamW(part.parameters(), **NUMBERS)
        for part in (module.blocks, nn.ModuleList([module.embed, module.readout]))
    ]


def frozen_at_first() -> Run:
    planted = run()
    planted.after.append(At("on_fit_start", lambda trainer, module: module.blocks.requires_grad_(False), 0))
    planted.after.append(At("on_train_batch_start", lambda trainer, module: module.blocks.requires_grad_(True), 2))
    return planted


def dropped(forward: Callable[[nn.Module, Tensor], Tensor]) -> Run:
    """Blocks that are called in another way."""
    planted = run()

    def pass_through(x: Tensor) -> Tensor:
        stream = planted.module.embed(x)
        for block in planted.module.blocks:
            stream = stream + forward(block, stream)
        return planted.module.readout(stream)

    vars(planted.module)["forward"] = pass_through
    return planted


def clamp(module: Module) -> None:
    for parameter in module.parameters():
        parameter.data.clamp_(-0.5, 0.5)


def warm_up(module: Module) -> Any:
    optimizer = optim.AdamW(module.parameters(), **NUMBERS)
    return [optimizer], [
        {"scheduler": optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10), "interval": "step"}
    ]


def teacher() -> Run:
    """A part that is frozen, drawn when training starts, and moved by hand."""
    planted = run()
    planted.module.blocks[1].requires_grad_(False)
    planted.after += [
        At("on_fit_start", lambda trainer, module: module.blocks[1].load_state_dict(module.blocks[0].state_dict()), 0),
        At("on_train_batch_end", lambda trainer, module: module.blocks[1].write.weight.data.mul_(0.99), 0),
    ]
    return planted


def several_forwards() -> Run:
    planted = run()
    step = planted.module.training_step
    vars(planted.module)["training_step"] = lambda batch: (planted.module(batch[0]), step(batch))[1] + step(batch)
    return planted


def two_losses(module: Module, loss: Tensor) -> None:
    module.manual_backward(loss, retain_graph=True)
    module.manual_backward(loss.sqrt())
    module.optimizers().step()


def clip_unfolded(module: Module) -> None:
    with unfolded_gradients(module, plan()):
        nn.utils.clip_grad_norm_(module.parameters(), 0.01)


def halve_gradients(module: Module) -> None:
    for parameter in module.parameters():
        parameter.grad /= 2


draws = random.Random(0)
RUNS: dict[str, Callable[[], Run]] = {
    "plain": run,
    "accumulated": at("on_fit_start", lambda m: setattr(m.trainer, "accumulate_grad_batches", 3)),
    "optimizers in turn": lambda: run(in_turn, two),
    "frozen at first": frozen_at_first,
    "layers dropped": lambda: dropped(lambda block, x: block(x) if draws.random() < 0.5 else x * 0),
    "checkpointed": lambda: dropped(lambda block, x: checkpoint(block, x, use_reentrant=False)),
    "checkpointed, reentrant": lambda: dropped(lambda block, x: checkpoint(block, x, use_reentrant=True)),
    "clamped later": at("on_train_batch_end", clamp, 3),
    "two losses of one pass": lambda: run(two_losses),
    "clipped by Lightning": at(
        "on_fit_start", lambda m: setattr(m.trainer, "gradient_clip_val", 0.01), residual="fold"
    ),
    "clipped in unfolded_gradients": at("on_after_backward", clip_unfolded, residual="fold"),
    "scaled by a power of two": at("on_after_backward", halve_gradients, residual="fold"),
    "no learning rate at first": lambda: run(optimizer=warm_up),
    "no gradients at first": at("on_after_backward", lambda m: m.zero_grad()),
    "initialized by the user": at("on_fit_start", lambda m: nn.init.normal_(m.embed.weight), init=None),
    "same values again": at("on_fit_start", lambda m: m.load_state_dict(m.state_dict(), assign=False)),
    "another precision": at("on_fit_start", lambda m: m.double().float()),
    "teacher": teacher,
    "several forward passes": several_forwards,
    "not verified": at("on_fit_start", lambda m: nn.init.normal_(m.embed.weight), verify=False),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_without_a_fault(name: str) -> None:
    assert outcome(RUNS[name])[:2] == (None, "")


def test_weights_of_other_runs(tmp_path: Any) -> None:
    """Of a checkpoint that is resumed, after an evaluation, of a fit before, and from before the learning rate finder."""
    module = Module()
    quiet().validate(module, verbose=False)
    first = fit(module, MLUCallback(plan=plan()), max_epochs=1)
    first.save_checkpoint(tmp_path / "run.ckpt")
    fit(module, MLUCallback(plan=plan()), max_epochs=1)
    fit(Module(), MLUCallback(plan=plan()), max_epochs=2, ckpt_path=tmp_path / "run.ckpt")
    finder = LearningRateFinder(num_training_steps=4, early_stop_threshold=None)
    scheduler = GradientAccumulationScheduler({0: 2})
    fit(Net(), MLUCallback(plan=plan()), finder, scheduler, max_epochs=1, default_root_dir=tmp_path)


def test_a_fit_after_one_that_was_stopped_is_stopped_too() -> None:
    module, mlu = Module(), MLUCallback(plan=plan())
    for message in ("were changed before the first step: embed.weight. ", "not known whether it was initialized"):
        draw = At("on_fit_start", lambda trainer, module: nn.init.normal_(module.embed.weight), 0)
        with pytest.raises(ValueError, match=message):
            fit(module, mlu, draw)
