"""Optimizers in others, and those that nobody gave to scale_optimizer: their updates are those of groups by hand."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.parameter_groups import ADAM_LR, EPS, Weights, identical, plan_of
from helpers.updates import groups_of
from lightning.fabric import Fabric
from torch import nn, optim
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from mlu_lightning import scale_optimizer
from mlu_lightning.application.optimization import Scaled
from mlu_lightning.application.own_optimizers import Optimizers

NUMBERS = {"lr": 0.1, "eps": 0.01, "weight_decay": 0.1}
STEPS = 3


class Sam(optim.Optimizer):
    """Climbs, and steps from where it was; its groups are its inner optimizer's, or its own."""

    def __init__(self, parameters: Any, shared: bool = True, kept: bool = True, **numbers: float) -> None:
        super().__init__(parameters, {"rho": 0.05, **numbers})
        inner = optim.AdamW(self.param_groups, **numbers)
        if shared:
            self.param_groups = inner.param_groups
        if kept:
            self.inner = inner
        self.inner_step = lambda: inner.step()

    @torch.no_grad()
    def first_step(self) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.state[parameter]["old"] = parameter.clone()
            parameter.add_(parameter.grad, alpha=0.05)

    @torch.no_grad()
    def second_step(self) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            parameter.copy_(self.state[parameter]["old"])
        self.inner_step()

    def step(self, closure: Any = None) -> None:
        self.first_step()
        self.second_step()


class Lookahead(optim.Optimizer):
    """Goes a part of the way that its inner optimizer has gone in two steps."""

    def __init__(self, inner: Any) -> None:
        super().__init__([{**group} for group in inner.param_groups], {})
        self.inner, self.count = {"fast": inner}, 0
        self.slow = {p: p.detach().clone() for group in inner.param_groups for p in group["params"]}

    def step(self, closure: Any = None) -> None:
        self.inner["fast"].step(closure)
        self.count += 1
        for parameter, slow in self.slow.items() if self.count % 2 == 0 else ():
            slow.add_(parameter.detach() - slow, alpha=0.5)
            parameter.data.copy_(slow)


def adamw(parameters: Any) -> optim.AdamW:
    return optim.AdamW(parameters, **NUMBERS)


def sam(*args: Any, **how: bool) -> Callable[[Any], Sam]:
    return lambda parameters: Sam(parameters, *args, **NUMBERS, **how)


def lookahead(parameters: Any) -> Lookahead:
    return Lookahead(adamw(parameters))


def fabric(parameters: Any) -> Any:
    module = nn.Module()
    module.weights = nn.ParameterList(p for group in parameters for p in group["params"])
    return Fabric(accelerator="cpu", devices=1).setup(module, adamw(parameters))[1]


def in_one(parameters: Any) -> Any:
    """Two optimizers in a list of a third, as where Muon and AdamW are combined."""
    groups = list(parameters)
    outer = optim.Optimizer([{**group} for group in groups], {})
    outer.parts = [adamw(groups[:2]), adamw(groups[2:])]
    outer.__class__ = type("Both", (optim.Optimizer,), {"step": lambda self: [part.step() for part in self.parts]})
    return outer


def by_hand(name: str) -> dict[str, float]:
    lr = ADAM_LR[name]
    return {"lr": 0.1 * lr, "eps": 0.01 * EPS[name], "weight_decay": 0.1 / lr}


def step(optimizer: Any) -> None:
    optimizer.step()


def step_with_closure(optimizer: Any) -> None:
    optimizer.step(lambda: None)


def phases(optimizer: Any) -> None:
    optimizer.first_step()
    optimizer.second_step()


def train(make: Any, take: Any, hand: bool = False, scale: Any = None) -> Weights:
    module = Weights()
    groups = groups_of(module, by_hand) if hand else [{"params": [p]} for p in module.parameters()]
    optimizer = make(groups)
    if scale is not None:
        scale(optimizer, module)
    for number in range(STEPS):
        module.load_gradients(number)
        take(optimizer)
    return module


WRAPPED = {
    "sam": (sam(), step),
    "sam in two steps": (sam(), phases),
    "sam with groups of its own": (sam(shared=False), phases),
    "lookahead": (lookahead, step),
    "lookahead with a closure": (lookahead, step_with_closure),
    "fabric": (fabric, step),
    "two in one": (in_one, step),
}
NOT_GIVEN = {
    **WRAPPED,
    "plain": (adamw, step),
    "plain with a closure": (adamw, step_with_closure),
    "hidden": (sam(kept=False), phases),
    "hidden, with groups of its own": (sam(kept=False, shared=False), phases),
    "the class's step": (adamw, lambda optimizer: optim.AdamW.step(optimizer)),
    "kept before": (lambda groups: (lambda made: [made, made.step])(adamw(groups)), lambda pair: pair[1]()),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_optimizers_in_others_are_scaled(name: str) -> None:
    make, take = WRAPPED[name]
    handles: list[Scaled] = []

    def scale(optimizer: Any, module: Weights) -> None:
        handles.append(scale_optimizer(optimizer, module, plan_of(module)))

    assert identical(train(make, take, scale=scale), train(make, take, hand=True))
    assert {*handles[0].families} == {*ADAM_LR}
    handles[0].remove()
    assert not any("step" in vars(part.optimizer) for part in handles[0].parts)


@pytest.mark.parametrize("name", NOT_GIVEN)
def test_whoever_steps_is_scaled(name: str) -> None:
    make, take = NOT_GIVEN[name]
    ends: list[Any] = []

    def scale(optimizer: Any, module: Weights) -> None:
        optimizers = Optimizers(module, plan_of(module))
        optimizers.add_at_step()
        ends.append(optimizers.remove)
        others = nn.Linear(2, 2)  # optimizers of others are left alone
        optim.SGD(others.parameters()).step()
        assert not optimizers.parts

    try:
        assert identical(train(make, take, scale=scale), train(make, take, hand=True))
    finally:
        ends[0]()


def test_learning_rates_that_a_hook_before_the_step_sets_are_those_of_the_base() -> None:
    """With a closure and without, also where the hook was there before; and schedulers count steps."""
    for take in (step, step_with_closure):

        def scheduled(groups: Any) -> optim.AdamW:
            optimizer = adamw(groups)
            for group in optimizer.param_groups:
                group["start"] = group["lr"]

            def halve(own: optim.AdamW, *_: Any) -> None:
                for group in own.param_groups:
                    group["lr"] = group["start"] * 0.5 ** len(own.state)

            optimizer.register_step_pre_hook(halve)
            optim.lr_scheduler.StepLR(optimizer, 100)
            return optimizer

        scale = lambda optimizer, module: scale_optimizer(optimizer, module, plan_of(module))  # noqa: E731
        ours, theirs = train(scheduled, take, scale=scale), train(scheduled, take, hand=True)
        assert identical(ours, theirs)


def test_optimizers_without_groups_of_torch_are_refused() -> None:
    class Bare(optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            self.param_groups = [{"params": [*parameters], "lr": 0.1}]

    module = Weights()
    with pytest.raises(TypeError, match=r"Bare has not called Optimizer.__init__.*super\(\).__init__"):
        scale_optimizer(Bare(module.parameters()), module, plan_of(module), "sgd")


def test_a_module_that_nobody_gave_back_is_not_kept() -> None:
    """Torch has hooks of all optimizers for good, and a fit may end without a word to its callbacks."""
    gc.collect()  # what other tests have left
    before = dict(_global_optimizer_pre_hooks), dict(_global_optimizer_post_hooks)
    module = Weights()
    optimizers = Optimizers(module, plan_of(module))
    optimizers.add_at_step()
    optimizers.add(adamw([{"params": [*module.parameters()]}]))
    kept = weakref.ref(module)
    assert len(_global_optimizer_pre_hooks) == len(before[0]) + 1
    del module, optimizers
    gc.collect()
    assert kept() is None and (dict(_global_optimizer_pre_hooks), dict(_global_optimizer_post_hooks)) == before
