"""Sums beside branches need 1/n: what is added to a stream in every block, and what is read at several depths and summed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mlu_lightning import Plan

INPUTS = torch.linspace(-1, 1, 15).reshape(5, 3), torch.linspace(0, 1, 10).reshape(5, 2)


class Net(nn.Module):
    """Blocks, and parts of their own for each, between a stem and a readout; ``run`` says how they are put together."""

    def __init__(self, depth: int, size: int, run: Callable[..., Tensor], **parts: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.depth, self.run = depth, run
        self.embed, self.readout, self.time = nn.Linear(3, size), nn.Linear(size, 4), nn.Linear(2, size)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 9), nn.ReLU(), nn.Linear(9, size)) for _ in range(depth)
        )
        for name, part in parts.items():
            self.add_module(name, nn.ModuleList(part(size) for _ in range(depth)))
        self.weights = nn.Parameter(torch.ones(depth))
        self.tables = nn.Parameter(torch.ones(depth, size))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.run(self, self.embed(x), time)

    def depths(self, x: Tensor) -> list[Tensor]:
        """The stream after every block."""
        found = []
        for block in self.blocks:
            x = x + block(x)
            found.append(x)
        return found


def added(net: Net, x: Tensor, what: Callable[[int, Tensor], Tensor]) -> Tensor:
    begin = x
    for number, block in enumerate(net.blocks):
        x = x + what(number, begin)
        x = x + block(x)
    return net.readout(x)


def added_after(net: Net, x: Tensor, what: Callable[[int, Tensor], Tensor]) -> Tensor:
    begin = x
    for number, block in enumerate(net.blocks):
        x = x + block(x) + what(number, begin)
    return net.readout(x)


def added_between(net: Net, x: Tensor, what: Callable[[int, Tensor], Tensor]) -> Tensor:
    begin = x
    for number, block in enumerate(net.blocks):
        x = x + what(number, begin) + block(x)
    return net.readout(x)


class Same:
    """The same for every block."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __call__(self, number: int, begin: Tensor) -> Tensor:
        return self.value


def own_times(net: Net, x: Tensor, time: Tensor) -> Tensor:
    return added(net, x, lambda number, _: net.own[number](time))


def mean(found: list[Tensor]) -> Tensor:
    return torch.stack(found).mean(0)


HEAD = {"heads": lambda size: nn.Linear(size, 4)}
NORMED_HEAD = {"heads": lambda size: nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 4))}
# with l = 4 and d = 2: multiplier, std, lr of AdamW and SGD. What the multiplier and AdamW's lr change, l times, is of
# the base's size; gradients are those of the output by the multiplier, l times where a weight is shared
HEADS = {"heads.7.weight": (1 / 8, 1, 1, 8), "heads.7.bias": (1, 1 / 4, 1 / 4, 1 / 4)}
WEIGHTS = {"weights": (1, 1 / 4, 1 / 4, 1 / 4)}
CASES: dict[str, tuple[Callable[..., Tensor], dict[str, Callable[[int], nn.Module]], dict[str, tuple[float, ...]]]] = {
    "heads": (lambda n, x, t: sum(head(h) for head, h in zip(n.heads, n.depths(x), strict=True)), HEAD, HEADS),
    "heads, their mean": (
        lambda n, x, t: mean([head(h) for head, h in zip(n.heads, n.depths(x), strict=True)]),
        HEAD,
        {"heads.7.weight": (1 / 2, 1, 1, 8), "heads.7.bias": (1, 1, 1, 4)},
    ),
    "heads with norms": (
        lambda n, x, t: sum(head(h) for head, h in zip(n.heads, n.depths(x), strict=True)),
        NORMED_HEAD,
        {"heads.7.0.weight": (1, 1, 1, 8), "heads.7.1.weight": (1 / 8, 1, 1, 8)},
    ),
    "heads, weighed": (
        lambda n, x, t: torch.stack([h(s) for h, s in zip(n.heads, n.depths(x), strict=True)], -1) @ n.weights,
        HEAD,
        HEADS | {"weights": (1, 1, 1, 4)},
    ),
    "one head": (
        lambda n, x, t: sum(map(n.readout, n.depths(x))),
        {},
        {"readout.weight": (1 / 8, 1, 1, 2), "readout.bias": (1, 1 / 4, 1 / 4, 1 / 16)},
    ),
    "one head of a sum": (
        lambda n, x, t: n.readout(sum(n.depths(x))),
        {},
        {"readout.weight": (1 / 8, 1, 1, 8), "readout.bias": (1, 1, 1, 1)},
    ),
    "one head of a mean": (lambda n, x, t: n.readout(mean(n.depths(x))), {}, {"readout.weight": (1 / 2, 1, 1, 8)}),
    "one head of a sum with weights": (
        lambda n, x, t: n.readout(sum(w * h for w, h in zip(n.weights, n.depths(x), strict=True))),
        {},
        WEIGHTS | {"readout.weight": (1 / 2, 1, 1, 2)},
    ),
    "one head of a softmax": (
        lambda n, x, t: n.readout(torch.einsum("lnd,l->nd", torch.stack(n.depths(x)), n.weights.softmax(0))),
        {},
        {"weights": (1, 1, 1, 4), "readout.weight": (1 / 2, 1, 1, 2)},
    ),
    "one head of a normed sum": (
        lambda n, x, t: n.readout(torch.layer_norm(sum(n.depths(x)), n.embed.weight.shape[:1])),
        {},
        {"readout.weight": (1 / 2, 1, 1, 2)},
    ),
    "tables": (
        lambda n, x, t: added(n, x, lambda i, _: n.tables[i]),
        {},
        {"tables": (1, 1 / 4, 1 / 4, 1 / 2)},
    ),
    "times": (
        lambda n, x, t: added(n, x, Same(n.time(t))),
        {},
        {"time.weight": (1, 1 / 4, 1 / 4, 1 / 8)},
    ),
    "times, between": (
        lambda n, x, t: added_between(n, x, Same(n.time(t))),
        {},
        {"time.weight": (1, 1 / 4, 1 / 4, 1 / 8)},
    ),
    "own times": (
        own_times,
        {"own": lambda size: nn.Sequential(nn.Linear(2, size), nn.SiLU(), nn.Linear(size, size))},
        {"own.7.0.weight": (1, 1, 1, 8), "own.7.2.weight": (1, 2**-0.5 / 4, 1 / 8, 1 / 4)},
    ),
    "the beginning": (lambda n, x, t: added_after(n, x, lambda i, begin: n.weights[i] * begin), {}, WEIGHTS),
    "the beginning, between": (lambda n, x, t: added_between(n, x, lambda i, b: n.weights[i] * b), {}, WEIGHTS),
}


@pytest.mark.parametrize("name", CASES)
def test_a_sum_of_n_has_a_factor_of_1_over_n(name: str) -> None:
    run, parts, expected = CASES[name]
    base, module = (Net(depth, size, run, **parts) for depth, size in ((2, 8), (8, 16)))
    plan = Plan.from_model(module, INPUTS, base=base)
    found = {m.name: factor for m, factor in plan.forward_factors.items() if m.kind == "readout"}
    adam, sgd = plan.scales("adamw"), plan.scales("sgd")
    numbers = {n: (found.get(n, 1.0), adam[n].std, adam[n].lr, sgd[n].lr) for n in expected}
    assert numbers == {name: pytest.approx(values) for name, values in expected.items()}
    assert {branch.hidden for branch in plan.branches} == {9} and plan.streams[0].depth == 8


BARE: dict[str, Callable[..., Tensor]] = {
    "before": lambda n, x, t: added(n, x, lambda _, begin: begin),
    "between": lambda n, x, t: added_between(n, x, lambda _, begin: begin),
    "after": lambda n, x, t: added_after(n, x, lambda _, begin: begin),
    "a constant": lambda n, x, t: added(n, x, lambda *_: torch.ones(5, 1)),
    "dense": lambda n, x, t: n.readout(sum(n.depths(x)).relu()),
}


@pytest.mark.parametrize("name", BARE)
def test_a_sum_that_no_parameter_carries_is_refused_unless_its_number_stays(name: str) -> None:
    base, module, wide = (Net(depth, size, BARE[name]) for depth, size in ((2, 8), (8, 8), (2, 16)))
    with pytest.raises(ValueError, match="multiply what it adds by 1 over that number"):
        Plan.from_model(module, INPUTS, base=base)
    plan = Plan.from_model(wide, INPUTS, base=base)
    with pytest.raises(ValueError, match=r"beside its branches, 8 times .* and the base 2 times"):
        Plan.from_model(module, INPUTS, base=plan)


def test_a_sum_that_the_module_divides_by_its_number_is_planned() -> None:
    base, module = (Net(n, 8, lambda n, x, t: added(n, x, lambda _, b: b / n.depth)) for n in (2, 8))
    assert set(Plan.from_model(module, INPUTS, base=base).forward_factors.values()) == {1 / 4}  # of branches


def test_gains_on_the_stream_and_on_what_is_added_are_settled_by_the_override_that_is_suggested() -> None:
    def run(net: Net, x: Tensor, time: Tensor) -> Tensor:
        begin = x
        for gains, block in zip(net.tables, net.blocks, strict=True):
            x = gains[0] * x + gains[1] * begin
            x = x + block(x)
        return net.readout(x)

    base, module = (Net(depth, 8, run) for depth in (2, 8))
    with pytest.raises(ValueError, match="could not be placed") as refused:
        Plan.from_model(module, INPUTS, base=base)
    assert '"tables": "stream_norm (post_norm)"' in str(refused.value)
    plan = Plan.from_model(module, INPUTS, base=base, overrides={"tables": "stream_norm (post_norm)"})
    assert plan.scales("adamw")["tables"].lr == pytest.approx(1 / 4, rel=0.2)
