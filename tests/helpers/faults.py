"""Faults planted in a fit: ways to lose a std, a multiplier, an lr, an eps or a decay, and where each of them stops.

``python -m helpers.faults``, in ``tests/``, prints the table of them.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn, optim
from torch.optim.sgd import sgd

from helpers.faulty_runs import PROBE, At
from helpers.runs_by_hand import BASE, Net, fit
from mlu_lightning import MLUCallback, Plan, attach_multipliers

NUMBERS = {"lr": 0.02, "eps": 1e-3, "weight_decay": 0.1}
STEPS = 3
PLACES = ("planning", "start", "first step", "second step")


class Module(Net):
    """Trains with AdamW as its optimizer, or by hand."""

    def __init__(self, step: Callable[[Any, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.step, self.direct, self.automatic_optimization = step, False, step is None

    def training_step(self, batch: list[Tensor]) -> Any:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        if self.step is not None:
            self.zero_grad()
            self.step(self, loss)
        return loss

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embed(x)
        for block in self.blocks:
            stream = stream + (block.forward(stream) if self.direct else block(stream))
        return self.readout(stream)

    def configure_optimizers(self) -> Any:
        return optim.AdamW(self.parameters(), **NUMBERS)


@dataclass
class Run:
    """What is given to ``fit``."""

    module: Module
    before: list[Callback]  # MLUCallback
    after: list[Callback]
    settings: dict[str, Any]  # of MLUCallback


def run(step: Any = None, optimizer: Any = ..., **settings: Any) -> Run:
    """A run without a fault, in which an optimizer may be configured that is not AdamW."""
    module = Module(step)
    if optimizer is not ...:
        vars(module)["configure_optimizers"] = lambda: optimizer and optimizer(module)
    return Run(module, [], [], settings)


@dataclass(frozen=True)
class Fault:
    """What is lost, how it is planted, where it stops, None if it does no harm, and the beginning of the message."""

    loses: str
    plant: Callable[[], Run]
    stops: str | None
    words: str = ""


@cache
def plan() -> Plan:
    with isolate_rng():
        return Plan.from_model(Net(), PROBE, base=Net(BASE))


def outcome(plant: Callable[[], Run]) -> tuple[str | None, str, Module]:
    """Where a run stops, with which message, and the module as it is then."""
    planted, reached, said = plant(), ["planning"], [""]

    def reach(hook: str, place: str) -> Callback:
        return At(hook, lambda trainer, module: reached.append(place), 0)

    class Steps(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            reached.append("first step" if batch_idx == 0 else "second step")

    settings = {"plan": plan(), **planted.settings}
    callbacks = [Steps(), reach("on_fit_start", "start"), *planted.before, MLUCallback(**settings), *planted.after]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit(planted.module, *callbacks, max_epochs=1, limit_train_batches=STEPS, limit_val_batches=0)
        except (ValueError, TypeError, RuntimeError) as error:
            return reached[-1], str(error), planted.module
    said += [str(each.message) for each in caught if "Parameters of the plan" in str(each.message)]
    return None, said[-1], planted.module


@cache
def right() -> Module:
    """The run that is meant."""
    where, message, module = outcome(run)
    assert (where, message) == (None, "")
    return module


def is_right(module: Module) -> bool:
    """Whether a run has ended where the run that is meant has."""
    return all(
        torch.allclose(one, other, rtol=1e-4, atol=1e-6)
        for one, other in zip(module.parameters(), right().parameters(), strict=True)
    )


# Ways to lose a std: who draws, and when


def xavier(module: nn.Module) -> None:
    torch.manual_seed(11)
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_normal_(part.weight)


def one_matrix(module: Module) -> None:
    nn.init.normal_(module.blocks[2].write.weight, 0.0, 0.02)


def pretrained(module: Module) -> None:
    module.load_state_dict({name: torch.randn_like(value) for name, value in module.state_dict().items()})


def through_data(module: Module) -> None:
    module.blocks[1].read.weight.data = torch.randn_like(module.blocks[1].read.weight)


def depth_scaled(module: Module) -> None:
    """As GPT-2 scales what writes to its stream."""
    for block in module.blocks:
        block.write.weight.data *= len(module.blocks) ** -0.5


def as_built(module: Module) -> None:
    for block in module.blocks:
        block.read.reset_parameters()


DRAWS = (xavier, one_matrix, pretrained, through_data, depth_scaled, as_built)


def drawn_in(hook: str, draw: Callable[[Module], None], by: str = "module", **settings: Any) -> Run:
    planted = run(**settings)
    if by == "module":
        method = getattr(planted.module, hook)

        @wraps(method)
        def drawing(*args: Any) -> Any:
            if not planted.module.losses:
                draw(planted.module)
            return method(*args)

        vars(planted.module)[hook] = drawing
    else:
        callback = At(hook, lambda trainer, module: draw(module), 0)
        (planted.before if by == "before" else planted.after).append(callback)
    return planted


def of_weights(**places: Any) -> dict[str, Fault]:
    found = {}
    for label, (hook, draw, by, settings, stops, words) in places.items():
        found[label] = Fault("std", partial(drawn_in, hook, draw, by, **settings), stops, words)
    return found


CHANGED = "Initial weights that MLUCallback has set were changed before the first step: "
HOOKS = {"configure_optimizers": "start", "on_fit_start": "start", "on_train_start": "first step"}
HOOKS |= {"on_train_epoch_start": "first step", "on_train_batch_start": "first step"}


def faults_of_weights() -> dict[str, Fault]:
    found: dict[str, Fault] = {}
    for number, draw in enumerate(DRAWS):
        label = draw.__name__.replace("_", " ")
        for hook, stops in HOOKS.items():
            if draw is xavier or number % len(HOOKS) == [*HOOKS].index(hook):
                found[f"{label} in {hook} of the module"] = Fault("std", partial(drawn_in, hook, draw), stops, CHANGED)
        hook, by = (
            ("setup", "after"),
            ("on_fit_start", "after"),
            ("on_fit_start", "before"),
            ("on_train_start", "after"),
        )[number % 4]
        stops = "first step" if hook == "on_train_start" else "start"
        found[f"{label} in {hook} of a callback, {by}"] = Fault(
            "std", partial(drawn_in, hook, draw, by), stops, CHANGED
        )
    folded = partial(drawn_in, "on_fit_start", pretrained, "after", residual="fold")
    found["plain weights loaded after they were folded"] = Fault("std, multiplier", folded, "start", CHANGED)
    late = Fault(
        "std", partial(drawn_in, "training_step", xavier), "first step", "Weights have changed in the first step"
    )
    return {**found, "xavier in the first training_step": late}


# Ways to lose a multiplier


def at_start(do: Callable[[Module], Any], **settings: Any) -> Run:
    planted = run(**settings)
    planted.after.append(At("on_fit_start", lambda trainer, module: do(module), 0))
    return planted


def clear_hooks(module: Module) -> None:
    for part in module.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()


def copy_part(module: Module) -> None:
    """With the same weights, in another class."""
    plain = nn.Linear(*module.readout.weight.shape[::-1], bias=False)
    plain.weight = module.readout.weight
    module.readout = plain


def interrupted() -> Run:
    planted = run()
    attach_multipliers(planted.module, plan())
    vars(planted.module).pop("_mlu_applied")  # before the module was marked
    return planted


UNSEEN = "The multiplier of the"
MULTIPLIERS = {
    "hooks cleared": Fault("multiplier", partial(at_start, clear_hooks), "first step", UNSEEN),
    "forward called directly": Fault(
        "multiplier", partial(at_start, lambda m: setattr(m, "direct", True)), "first step", UNSEEN
    ),
    "part exchanged, weights kept": Fault("multiplier", partial(at_start, copy_part), "first step", UNSEEN),
    "attached twice, after an interruption": Fault(
        "multiplier", interrupted, "planning", "There are multipliers in the module"
    ),
    "part exchanged with its weights": Fault(
        "multiplier, std",
        partial(at_start, lambda m: setattr(m, "readout", nn.Linear(16, 2, bias=False))),
        "start",
        CHANGED,
    ),
}


# Ways to lose lr, eps and decay: who updates, how, and with what


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


class ByHand(optim.Optimizer):
    """AdamW in one line for each number, which come from where they should, or from elsewhere."""

    def __init__(self, parameters: Any, elsewhere: str = "", **numbers: float) -> None:
        super().__init__(parameters, numbers)
        self.kept = {key: value for key, value in numbers.items() if key == elsewhere}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            lr, eps, decay = (self.kept[key] if key in self.kept else group[key] for key in NUMBERS)
            for p in group["params"]:
                state = self.state[p]
                count = state["count"] = state.get("count", 0) + 1
                one = state["one"] = state.get("one", 0) * 0.9 + 0.1 * p.grad
                two = state["two"] = state.get("two", 0) * 0.999 + 0.001 * p.grad**2
                p.mul_(1 - lr * decay)
                p.sub_(lr * (one / (1 - 0.9**count)) / ((two / (1 - 0.999**count)).sqrt() + eps))
        return loss


class NoOptimizer:
    """The same, and no ``torch.optim.Optimizer``."""

    def __init__(self, module: Module) -> None:
        self.inner = ByHand([nn.Parameter(torch.zeros(()))], **NUMBERS)
        self.inner.param_groups[0]["params"] = [*module.parameters()]

    def step(self) -> None:
        type(self.inner).step.__wrapped__(self.inner)


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

    def decay(trainer: Any, module: Module) -> None:
        for parameter in module.parameters():
            parameter.data.mul_(1 - 0.002)

    planted.after.append(At("on_after_backward", decay, 0))
    return planted


class Bare(optim.Optimizer):
    """Has not called ``Optimizer.__init__``."""

    def __init__(self, module: Module) -> None:
        self.param_groups, self.state, self.defaults = [{"params": [*module.parameters()], "lr": 0.02}], {}, {}

    def step(self, closure: Any = None) -> Any:
        return closure and closure()


class OneRate(ByHand):
    """Estimates one learning rate for all of its groups, as Prodigy and D-Adaptation do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, **NUMBERS, d=1e-6, growth_rate=float("inf"), k=0)


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


ALL = "lr, eps, decay"
MOVED = "Weights have moved in the first steps, but in no update of an optimizer that is scaled: "
CHANGED_IN = "Weights have changed in the first step"
UNREAD = "An optimizer has updated"
UNKNOWN = "How "
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
    "decay written beside the optimizer": Fault("decay", decay_by_hand, "first step", CHANGED_IN),
    "readout in no optimizer, moved by hand": Fault(ALL, lambda: partly(move_readout), "first step", MOVED),
    "readout in no optimizer": Fault(ALL, lambda: partly(None), None, "Parameters of the plan belong to no optimizer"),
    "LBFGS": Fault("lr", lambda: run(optimizer=lambda m: optim.LBFGS(m.parameters())), "planning", "LBFGS cannot"),
    "one rate for all groups": Fault(
        "lr", lambda: run(optimizer=lambda m: OneRate(m.parameters()), family="adamw"), "planning", "OneRate estimates"
    ),
    "without Optimizer.__init__": Fault(ALL, lambda: run(optimizer=Bare, family="sgd"), "planning", "Bare has not called"),
}  # fmt: skip

FAULTS: dict[str, Fault] = {**faults_of_weights(), **MULTIPLIERS, **UPDATES}


def markdown() -> str:
    """The table of all faults, with where each of them stops, and how many are found."""
    lines = ["| fault | loses | stops | message |", "|---|---|---|---|"]
    missed = 0
    for name, fault in FAULTS.items():
        where, message, module = outcome(fault.plant)
        if where is None and (is_right(module) or message):
            where = "goes on with a warning" if message else "is the run that is meant"
        elif where in (None, "second step"):
            where, missed = f"**missed** {'' if where is None else where}", missed + 1
        lines.append(f"| {name} | {fault.loses} | {where} | {message.splitlines()[0][:64] if message else ''} |")
    return "\n".join(
        [*lines, "", f"{len(FAULTS) - missed} of {len(FAULTS)} faults do no harm or are found in the first step."]
    )


if __name__ == "__main__":
    print(markdown())
