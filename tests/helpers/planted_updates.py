"""Faults that lose an lr, an eps or a decay: who updates weights, how, and with what."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim.sgd import sgd

from helpers.faulty_runs import At
from helpers.planted_optimizers import Bare, ByHand, Climbing, NoOptimizer, OneRate, OwnNumbers
from helpers.planted_runs import NUMBERS, Fault, Module, Run, run
from helpers.planted_weights import normed, tied


def adamw(module: Module) -> optim.AdamW:
    return optim.AdamW(module.parameters(), **NUMBERS)


def own(
    make: Callable[[Module], Any], take: Callable[[Any], Any] = lambda optimizer: optimizer.step()
) -> Callable[[Module, Tensor], None]:
    """A step with an optimizer that the module makes itself."""

    def step(module: Module, loss: Tensor) -> None:
        if "own" not in vars(module):
            vars(module)["own"] = make(module)
        module.manual_backward(loss)
        take(vars(module)["own"])

    return step


class Sam(optim.Optimizer):
    """Climbs nowhere, so that the run is AdamW's; leaves the update to an inner optimizer, or makes it itself."""

    def __init__(self, parameters: Any, inner: Any = optim.AdamW, hidden: bool = False) -> None:
        super().__init__(parameters, dict(NUMBERS))
        made = inner([{"params": group["params"]} for group in self.param_groups], **NUMBERS) if inner else None
        self.update = lambda: made.step() if made else self.descend()
        if not hidden:
            self.inner = made

    def first_step(self) -> None: ...

    def second_step(self) -> None:
        self.update()

    def step(self, closure: Any = None) -> Any:
        loss = closure and closure()
        self.first_step()
        self.second_step()
        return loss

    def descend(self) -> None:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter -= self.param_groups[0]["lr"] * parameter.grad


def phases(optimizer: Any) -> None:
    optimizer.first_step()
    optimizer.second_step()


def descend(module: nn.Module, loss: Tensor) -> None:
    loss.backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= 0.01 * parameter.grad


def descend_in_foreach(module: Module, loss: Tensor) -> None:
    loss.backward()
    parameters = [*module.parameters()]
    torch._foreach_add_([p.data for p in parameters], [p.grad for p in parameters], alpha=-0.01)


def functional(module: Module, loss: Tensor) -> None:
    """torch's own update, without an optimizer."""
    loss.backward()
    parameters = [*module.parameters()]
    numbers = {"weight_decay": 0.1, "momentum": 0, "lr": 0.01, "dampening": 0, "nesterov": False, "maximize": False}
    sgd([p.data for p in parameters], [p.grad for p in parameters], [None] * len(parameters), **numbers)


def in_backward(make: Callable[[list[nn.Parameter]], Any]) -> Run:
    planted = run(lambda module, loss: module.manual_backward(loss), None)

    def register(module: Module) -> None:
        for parameter in module.parameters():
            optimizer = make([parameter])
            parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizer: optimizer.step())

    planted.after.append(At("on_fit_start", lambda trainer, module: register(module), 0))
    return planted


def by_hand_in_backward() -> Run:
    planted = run(lambda module, loss: module.manual_backward(loss), None)

    def descend_one(parameter: Tensor) -> None:
        parameter.data.add_(parameter.grad, alpha=-0.01)

    def register(module: Module) -> None:
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(descend_one)

    planted.after.append(At("on_fit_start", lambda trainer, module: register(module), 0))
    return planted


def exchanged(how: Callable[[Any, Module], Any]) -> Run:
    planted = run()

    def exchange(trainer: Any, module: Module) -> None:
        trainer.strategy.optimizers = [how(trainer.optimizers[0], module)]

    planted.after.append(At("on_train_start", exchange, 0))
    return planted


def partly(rest: Callable[[Module], Any] | None) -> Run:
    """An optimizer of all but the readout, which moves otherwise, or stays."""
    planted = run(
        optimizer=lambda module: optim.AdamW(
            [p for n, p in module.named_parameters() if n != "readout.weight"], **NUMBERS
        )
    )
    if rest is not None:
        planted.after.append(At("on_after_backward", lambda trainer, module: rest(module), 0))
    return planted


def move_readout(module: Module) -> None:
    module.readout.weight.data.sub_(0.01 * module.readout.weight.grad)


def decay_by_hand() -> Run:
    planted = run(optimizer=lambda module: optim.AdamW(module.parameters(), **{**NUMBERS, "weight_decay": 0.0}))
    planted.after.append(At("on_after_backward", lambda trainer, module: decay_all(module), 0))
    return planted


def after_batches(do: Callable[[Module], Any], **numbers: float) -> Run:
    """Does something after the optimizer's step, in the module's own hook."""
    planted = run(optimizer=lambda module: optim.AdamW(module.parameters(), **{**NUMBERS, **numbers}))
    vars(planted.module)["on_train_batch_end"] = lambda *_: do(planted.module)
    return planted


def readout_after_batches() -> Run:
    planted = partly(None)
    vars(planted.module)["on_train_batch_end"] = lambda *_: move_readout(planted.module)
    return planted


def in_optimizer_step() -> Run:
    planted = run()

    def optimizer_step(epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        closure()
        for parameter in planted.module.parameters():
            parameter.data.add_(parameter.grad.sign(), alpha=-0.01)

    vars(planted.module)["optimizer_step"] = optimizer_step
    return planted


def before_second_batch(do: Callable[[Module], Any]) -> Run:
    planted = run()
    planted.after.append(At("on_train_batch_start", lambda trainer, module: do(module), 1))
    return planted


def decay_all(module: Module) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(1 - 0.002)


def clamp(module: Module) -> None:
    for parameter in module.parameters():
        parameter.data.clamp_(-0.05, 0.05)


def clipped_by_hand(norm: float = 0.01) -> Run:
    planted = run(residual="fold")
    clip = lambda trainer, module: nn.utils.clip_grad_norm_(module.parameters(), norm)  # noqa: E731
    planted.after.append(At("on_after_backward", clip, 0))
    return planted


def kept_step(module: Module) -> Any:
    made = adamw(module)
    vars(module)["kept"] = made.step
    return made


def scheduled(module: Module) -> Any:
    """A hook sets the learning rate of every step."""
    made = optim.AdamW(module.parameters(), **{**NUMBERS, "lr": 1.0})

    def schedule(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.02

    made.register_step_pre_hook(schedule)
    return made


def take_returned(module: Module, loss: Tensor) -> None:
    module.manual_backward(loss)
    module.optimizers(use_pl_optimizer=False).step()


def take_kept(module: Module, loss: Tensor) -> None:
    module.manual_backward(loss)
    vars(module)["kept"]()


def declared(elsewhere: str) -> Callable[[], Run]:
    make = lambda module: ByHand(module.parameters(), elsewhere, **NUMBERS)  # noqa: E731
    return lambda: run(optimizer=make, family="adamw")


def own_numbers(**numbers: Any) -> Callable[[], Run]:
    return lambda: run(optimizer=lambda m: OwnNumbers(m.parameters(), **numbers), family="adamw")


ALL = "lr, eps, decay"
MOVED = "Weights have moved in the first steps, but in no update of an optimizer that is scaled: "
CHANGED_IN = "Weights have changed in the first step"
UNREAD = "An optimizer has updated"
UNKNOWN = "How "
EXCHANGED = "Parameters were planned that"
made_anew = lambda m: setattr(m.readout, "weight", nn.Parameter(m.readout.weight.data.clone()))  # noqa: E731
IDLE = "Parameters of the plan belong to no optimizer"
UPDATES: dict[str, Fault] = {
    "own AdamW in training_step": Fault(ALL, lambda: run(own(adamw), None), None),
    "own AdamW, with a closure": Fault(ALL, lambda: run(own(adamw, lambda o: o.step(lambda: None)), None), None),
    "AdamW for each parameter, in backward": Fault(ALL, lambda: in_backward(lambda p: optim.AdamW(p, **NUMBERS)), None),
    "own SAM in two steps": Fault(ALL, lambda: run(own(lambda m: Sam(m.parameters()), phases), None), None),
    "SAM, returned": Fault(ALL, lambda: run(optimizer=lambda m: Sam(m.parameters())), None),
    "SAM whose inner optimizer is hidden, in two steps": Fault(
        ALL, lambda: run(own(lambda m: Sam(m.parameters(), hidden=True), phases), None), None
    ),
    "SAM whose inner optimizer is hidden, with a family": Fault(
        ALL, lambda: run(optimizer=lambda m: Sam(m.parameters(), hidden=True), family="adamw"), "first step", UNREAD
    ),
    "SAM that descends itself, in two steps": Fault(
        ALL, lambda: run(own(lambda m: Sam(m.parameters(), None), phases), None, family="sgd"), "first step", MOVED
    ),
    "SAM that descends itself, returned": Fault(
        ALL, lambda: run(optimizer=lambda m: Sam(m.parameters(), None)), "planning", UNKNOWN
    ),
    "AdamW put in the place of another": Fault(ALL, lambda: exchanged(lambda _, module: adamw(module)), None),
    "copied AdamW put in the place of another": Fault(
        ALL, lambda: exchanged(lambda optimizer, _: copy.deepcopy(optimizer)), "first step", "The AdamW that is about to"
    ),
    "step that was kept before": Fault(ALL, lambda: run(take_kept, kept_step), None),
    "lr that a hook before the step sets": Fault("lr", lambda: run(take_returned, scheduled), None),
    "descent written in training_step": Fault(ALL, lambda: run(descend, None), "first step", MOVED),
    "descent written with foreach": Fault(ALL, lambda: run(descend_in_foreach, None), "first step", MOVED),
    "torch's functional SGD": Fault(ALL, lambda: run(functional, None), "first step", MOVED),
    "descent written in a hook of backward": Fault(ALL, by_hand_in_backward, "first step", MOVED),
    "an optimizer that is none of torch's": Fault(ALL, lambda: run(own(NoOptimizer), None), "first step", MOVED),
    "an optimizer of an unknown class": Fault(
        ALL, lambda: run(optimizer=lambda m: ByHand(m.parameters(), **NUMBERS)), "planning", UNKNOWN
    ),
    "an own one of an unknown class": Fault(
        ALL, lambda: run(own(lambda m: ByHand(m.parameters(), **NUMBERS)), None), "first step", UNKNOWN
    ),
    "the same with its family": Fault(
        ALL, lambda: run(own(lambda m: ByHand(m.parameters(), **NUMBERS)), None, family="adamw"), None
    ),
    "lr from an attribute": Fault("lr", declared("lr"), "first step", UNREAD),
    "eps from an attribute": Fault("eps", declared("eps"), "first step", UNREAD),
    "decay from an attribute": Fault("decay", declared("weight_decay"), "first step", UNREAD),
    "numbers from the groups": Fault(ALL, declared(""), None),
    "update written in optimizer_step": Fault(ALL, in_optimizer_step, "first step", MOVED),
    "weights clamped before the second batch": Fault(
        "std", lambda: before_second_batch(clamp), None, "Weights were changed after"
    ),
    "weights tied after the first step": Fault("lr", lambda: after_batches(tied), "first step", EXCHANGED),
    "weight_norm after the first step": Fault("lr", lambda: after_batches(normed), "first step", EXCHANGED),
    "readout made anew after the first step": Fault(ALL, lambda: after_batches(made_anew), None, IDLE),
    "decay written beside the optimizer": Fault("decay", decay_by_hand, "first step", CHANGED_IN),
    "readout in no optimizer, moved by hand": Fault(ALL, lambda: partly(move_readout), "first step", MOVED),
    "readout in no optimizer": Fault(ALL, lambda: partly(None), None, IDLE),
    "readout in no optimizer, moved after the batch": Fault(ALL, readout_after_batches, "first step", MOVED),
    **{
        name: Fault(name.split()[0], own_numbers(**numbers), "first step", UNREAD)
        for name, numbers in {
            "lr times the size of a weight, as LAMB's": {"factor": lambda p: float(p.norm())},
            "lr over the root of a weight's columns": {"factor": lambda p: p.shape[1] ** -0.5},
            "eps that no group has": {"eps": 1e-3},
            "decay that no group has": {"decay": 0.1},
        }.items()
    },
    "decay written after the batch": Fault(
        "decay", lambda: after_batches(decay_all, weight_decay=0.0), None, "Weights were changed after"
    ),
    "weights clamped after the batch": Fault("std", lambda: after_batches(clamp), None, "Weights were changed after"),
    "folded gradients clipped by hand, which does not bind": Fault(
        "multiplier", lambda: clipped_by_hand(1e6), None, "Gradients were changed between"
    ),
    "folded gradients clipped by hand": Fault("multiplier", clipped_by_hand, None, "Gradients were changed between"),
    "SAM that climbs, folded": Fault(
        "multiplier",
        lambda: run(optimizer=lambda m: Climbing(adamw(m)), residual="fold"),
        None,
        "Weights are moved in the first step",
    ),
    "LBFGS": Fault("lr", lambda: run(optimizer=lambda m: optim.LBFGS(m.parameters())), "planning", "LBFGS cannot"),
    "one rate for all groups": Fault(
        "lr", lambda: run(optimizer=lambda m: OneRate(m.parameters()), family="adamw"), "planning", "OneRate estimates"
    ),
    "without Optimizer.__init__": Fault(ALL, lambda: run(optimizer=Bare, family="sgd"), "planning", "Bare has not called"),
}  # fmt: skip
