"""Hooks that an error interrupts as they are exchanged: the module is the function that it was, and takes them again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.faulty_runs import PROBE, own_hooks
from helpers.interruptions import Injection
from helpers.runs_by_hand import BASE, Net
from torch import nn

from mlu_lightning.application.applied import residual_state
from mlu_lightning.application.multipliers import attach_multipliers, fold
from mlu_lightning.planning.plan import Plan

X = torch.linspace(-1, 1, 6).reshape(2, 3)


def attach(module: nn.Module, plan: Plan) -> None:
    attach_multipliers(module, plan)


CASES: dict[str, tuple[Callable[[nn.Module, Plan], Any] | None, Callable[[nn.Module, Plan, Any], object]]] = {
    "attach": (None, lambda module, plan, _: attach(module, plan)),
    "remove": (attach_multipliers, lambda module, plan, handle: handle.remove()),
    "fold": (attach_multipliers, lambda module, plan, _: fold(module, plan)),
}


@pytest.mark.parametrize("name", CASES)
def test_interrupted_exchange_of_hooks(name: str) -> None:
    first, change = CASES[name]
    plan = Plan.from_model(Net(), PROBE, base=Net(BASE))

    def begun() -> tuple[Net, Any]:
        module = Net()
        return module, first and first(module, plan)

    module, handle = begun()
    before = module(X)
    counted = Injection(["application/hooks.py"])
    assert counted.run(lambda: change(module, plan, handle)) is None
    after, hooks = module(X), own_hooks(module)
    assert (name == "fold") == torch.allclose(before, after)
    points = [(line, time) for line, count in counted.counts.items() for time in {1, count}]
    assert len(points) > 20
    for point in points[::4]:
        module, handle = begun()
        had = own_hooks(module)
        injection = Injection(["application/hooks.py"], point, KeyboardInterrupt())
        assert isinstance(injection.run(lambda: change(module, plan, handle)), KeyboardInterrupt)  # noqa: B023
        assert injection.happened
        assert torch.equal(module(X), before) and own_hooks(module) == had
        assert (residual_state(module) is None) == (first is None)
        assert "_mlu_unfinished" not in vars(module)
        change(module, plan, handle)  # and it can be made
        assert torch.equal(module(X), after) and own_hooks(module) == hooks
