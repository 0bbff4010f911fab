"""Faults that lose a std or a multiplier: who draws weights again, and when, and what becomes of hooks."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import nn

from helpers.faulty_runs import At
from helpers.planted_runs import Fault, Module, Run, at, plan, run
from mlu_lightning import attach_multipliers


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
    found["frozen as they are drawn, trained from the start"] = Fault(
        "std", frozen_at_first, None, "Parameters are trained"
    )
    found["frozen, drawn and trained before the first step"] = Fault(
        "std", partial(drawn_while_frozen, 0), "first step", CHANGED
    )
    found["frozen, drawn, and trained later"] = Fault(
        "std", partial(drawn_while_frozen, 1), None, "Parameters are trained"
    )
    for hook, stops in (("on_fit_start", "start"), ("on_train_batch_start", "first step")):
        for what, exchange in (("weight_norm", normed), ("weights tied", tied)):
            planted = partial(drawn_in, hook, exchange)
            found[f"{what} in {hook} of the module"] = Fault("std, lr", planted, stops, "Parameters were planned that")
    return {**found, "xavier in the first training_step": late}


def drawn_while_frozen(step: int) -> Run:
    planted = run()
    planted.after += [
        At("on_fit_start", lambda trainer, module: module.blocks.requires_grad_(False), 0),
        At("on_train_start", lambda trainer, module: nn.init.normal_(module.blocks[0].write.weight, std=0.5), 0),
        At("on_train_batch_start", lambda trainer, module: module.blocks.requires_grad_(True), step),
    ]
    return planted


def normed(module: Module) -> None:
    nn.utils.parametrizations.weight_norm(module.blocks[1].read)


def tied(module: Module) -> None:
    module.blocks[1].write.weight = module.blocks[0].write.weight


def frozen_at_first() -> Run:
    planted = drawn_in("on_fit_start", lambda module: module.blocks.requires_grad_(True))
    planted.module.blocks.requires_grad_(False)
    return planted


# Ways to lose a multiplier


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


def routed(readout: Callable[[Module, Any, Any], Any]) -> Run:
    """The readout is computed in another way when training goes on."""
    planted = run()

    def forward(x: torch.Tensor) -> torch.Tensor:
        stream = planted.module.embed(x)
        for block in planted.module.blocks:
            stream = stream + block(stream)
        direct = planted.module.embed(x)
        for block in planted.module.blocks:
            direct = direct + block.forward(direct)
        return readout(planted.module, stream, direct)

    planted.after.append(At("on_fit_start", lambda *_: vars(planted.module).__setitem__("forward", forward), 0))
    return planted


UNSEEN = "The multiplier of the"
MULTIPLIERS = {
    "hooks cleared": Fault("multiplier", at("on_fit_start", clear_hooks), "first step", UNSEEN),
    "forward called directly": Fault(
        "multiplier", at("on_fit_start", lambda m: setattr(m, "direct", True)), "first step", UNSEEN
    ),
    "part exchanged, weights kept": Fault("multiplier", at("on_fit_start", copy_part), "first step", UNSEEN),
    "readout's weights used beside it": Fault(
        "multiplier",
        partial(routed, lambda m, stream, _: m.readout(stream) + nn.functional.linear(stream, m.readout.weight)),
        "first step",
        "The multiplier of the readout 'readout.weight' is not on all",
    ),
    "forward called directly in a second pass": Fault(
        "multiplier",
        partial(routed, lambda m, stream, direct: m.readout(stream + direct)),
        "first step",
        "The multiplier of the branch 'blocks.0' is not on all",
    ),
    "attached twice, after an interruption": Fault("multiplier", interrupted, None, ""),
    "part exchanged with its weights": Fault(
        "multiplier, std",
        at("on_fit_start", lambda m: setattr(m, "readout", nn.Linear(16, 2, bias=False))),
        "start",
        CHANGED,
    ),
}
