"""Faults that lose an lr, an eps or a decay: who updates weights, how, and with what."""

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn, optim

from helpers.faulty_runs import At
from helpers.planted_optimizers import Bare, ByHand, Climbing, OneRate, OwnNumbers
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


def in_backward(update: Callable[[nn.Parameter], Callable[[Tensor], None]]) -> Run:
    planted = run(lambda module, loss: module.manual_backward(loss), None)

    def register(trainer: Any, module: Module) -> None:
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(update(parameter))

    planted.after.append(At("on_fit_start", register, 0))
    return planted


def alone(parameter: nn.Parameter) -> Callable[[Tensor], None]:
    optimizer = optim.AdamW([parameter], **NUMBERS)
    return lambda _: optimizer.step()


def descend_alone(parameter: Tensor) -> None:
    parameter.data.add_(parameter.grad, alpha=-0.01)


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


def returned(make: Callable[[Module], Any], **settings: Any) -> Callable[[], Run]:
    return lambda: run(optimizer=make, **settings)


def stepped(step: Any, optimizer: Any = None, **settings: Any) -> Callable[[], Run]:
    return lambda: run(step, optimizer, **settings)


def declared(elsewhere: str) -> Callable[[], Run]:
    return returned(lambda module: ByHand(module.parameters(), elsewhere, **NUMBERS), family="adamw")


def own_numbers(**numbers: Any) -> Callable[[], Run]:
    return returned(lambda m: OwnNumbers(m.parameters(), **numbers), family="adamw")


def made_anew(module: Module) -> None:
    module.readout.weight = nn.Parameter(module.readout.weight.data.clone())


def sam(inner: Any = optim.AdamW, hidden: bool = False) -> Callable[[Module], Sam]:
    return lambda module: Sam(module.parameters(), inner, hidden)


def unhooked(module: Module) -> Any:
    return SimpleNamespace(step=partial(optim.AdamW.step.__wrapped__, adamw(module)))


def by_hand(module: Module) -> ByHand:
    return ByHand(module.parameters(), **NUMBERS)


ALL = "lr, eps, decay"
MOVED = "Weights have moved in the first steps, but in no update of an optimizer that is scaled: "
CHANGED_IN, CHANGED = "Weights have changed in the first step", "Weights were changed after"
UNREAD, UNKNOWN, GRADIENTS = "An optimizer has updated", "How ", "Gradients were changed between"
EXCHANGED, IDLE = "Parameters were planned that", "Parameters of the plan belong to no optimizer"
_RIGHT: dict[str, Callable[[], Run]] = {
    "own AdamW in training_step": stepped(own(adamw)),
    "own AdamW, with a closure": stepped(own(adamw, lambda o: o.step(lambda: None))),
    "AdamW for each parameter, in backward": lambda: in_backward(alone),
    "own SAM in two steps": stepped(own(sam(), phases)),
    "SAM, returned": returned(sam()),
    "SAM whose inner optimizer is hidden, in two steps": stepped(own(sam(hidden=True), phases)),
    "AdamW put in the place of another": lambda: exchanged(lambda _, module: adamw(module)),
    "step that was kept before": stepped(take_kept, kept_step),
    "lr that a hook before the step sets": stepped(take_returned, scheduled),
    "an own one of an unknown class, with its family": stepped(own(by_hand), family="adamw"),
    "numbers from the groups": declared(""),
}
_STOPPED: dict[str, tuple[str, str, str, Callable[[], Run]]] = {
    "SAM whose inner optimizer is hidden, with a family": (
        ALL, "first step", UNREAD, returned(sam(hidden=True), family="adamw")
    ),
    "SAM that descends itself, in two steps": (ALL, "first step", MOVED, stepped(own(sam(None), phases), family="sgd")),
    "SAM that descends itself, returned": (ALL, "planning", UNKNOWN, returned(sam(None))),
    "copied AdamW put in the place of another": (
        ALL, "first step", "The AdamW that is about to", lambda: exchanged(lambda optimizer, _: copy.deepcopy(optimizer))
    ),
    "descent written in training_step": (ALL, "first step", MOVED, stepped(descend)),
    "descent written with foreach": (ALL, "first step", MOVED, stepped(descend_in_foreach)),
    "descent written in a hook of backward": (ALL, "first step", MOVED, lambda: in_backward(lambda _: descend_alone)),
    "an optimizer that is none of torch's": (ALL, "first step", MOVED, stepped(own(unhooked))),
    "an optimizer of an unknown class": (ALL, "planning", UNKNOWN, returned(by_hand)),
    "an own one of an unknown class": (ALL, "first step", UNKNOWN, stepped(own(by_hand))),
    "lr from an attribute": ("lr", "first step", UNREAD, declared("lr")),
    "eps from an attribute": ("eps", "first step", UNREAD, declared("eps")),
    "decay from an attribute": ("decay", "first step", UNREAD, declared("weight_decay")),
    "lr times the size of a weight, as LAMB's": ("lr", "first step", UNREAD, own_numbers(factor=lambda p: float(p.norm()))),
    "lr over the root of a weight's columns": ("lr", "first step", UNREAD, own_numbers(factor=lambda p: p.shape[1] ** -0.5)),
    "eps that no group has": ("eps", "first step", UNREAD, own_numbers(eps=1e-3)),
    "decay that no group has": ("decay", "first step", UNREAD, own_numbers(decay=0.1)),
    "update written in optimizer_step": (ALL, "first step", MOVED, in_optimizer_step),
    "weights tied after the first step": ("lr", "first step", EXCHANGED, lambda: after_batches(tied)),
    "weight_norm after the first step": ("lr", "first step", EXCHANGED, lambda: after_batches(normed)),
    "decay written beside the optimizer": ("decay", "first step", CHANGED_IN, decay_by_hand),
    "readout in no optimizer, moved by hand": (ALL, "first step", MOVED, lambda: partly(move_readout)),
    "readout in no optimizer, moved after the batch": (ALL, "first step", MOVED, readout_after_batches),
    "LBFGS": ("lr", "planning", "LBFGS cannot", returned(lambda m: optim.LBFGS(m.parameters()))),
    "one rate for all groups": (
        "lr", "planning", "OneRate estimates", returned(lambda m: OneRate(m.parameters()), family="adamw")
    ),
    "without Optimizer.__init__": (ALL, "planning", "Bare has not called", returned(Bare, family="sgd")),
}  # fmt: skip
_WARNED: dict[str, tuple[str, str, Callable[[], Run]]] = {
    "weights clamped before the second batch": ("std", CHANGED, lambda: before_second_batch(clamp)),
    "weights clamped after the batch": ("std", CHANGED, lambda: after_batches(clamp)),
    "decay written after the batch": ("decay", CHANGED, lambda: after_batches(decay_all, weight_decay=0.0)),
    "readout made anew after the first step": (ALL, IDLE, lambda: after_batches(made_anew)),
    "readout in no optimizer": (ALL, IDLE, lambda: partly(None)),
    "folded gradients clipped by hand, which does not bind": ("multiplier", GRADIENTS, lambda: clipped_by_hand(1e6)),
    "folded gradients clipped by hand": ("multiplier", GRADIENTS, clipped_by_hand),
    "SAM that climbs, folded": (
        "multiplier", "Weights are moved in the first step", returned(lambda m: Climbing(adamw(m)), residual="fold")
    ),
}  # fmt: skip
UPDATES = {
    **{name: Fault(ALL, plant, None) for name, plant in _RIGHT.items()},
    **{name: Fault(loses, plant, stops, words) for name, (loses, stops, words, plant) in _STOPPED.items()},
    **{name: Fault(loses, plant, None, words) for name, (loses, words, plant) in _WARNED.items()},
}
