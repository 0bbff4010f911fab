"""Rows that follow from what reads a parameter's outputs: one block or all, each unit or all of them, a stage of its own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlu_lightning import Plan, discover

TOKENS = torch.linspace(-1, 1, 36).reshape(2, 6, 3)


class Net(nn.Module):
    """Blocks that are given the stream and, if they are ``timed``, a time; between a stem and a readout."""

    def __init__(self, blocks: list[nn.Module], size: int, timed: bool = False) -> None:
        super().__init__()
        self.embed, self.blocks, self.readout = nn.Linear(3, size), nn.ModuleList(blocks), nn.Linear(size, 2)
        self.time = nn.Linear(4, size) if timed else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x) if time is None else block(x, time if self.time is None else self.time(time))
        return self.readout(x)


class Timed(nn.Module):
    """A branch that is modulated by a time, which ``own`` embeds for this block alone."""

    def __init__(self, size: int, own: bool) -> None:
        super().__init__()
        self.own = nn.Linear(4, size) if own else nn.Identity()
        self.gate, self.up, self.down = nn.Linear(size, 16), nn.Linear(size, 16), nn.Linear(16, size)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu() * self.gate(self.own(time).tanh())[:, None])


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_what_is_made_of_data_for_one_block_has_the_gradient_of_that_block(own: bool, depth: int) -> None:
    base, module = (
        Net([Timed(size, own) for _ in range(blocks)], size, not own) for blocks, size in ((depth, 4), (6, 8))
    )
    inputs = TOKENS, torch.ones(2, 4)
    sgd = Plan.from_model(module, inputs, base=base).scales("sgd")
    # gradients are 1/d at what all blocks read, and 1/(l·d) at what one block does (theory.md, section 3)
    expected = {f"blocks.{i}.own.weight": 2 * 6 / depth for i in range(6)} if own else {"time.weight": 2.0}
    assert {name: sgd[name].lr for name in expected} == expected


class Rows(nn.Module):
    """A branch whose first matrix has rows that are not the units' own: three gates for all, or one key and one value."""

    def __init__(self, size: int, heads: int, attends: bool) -> None:
        super().__init__()
        self.heads, self.attends = heads, attends
        self.read = nn.Linear(size, 4 * (heads + 2) if attends else 4 * heads + 3)
        self.write = nn.Linear(4 * heads, size)

    def forward(self, x: Tensor) -> Tensor:
        if not self.attends:
            units, gates = self.read(x).split([4 * self.heads, 3], -1)
            return x + self.write(units.relu() * gates.softmax(-1)[..., :1])
        parts = self.read(x).view(*x.shape[:2], self.heads + 2, 4)
        queries, key, value = parts[:, :, :-2], parts[:, :, [-2]], parts[:, :, [-1]]
        weights = (queries.transpose(1, 2) @ key.permute(0, 2, 3, 1) / 2).softmax(-1)
        return x + self.write((weights @ value.transpose(1, 2)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("attends", [True, False])
def test_rows_that_all_units_share_do_not_count_as_units(attends: bool) -> None:
    base, module = (Net([Rows(8, heads, attends)] * 2, 8) for heads in (2, 6))
    plan = Plan.from_model(module, (TOKENS,), base=base)
    entry = plan.parameters["blocks.0.read.weight"]
    assert entry.ratios.outputs == 3 and entry.differs_by_row


class BlockDiagonal(nn.Module):
    """Units in groups of four, each with a matrix of its own."""

    def __init__(self, size: int, groups: int) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(size, 4 * groups), nn.Linear(4 * groups, size)
        self.mix = nn.Parameter(torch.randn(groups, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        units = self.read(x).unflatten(-1, (-1, 4))
        return x + self.write(torch.einsum("btgi,gij->btgj", units, self.mix).flatten(2).relu())


def test_a_block_diagonal_matrix_makes_the_units_of_all_blocks() -> None:
    facts = discover(Net([BlockDiagonal(8, 3)], 8), (TOKENS,)).parameters["blocks.0.mix"]
    assert (facts.row, facts.fan_in, facts.fan_out) == ("branch_hidden", 4, 12)


class Wide(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def staged(blocks: int, size: int) -> nn.Module:
    """Two stages whose blocks are numbered throughout."""
    stages = [Wide(size) for _ in range(blocks)], [Wide(2 * size) for _ in range(blocks)]
    layers = [nn.Linear(3, size), *stages[0], nn.Linear(size, 2 * size), *stages[1], nn.Linear(2 * size, 2)]
    return nn.Sequential(*layers)


def test_blocks_of_a_stage_have_their_counterparts_in_that_stage() -> None:
    plan = Plan.from_model(staged(3, 8), (TOKENS,), base=staged(1, 4))
    ratios = {name: entry.ratios for name, entry in plan.parameters.items() if name.endswith("up.weight")}
    assert len(ratios) == 6 and {(each.inputs, each.outputs) for each in ratios.values()} == {(2.0, 2.0)}
    assert {branch.hidden / branch.base_hidden for branch in plan.branches} == {2.0}


class Pooled(nn.Module):
    """A block that halves the tokens, on its shortcut by the larger one of two."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm, self.skip = nn.LayerNorm(size), nn.Linear(size, 2 * size)
        self.up, self.down = nn.Linear(size, 16), nn.Linear(16, 2 * size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        pooled = self.skip(x).unflatten(1, (-1, 2)).amax(2)
        return pooled + self.down(self.up(x).unflatten(1, (-1, 2)).amax(2).relu())


def test_a_shortcut_may_take_the_largest_of_several_tokens() -> None:
    structure = discover(nn.Sequential(nn.Linear(3, 8), Wide(8), Pooled(8), Wide(16), nn.Linear(16, 2)), (TOKENS,))
    assert structure.depth == 3
    rows = {name: structure.parameters[f"2.{name}.weight"].row for name in ("skip", "up", "down")}
    assert rows == {"skip": "stream_matrix", "up": "branch_in", "down": "branch_out"}


class Relative(nn.Module):
    """Attention with keys that a matrix makes of sines of distances, as those of Transformer-XL."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(size, size, bias=False) for _ in range(3))
        self.positions, self.write = nn.Linear(size, size, bias=False), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        heads: Callable[[Tensor], Tensor] = lambda t: t.unflatten(-1, (-1, 4)).transpose(-2, -3)  # noqa: E731
        sines = (torch.arange(6.0)[:, None] / torch.arange(1.0, x.shape[-1] + 1)).sin()
        queries, keys = heads(self.queries(x)), heads(self.keys(x))
        logits = queries @ keys.mT + queries @ heads(self.positions(sines)).mT
        made = (logits / 2).softmax(-1) @ heads(self.values(x))
        return x + self.write(made.transpose(1, 2).flatten(2))


def test_a_matrix_of_sines_of_positions_reads_as_many_as_the_stream_has_coordinates() -> None:
    facts = discover(Net([Relative(8)], 8), (TOKENS,)).parameters["blocks.0.positions.weight"]
    assert (facts.row, facts.fan_in, facts.fan_out, facts.function) == ("branch_in", 8, 8, None)


class Overwritten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.ones(1)
        branch = self.linear(F.layer_norm(x, (8,))) * state
        state.add_(1)  # autograd keeps what it multiplied by, and could not use it any more
        return x + branch


def test_what_was_changed_in_place_after_it_was_used_is_not_asked_for() -> None:
    assert discover(Net([Overwritten()], 8), (TOKENS,)).depth == 1
