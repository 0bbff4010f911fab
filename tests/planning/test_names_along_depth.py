"""Blocks whose number is a part of their name, beside those of an ``nn.ModuleList``."""

import pytest
from helpers.residual_networks import Block, Net, X
from torch import nn

from mlu_lightning import Plan


def network(name: str, depth: int, width: int = 8) -> Net:
    blocks = nn.ModuleDict({name.format(i): Block(hidden=2 * width) for i in range(depth)})
    module = Net(lambda net, x: net.out(nn.Sequential(*net.blocks.values())(net.embed(x))), adds=True)
    for block in blocks.values():
        assert isinstance(block, Block)
        block.adds = True
    module.blocks = blocks  # type: ignore[assignment]
    return module


@pytest.mark.parametrize("name", ["encoder_layer_{}", "block{}", "h_{}", "layer{}_attn"])
@pytest.mark.parametrize("depths", [(2, 12), (4, 2)])
def test_blocks_named_by_their_number_grow_in_depth(name: str, depths: tuple[int, int]) -> None:
    base, depth = depths
    plan, usual = (Plan.from_model(network(each, depth, 16), X, base=network(each, base)) for each in (name, "{}"))
    assert [*plan.scales("adamw").values()] == [*usual.scales("adamw").values()]
    assert [b.base_hidden for b in plan.branches] == [16] * depth
    assert {m.value for m in plan.multipliers if m.kind == "branch"} == {base / depth}


def test_a_part_that_the_base_does_not_have_is_no_block() -> None:
    module, base = network("block{}", 2), network("block{}", 2)
    module.blocks["extra"] = Block(adds=True)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"blocks\.extra\.read\.weight has no counterpart in the base"):
        Plan.from_model(module, X, base=base)
