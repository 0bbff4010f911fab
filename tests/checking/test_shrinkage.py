"""What weight decay takes away in a step, and that no trace of the trial steps is left."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from mlu_lightning.checking.shrinkage import shrinkage


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda p: torch.optim.SGD(p, 0.5, momentum=0.9, weight_decay=0.1), 0.05),
        (lambda p: torch.optim.AdamW(p, 0.5, weight_decay=0.1), 0.05),
        (lambda p: torch.optim.AdamW(p, 0.5, weight_decay=0.0), None),
        (lambda p: torch.optim.Adam(p, 0.5, weight_decay=0.0), None),
    ],
)
def test_shrinkage_is_lr_times_decay_and_leaves_no_trace(build: Any, expected: float | None) -> None:
    torch.manual_seed(0)
    weight, zero = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.zeros(3))
    optimizer = build([weight, zero])
    weight.grad, zero.grad = torch.randn(4, 3), torch.zeros(3)
    optimizer.step()
    before, gradient = weight.detach().clone(), weight.grad
    states = copy.deepcopy(optimizer.state_dict())
    found = shrinkage([optimizer], {"weight": weight, "zero": zero})
    assert found == ({} if expected is None else {"weight": pytest.approx(expected, rel=1e-5)})
    assert torch.equal(weight, before) and weight.grad is gradient
    torch.testing.assert_close(optimizer.state_dict(), states, rtol=0, atol=0)


class Counting(torch.optim.AdamW):
    """Keeps a counter in its groups, as fused and schedule-free optimizers do, and makes shorter and shorter steps."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        group["k"] = group.get("k", 0) + 1
        group["lr"], given = group["lr"] / group["k"], group["lr"]
        super().step(closure)
        group["lr"] = given


def test_counters_in_groups_go_back() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = Counting([weight], lr=0.5, weight_decay=0.1)
    (group,) = optimizer.param_groups
    optimizer.step()
    found = shrinkage([optimizer], {"weight": weight})
    assert found == {"weight": pytest.approx(0.5 / 2 * 0.1, rel=1e-5)} and group["k"] == 1
    del group["k"]
    shrinkage([optimizer], {"weight": weight})
    assert "k" not in group
    group["weight_decay"] = 0.0
    assert shrinkage([optimizer], {"weight": weight}) == {}
