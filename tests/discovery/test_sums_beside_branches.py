"""Sums beside branches need 1/n: what is added to a stream in every block, and what is read at several depths and summed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlu_lightning import Plan

INPUTS = torch.linspace(-1, 1, 15).reshape(5, 3), torch.linspace(0, 1, 10).reshape(5, 2)
Run = Callable[[Any, Tensor, Tensor], Any]
Added = Callable[[int, Tensor], Tensor]


class Net(nn.Module):
    """Blocks, and parts of their own for each, between a stem and a readout; ``run`` says how they are put together."""

    def __init__(self, depth: int, size: int, run: Run) -> None:
        super().__init__()
        self.depth, self.run, self.hidden = depth, run, nn.Linear(size, 9)
        self.embed, self.readout, self.time = nn.Linear(3, size), nn.Linear(size, 4), nn.Linear(2, size)
        for name, sizes in (("blocks", (size, 9, size)), ("heads", (size, 4)), ("times", (2, size, size))):
            self.add_module(name, nn.ModuleList(self.maps(*sizes) for _ in range(depth)))
        self.weights, self.tables = nn.Parameter(torch.ones(depth)), nn.Parameter(torch.ones(depth, size))

    @staticmethod
    def maps(first: int, *sizes: int) -> nn.Sequential:
        norm = nn.Identity() if first == 2 else nn.LayerNorm(first)
        if len(sizes) == 1:
            return nn.Sequential(norm, nn.Linear(first, sizes[0]))
        return nn.Sequential(norm, nn.Linear(first, sizes[0]), nn.ReLU(), nn.Linear(*sizes))

    def forward(self, x: Tensor, time: Tensor) -> Any:
        return self.run(self, self.embed(x), time)

    def depths(self, x: Tensor) -> list[Tensor]:
        """The stream after every block."""
        found = []
        for block in self.blocks:
            found.append(x := x + block(x))
        return found

    def read(self, x: Tensor) -> list[Tensor]:
        return [head(h) for head, h in zip(self.heads, self.depths(x), strict=True)]

    def before(self, x: Tensor, what: Added) -> Any:
        begin = x
        for number, block in enumerate(self.blocks):
            x = x + what(number, begin)
            x = x + block(x)
        return self.readout(x)

    def between(self, x: Tensor, what: Added) -> Any:
        begin = x
        for number, block in enumerate(self.blocks):
            x = x + what(number, begin) + block(x)
        return self.readout(x)

    def after(self, x: Tensor, what: Added) -> Any:
        begin = x
        for number, block in enumerate(self.blocks):
            x = x + block(x) + what(number, begin)
        return self.readout(x)


def once(made: Tensor) -> Added:
    return lambda number, begin: made


Numbers = dict[str, tuple[float, ...]]
# with l = 4 and d = 2: multiplier, std, lr of AdamW and SGD. What the multiplier and AdamW's lr change, l times, is of
# the base's size; gradients are those of the output by the multiplier, l times where a weight is shared
HEADS: Numbers = {"heads.7.0.weight": (1, 1, 1, 8), "heads.7.1.weight": (1 / 8, 1, 1, 8)}
HEADS |= {"heads.7.1.bias": (1, 1 / 4, 1 / 4, 1 / 4)}
MEAN: Numbers = {"heads.7.1.weight": (1 / 2, 1, 1, 8), "heads.7.1.bias": (1, 1, 1, 4)}
WEIGHTS: Numbers = {"weights": (1, 1 / 4, 1 / 4, 1 / 4)}
TIME: Numbers = {"time.weight": (1, 1 / 4, 1 / 4, 1 / 8)}
ONE: Numbers = {"readout.weight": (1 / 8, 1, 1, 2), "readout.bias": (1, 1 / 4, 1 / 4, 1 / 16)}
SOFTMAX: Numbers = {"weights": (1, 1, 1, 4), "readout.weight": (1 / 2, 1, 1, 2)}
CASES: dict[str, tuple[Run, Numbers]] = {
    "heads": (lambda n, x, t: sum(n.read(x)), HEADS),
    "mean": (lambda n, x, t: torch.stack(n.read(x)).mean(0), MEAN),
    "weighed": (lambda n, x, t: torch.stack(n.read(x), -1) @ n.weights, HEADS | {"weights": (1, 1, 1, 4)}),
    "one head": (lambda n, x, t: sum(map(n.readout, n.depths(x))), ONE),
    "of a sum": (lambda n, x, t: n.readout(sum(n.depths(x))), {"readout.weight": (1 / 8, 1, 1, 8)}),
    "of a mean": (
        lambda n, x, t: n.readout(torch.stack(n.depths(x)).mean(0)),
        {"readout.weight": (1 / 2, 1, 1, 8), "readout.bias": (1, 1, 1, 1)},
    ),
    "of a weighed sum": (
        lambda n, x, t: n.readout(sum(w * h for w, h in zip(n.weights, n.depths(x), strict=True))),
        WEIGHTS | {"readout.weight": (1 / 2, 1, 1, 2)},
    ),
    "of a softmax": (
        lambda n, x, t: n.readout(torch.einsum("lnd,l->nd", torch.stack(n.depths(x)), n.weights.softmax(0))),
        SOFTMAX,
    ),
    "of a normed sum": (
        lambda n, x, t: n.readout(torch.layer_norm(sum(n.depths(x)), x.shape[1:])),
        {"readout.weight": (1 / 2, 1, 1, 2)},
    ),
    "tables": (lambda n, x, t: n.before(x, lambda i, _: n.tables[i]), {"tables": (1, 1 / 4, 1 / 4, 1 / 2)}),
    "one time": (lambda n, x, t: n.before(x, once(n.time(t))), TIME),
    "one time, between": (lambda n, x, t: n.between(x, once(n.time(t))), TIME),
    "times": (
        lambda n, x, t: n.before(x, lambda i, _: n.times[i](t)),
        {"times.7.1.weight": (1, 1, 1, 8), "times.7.3.weight": (1, 2**-0.5 / 4, 1 / 8, 1 / 4)},
    ),
    "begin": (lambda n, x, t: n.after(x, lambda i, begin: n.weights[i] * begin), WEIGHTS),
    "begin, between": (lambda n, x, t: n.between(x, lambda i, begin: n.weights[i] * begin), WEIGHTS),
}


@pytest.mark.parametrize("name", CASES)
def test_a_sum_of_n_has_a_factor_of_1_over_n(name: str) -> None:
    run, expected = CASES[name]
    plan = Plan.from_model(Net(8, 16, run), INPUTS, base=Net(2, 8, run))
    found = {m.name: factor for m, factor in plan.forward_factors.items() if m.kind == "readout"}
    adam, sgd = plan.scales("adamw"), plan.scales("sgd")
    numbers = {n: (found.get(n, 1.0), adam[n].std, adam[n].lr, sgd[n].lr) for n in expected}
    assert numbers == {name: pytest.approx(values) for name, values in expected.items()}
    assert {branch.hidden for branch in plan.branches} == {9} and plan.streams[0].depth == 8


BARE: dict[str, Run] = {
    "before": lambda n, x, t: n.before(x, lambda _, begin: begin),
    "between": lambda n, x, t: n.between(x, lambda _, begin: begin),
    "after": lambda n, x, t: n.after(x, lambda _, begin: begin),
    "a constant": lambda n, x, t: n.before(x, once(torch.ones(5, 1))),
    "dense": lambda n, x, t: n.readout(sum(n.depths(x)).relu()),
}


@pytest.mark.parametrize("name", BARE)
def test_a_sum_that_no_parameter_carries_is_refused_unless_its_number_stays(name: str) -> None:
    base, module, wide = (Net(depth, size, BARE[name]) for depth, size in ((2, 8), (8, 8), (2, 16)))
    plan = Plan.from_model(wide, INPUTS, base=base)
    with pytest.raises(ValueError, match=r"beside its branches, 8 times .* and the base 2 times"):
        Plan.from_model(module, INPUTS, base=plan)


def test_a_sum_that_the_module_divides_by_its_number_is_planned() -> None:
    base, module = (Net(n, 8, lambda n, x, t: n.before(x, lambda _, b: b / n.depth)) for n in (2, 8))
    assert set(Plan.from_model(module, INPUTS, base=base).forward_factors.values()) == {1 / 4}  # of branches


def test_gains_on_the_stream_and_on_what_is_added_are_settled_by_the_override_that_is_suggested() -> None:
    def run(net: Net, x: Tensor, time: Tensor) -> Any:
        begin = x
        for gains, block in zip(net.tables, net.blocks, strict=True):
            x = gains[0] * x + gains[1] * begin
            x = x + block(x)
        return net.readout(x)

    base, module = (Net(depth, 8, run) for depth in (2, 8))
    with pytest.raises(ValueError, match=r'"tables": "stream_norm \(post_norm\)"'):
        Plan.from_model(module, INPUTS, base=base)
    plan = Plan.from_model(module, INPUTS, base=base, overrides={"tables": "stream_norm (post_norm)"})
    assert plan.scales("adamw")["tables"].lr == pytest.approx(1 / 4, rel=0.2)
