"""Runs in which something happens on purpose, and what has to be true of module and optimizer afterwards."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn, optim

from helpers import runs_by_hand
from helpers.paper_network import stream_of
from helpers.parameter_groups import MULTIPLIERS
from helpers.runs_by_hand import SHAPE, Net
from mlu_lightning.application.multipliers import residual_state

LR, DECAY = 0.02, 0.1
PROBE = next(iter(runs_by_hand.data(0, 6)))
STEPS = 8  # of a fit, in two epochs


class Storable(Net):  # trains with SGD; nothing in it is bound to another object than itself, so that it can be pickled
    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 6

    def optimizer(self, parameters: Any) -> Any:
        return optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=DECAY)


class Watched(Storable):  # keeps its optimizers, so that they can be looked at afterwards
    def __init__(self) -> None:
        super().__init__()
        self.made: list[optim.Optimizer] = []

    def optimizer(self, parameters: Any) -> Any:
        self.made.append(super().optimizer(parameters))
        return self.made[-1]


class At(Callback):  # does something in a hook, once, when so many steps were made
    def __init__(self, hook: str, do: Callable[[Trainer, Any], Any], step: int = 3) -> None:
        def act(run: Trainer, module: LightningModule, *args: Any, **kwargs: Any) -> None:
            if run.global_step >= step and not self.done:
                self.done = True
                do(run, module)

        self.done = False
        setattr(self, hook, act)


def fit(module: LightningModule, *callbacks: Callback, **settings: Any) -> Trainer:
    return runs_by_hand.fit(module, *callbacks, **{"max_epochs": 2, "limit_val_batches": 0, **settings})


def own_hooks(module: nn.Module) -> int:
    hooks = [h for part in module.modules() for h in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())]
    return sum(type(hook).__module__.startswith("mlu_lightning") for hook in hooks)


def expected_hooks(residual: str) -> int:
    """One for each branch and one for the readout, where they are not folded."""
    return SHAPE[0] + 1 if residual == "hook" else 0


def check_module(module: Net, residual: str) -> None:
    """Methods are the module's own, and its multipliers are on once."""
    assert not {"setup", "configure_model", "configure_optimizers"} & vars(module).keys()
    state = residual_state(module)
    assert state is not None and state.mode == residual
    assert own_hooks(module) == expected_hooks(residual)
    branch, readout = (MULTIPLIERS["branch_out"], MULTIPLIERS["readout"]) if residual == "hook" else (1.0, 1.0)
    x = torch.ones(1, 3)
    expected = readout * stream_of(module.state_dict(), x, branch)[-1] @ module.readout.weight.T
    torch.testing.assert_close(Net.forward(module, x), expected)


def check_optimizer(optimizer: optim.Optimizer) -> None:
    """Groups hold the numbers of the user and his scheduler, also in an update."""
    seen: list[Any] = []
    optimizer._optimizer_step_pre_hooks.clear()
    optimizer._optimizer_step_post_hooks.clear()
    optimizer.register_step_post_hook(lambda own, *_: seen.extend(own.param_groups))
    del optimizer.param_groups[1:]  # what a fault has added
    optimizer.step()
    (group,) = seen
    assert group is optimizer.param_groups[0]
    assert group["lr"] in [LR * 0.5**epoch for epoch in range(3)]
    assert (group["weight_decay"], len(group["params"])) == (DECAY, 2 * SHAPE[0] + 2)
