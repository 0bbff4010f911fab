"""Optimizers that lose an lr, an eps or a decay, or look as if they did."""

from typing import Any

import torch
from torch import optim

from helpers.planted_runs import NUMBERS, Module


class ByHand(optim.Optimizer):
    """AdamW in one line for each number, which come from where they should, or from elsewhere."""

    def __init__(self, parameters: Any, elsewhere: str = "", **numbers: float) -> None:
        super().__init__(parameters, numbers)
        self.kept = {key: value for key, value in numbers.items() if key == elsewhere}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            lr, eps, decay = ({**group, **self.kept}[key] for key in NUMBERS)
            for p in group["params"]:
                state = self.state[p]
                count = state["count"] = state.get("count", 0) + 1
                one = state["one"] = state.get("one", 0) * 0.9 + 0.1 * p.grad
                two = state["two"] = state.get("two", 0) * 0.999 + 0.001 * p.grad**2
                p.mul_(1 - lr * decay)
                p.sub_(lr * (one / (1 - 0.9**count)) / ((two / (1 - 0.999**count)).sqrt() + eps))
        return loss


class OwnNumbers(optim.Optimizer):
    """Moves along the sign of gradients, by numbers of its own besides the learning rate of its groups."""

    def __init__(self, parameters: Any, factor: Any = lambda p: 1, eps: float = 1e-12, decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": 0.02})
        self.own = factor, eps, decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss, (factor, eps, decay) = closure and torch.enable_grad()(closure)(), self.own
        for lr, parameters in [(group["lr"], group["params"]) for group in self.param_groups]:
            for p in parameters:
                p.mul_(1 - lr * decay).sub_(lr * factor(p) * p.grad / (p.grad.abs() + eps))
        return loss


class Climbing(optim.Optimizer):
    """SAM as it is, with AdamW inside."""

    def __init__(self, inner: optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        closure()
        self.move(0.01)
        loss = closure()
        self.move(-0.01)
        self.inner.step()
        return loss

    def move(self, distance: float) -> None:
        for parameter in self.inner.param_groups[0]["params"]:
            parameter.data += distance


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
