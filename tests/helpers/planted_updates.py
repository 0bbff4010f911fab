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
from helpers.planted_runs import NUMBERS, Fault, Module, Run, at, run
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


def descend(module: nn.Module, loss: Tensor) -> None:
    loss.backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= 0.01 * parameter.grad


def descend_in_foreach(module: Module, loss: Tensor) -> None:
    loss.backward()
    parameters = [*module.parameters()]
    torch._foreach_add_([p.data for p in parameters], [p.grad for p in parameters], alpha=-0.01)


def in_backward(update: Callable[[nn.Parameter], Callable[[Tensor], None]]) -> Callable[[], Run]:
    def register(module: Module) -> None:
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(update(parameter))

    return at("on_fit_start", register, 0, lambda module, loss: module.manual_backward(loss), None)


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


def partly(module: Module) -> optim.AdamW:
    """An optimizer of all but the readout, which moves otherwise, or stays."""
    return optim.AdamW([p for n, p in module.named_parameters() if n != "readout.weight"], **NUMBERS)


def move_readout(module: Module) -> None:
    module.readout.weight.data.sub_(0.01 * module.readout.weight.grad)


def undecayed(module: Module) -> optim.AdamW:
    return optim.AdamW(module.parameters(), **{**NUMBERS, "weight_decay": 0.0})


def after_batches(do: Callable[[Module], Any], optimizer: Any = ...) -> Callable[[], Run]:
    """Does something after the optimizer's step, in the module's own hook."""

    def plant() -> Run:
        planted = run(optimizer=optimizer)
        vars(planted.module)["on_train_batch_end"] = lambda *_: do(planted.module)
        return planted

    return plant


def in_optimizer_step() -> Run:
    planted = run()

    def optimizer_step(epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        closure()
        for parameter in planted.module.parameters():
            parameter.data.add_(parameter.grad.sign(), alpha=-0.01)

    vars(planted.module)["optimizer_step"] = optimizer_step
    return planted


def decay_all(module: Module) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(1 - 0.002)


def clamp(module: Module) -> None:
    for parameter in module.parameters():
        parameter.data.clamp_(-0.05, 0.05)


def clipped_by_hand(norm: float = 0.01) -> Callable[[], Run]:
    return at("on_after_backward", lambda m: nn.utils.clip_grad_norm_(m.parameters(), norm), residual="fold")


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


def limited(module: Module) -> Any:
    made = adamw(module)
    made.register_step_post_hook(lambda *_: clamp(module))
    return made


def add_weights(module: Module) -> None:
    for parameter in module.parameters():
        parameter.grad.add_(parameter.data, alpha=0.1)


def penalized(**settings: Any) -> Run:
    """By a term of the loss that the plan has not seen."""
    planted = run(**settings)
    step = planted.module.training_step
    penalty = lambda: sum(p.square().sum() for p in planted.module.parameters())  # noqa: E731
    vars(planted.module)["training_step"] = lambda batch: step(batch) + 0.01 * penalty()
    return planted


ALL, FIRST = "lr, eps, decay", "first step"
PHASES = lambda optimizer: (optimizer.first_step(), optimizer.second_step())  # noqa: E731
MOVED = "Weights have moved in the first steps, but in no update of an optimizer that is scaled: "
CHANGED_IN, CHANGED = "Weights have changed in the first step", "Weights were changed after"
UNREAD, UNKNOWN, GRADIENTS = "An optimizer has updated", "How ", "Gradients were changed between"
PART, EXCHANGED, IDLE = (
    "Gradients were changed by a part of",
    "Parameters were planned that",
    "Parameters of the plan belong to no optimizer",
)
_RIGHT: dict[str, Callable[[], Run]] = {
    "own AdamW in training_step": stepped(own(adamw)),
    "own AdamW, with a closure": stepped(own(adamw, lambda o: o.step(lambda: None))),
    "AdamW for each parameter, in backward": in_backward(alone),
    "own SAM in two steps": stepped(own(sam(), PHASES)),
    "SAM, returned": returned(sam()),
    "SAM whose inner optimizer is hidden, in two steps": stepped(own(sam(hidden=True), PHASES)),
    "AdamW put in the place of another": lambda: exchanged(lambda _, module: adamw(module)),
    "step that was kept before": stepped(take_kept, kept_step),
    "lr that a hook before the step sets": stepped(take_returned, scheduled),
    "an own one of an unknown class, with its family": stepped(own(by_hand), family="adamw"),
    "numbers from the groups": declared(""),
}
_STOPPED: dict[str, tuple[str, str, str, Callable[[], Run]]] = {
    "SAM whose inner optimizer is hidden, with a family": (
        ALL, FIRST, UNREAD, returned(sam(hidden=True), family="adamw")
    ),
    "SAM that descends itself, in two steps": (ALL, FIRST, MOVED, stepped(own(sam(None), PHASES), family="sgd")),
    "SAM that descends itself, returned": (ALL, "planning", UNKNOWN, returned(sam(None))),
    "copied AdamW put in the place of another": (
        ALL, FIRST, "The AdamW that is about to", lambda: exchanged(lambda optimizer, _: copy.deepcopy(optimizer))
    ),
    "descent written in training_step": (ALL, FIRST, MOVED, stepped(descend)),
    "descent written with foreach": (ALL, FIRST, MOVED, stepped(descend_in_foreach)),
    "descent written in a hook of backward": (ALL, FIRST, MOVED, in_backward(lambda _: descend_alone)),
    "an optimizer that is none of torch's": (ALL, FIRST, MOVED, stepped(own(unhooked))),
    "an optimizer of an unknown class": (ALL, "planning", UNKNOWN, returned(by_hand)),
    "an own one of an unknown class": (ALL, FIRST, UNKNOWN, stepped(own(by_hand))),
    "lr from an attribute": ("lr", FIRST, UNREAD, declared("lr")),
    "eps from an attribute": ("eps", FIRST, UNREAD, declared("eps")),
    "decay from an attribute": ("decay", FIRST, UNREAD, declared("weight_decay")),
    "lr times the size of a weight, as LAMB's": ("lr", FIRST, UNREAD, own_numbers(factor=lambda p: float(p.norm()))),
    "lr over the root of a weight's columns": ("lr", FIRST, UNREAD, own_numbers(factor=lambda p: p.shape[1] ** -0.5)),
    "eps that no group has": ("eps", FIRST, UNREAD, own_numbers(eps=1e-3)),
    "decay that no group has": ("decay", FIRST, UNREAD, own_numbers(decay=0.1)),
    "penalty on weights, in hooks": ("multiplier", FIRST, "The multiplier of the", penalized),
    "penalty on weights, folded": ("multiplier", FIRST, "The plan has put", lambda: penalized(residual="fold")),
    "update written in optimizer_step": (ALL, FIRST, MOVED, in_optimizer_step),
    "weights tied after the first step": ("lr", FIRST, EXCHANGED, after_batches(tied)),
    "weight_norm after the first step": ("lr", FIRST, EXCHANGED, after_batches(normed)),
    "decay written beside the optimizer": (
        "decay", FIRST, CHANGED_IN, at("on_after_backward", decay_all, optimizer=undecayed)
    ),
    "readout in no optimizer, moved by hand": (ALL, FIRST, MOVED, at("on_after_backward", move_readout, optimizer=partly)),
    "readout in no optimizer, moved after the batch": (ALL, FIRST, MOVED, after_batches(move_readout, partly)),
    "LBFGS": ("lr", "planning", "LBFGS cannot", returned(lambda m: optim.LBFGS(m.parameters()))),
    "one rate for all groups": (
        "lr", "planning", "OneRate estimates", returned(lambda m: OneRate(m.parameters()), family="adamw")
    ),
    "without Optimizer.__init__": (ALL, "planning", "Bare has not called", returned(Bare, family="sgd")),
}  # fmt: skip
_WARNED: dict[str, tuple[str, str, Callable[[], Run]]] = {
    "weights clamped before the second batch": ("std", CHANGED, at("on_train_batch_start", clamp, 1)),
    "weights clamped after the batch": ("std", CHANGED, after_batches(clamp)),
    "weights clamped in a hook after the step": ("std", CHANGED, returned(limited)),
    "weights added to gradients": ("decay", PART, at("on_after_backward", add_weights)),
    "weights added to folded gradients": ("decay", PART, at("on_after_backward", add_weights, residual="fold")),
    "decay written after the batch": ("decay", CHANGED, after_batches(decay_all, undecayed)),
    "readout made anew after the first step": (ALL, IDLE, after_batches(made_anew)),
    "readout in no optimizer": (ALL, IDLE, returned(partly)),
    "folded gradients clipped by hand, which does not bind": ("multiplier", GRADIENTS, clipped_by_hand(1e6)),
    "folded gradients clipped by hand": ("multiplier", GRADIENTS, clipped_by_hand()),
    "SAM that climbs, folded": (
        "multiplier", "Weights are moved in the first step", returned(lambda m: Climbing(adamw(m)), residual="fold")
    ),
}  # fmt: skip
UPDATES = {
    **{name: Fault(ALL, plant, None) for name, plant in _RIGHT.items()},
    **{name: Fault(loses, plant, stops, words) for name, (loses, stops, words, plant) in _STOPPED.items()},
    **{name: Fault(loses, plant, None, words) for name, (loses, words, plant) in _WARNED.items()},
}
