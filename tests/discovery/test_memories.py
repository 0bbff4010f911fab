"""Tables that are looked up inside of branches, as the values of a memory with keys: written, or read by matrices."""

import pytest
import torch
from torch import Tensor, nn

from mlu_lightning import Plan


class Memory(nn.Module):
    """A softmax over the best of some keys weighs vectors of a table, which are added, or go through a matrix first."""

    def __init__(self, depth: int, size: int, units: int | None) -> None:
        super().__init__()
        self.embed, self.readout = nn.Linear(3, size), nn.Linear(size, 2)
        self.queries = nn.ModuleList(nn.Linear(size, 4) for _ in range(depth))
        self.keys = nn.ParameterList(nn.Parameter(torch.randn(9, 4)) for _ in range(depth))
        self.values = nn.ModuleList(nn.EmbeddingBag(9, units or size, mode="sum") for _ in range(depth))
        self.write = nn.ModuleList(nn.Linear(units, size) if units else nn.Identity() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for queries, keys, values, write in zip(self.queries, self.keys, self.values, self.write, strict=True):
            weights, found = (queries(x) @ keys.T).topk(3, -1)
            x = x + write(values(found, per_sample_weights=weights.softmax(-1)))
        return self.readout(x)


@pytest.mark.parametrize(("row", "units"), [("branch_out_bias", None), ("branch_in_bias", 7)])
def test_values_of_a_memory_are_vectors_of_the_stream_or_of_units(row: str, units: int | None) -> None:
    base, module = Memory(2, 8, units), Memory(8, 16, units and 21)
    plan = Plan.from_model(module, (torch.ones(5, 3),), base=base)
    found = plan.parameters["values.7.weight"].row, plan.scales("adamw")["values.7.weight"].lr
    assert found == (row, 1)
    assert plan.scales("sgd")["values.7.weight"].lr == pytest.approx(4 * (3 if units else 2))  # l·m, or l·d
    assert plan.scales("adamw")["queries.7.weight"].lr == pytest.approx(1 / 2)
    assert {m.value for m in plan.multipliers if m.kind == "branch"} == {1 / 4}
