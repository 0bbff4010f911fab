"""Recurrence in time inside of branches: rows, fans, units and states by hand, from the theory and the models' source."""

import re
from typing import Any

import pytest
import torch
from helpers.architectures import LANGUAGE, TOKENS, VOCABULARY
from helpers.recurrences import hugging_face
from helpers.residual_networks import Net
from torch import Tensor, nn

from mlu_lightning import Plan, attach_multipliers, discover, scale_optimizer

_HIDDEN = {"hidden_size": 16, "num_hidden_layers": 2}
_HYBRID = _HIDDEN | {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
_SSD = _HIDDEN | {"state_size": 4, "num_heads": 4, "head_dim": 8, "chunk_size": 8}
_GATES = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 6}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}


# units, entries of a unit's state, and of parameters the row, the fans, and whether rows for other things are not counted
CASES: dict[str, tuple[str, dict[str, Any], int, int, str]] = {
    "mamba": (  # x_proj makes the step's bottleneck, B and C
        *("Mamba", {**_HIDDEN, "state_size": 4, "time_step_rank": 2}, 32, 4),
        """in_proj.weight branch_in 16 64, x_proj.weight branch_bounded_matrix 32 10, dt_proj.weight branch_hidden 2 32,
        dt_proj.bias branch_in_bias 1 32, A_log branch_in_bias 1 128, D branch_in_bias 1 32,
        conv1d.weight branch_in_bias 1 32, out_proj.weight branch_out 32 16""",
    ),
    "mamba 2": (  # in_proj makes gates, values and steps, and B and C of two groups; a state is head_dim times state_size
        *("Mamba2", {**_SSD, "n_groups": 2}, 4, 32),
        """in_proj.weight branch_in 16 68 mixed, conv1d.weight branch_in_bias 1 32 mixed, A_log branch_in_bias 1 4,
        dt_bias branch_in_bias 1 4, norm.weight branch_in_bias 1 32, out_proj.weight branch_out 32 16""",
    ),
    "rwkv": (  # time_mix_key is over coordinates of the stream
        *("Rwkv", {**_HIDDEN, "context_length": 16}, 16, 1),
        """time_mix_key branch_norm 1 16, key.weight branch_in 16 16, receptance.weight branch_in 16 16,
        time_decay branch_in_bias 1 16, output.weight branch_out 16 16""",
    ),
    "griffin": (  # gates are of each head
        "RecurrentGemma",
        {**_HYBRID, "lru_width": 16, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
        *(16, 1),
        """linear_x.weight branch_in 16 16, rg_lru.recurrent_param branch_in_bias 1 16,
        rg_lru.input_gate_weight branch_hidden 8 16, linear_out.weight branch_out 16 16""",
    ),
    "gated delta rule": (  # one gain for all heads
        "Qwen3Next",
        {**_HYBRID, **_GATES, **_EXPERTS, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
        *(4, 24),
        """in_proj_qkvz.weight branch_in 16 64, in_proj_ba.weight branch_in 16 8, A_log branch_in_bias 1 4,
        norm.weight branch_bounded 1 6, out_proj.weight branch_out 24 16""",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_of_recurrent_branches(name: str) -> None:
    model, numbers, hidden, state, by_hand = CASES[name]
    expected = {suffix: row for suffix, _, row in (line.strip().partition(" ") for line in by_hand.split(","))}
    structure = discover(hugging_face(model, vocab_size=VOCABULARY, **numbers), LANGUAGE)
    branch = structure.branches[0]
    assert (branch.kind, branch.hidden, branch.head_dim, structure.unassigned) == ("recurrence", hidden, state, {})
    found = {n: f for n, f in structure.parameters.items() if n.startswith(f"{branch.name}.")}
    rows = {n: f"{f.row} {f.fan_in} {f.fan_out}{' mixed' * f.mixed}" for n, f in found.items()}
    assert {suffix: rows[f"{branch.name}.{suffix}"] for suffix in expected} == expected


def test_rows_of_two_roles_have_adams_rate_alone() -> None:
    """With twice the heads, B and C would have half the learning rate of the other rows with SGD."""
    base, wide, deep = (
        hugging_face("Mamba2", **{**_SSD, "n_groups": 1} | grown)
        for grown in ({}, {"num_heads": 8, "expand": 4}, {"num_hidden_layers": 4})
    )
    plan = Plan.from_model(wide, LANGUAGE, base=base)
    name = "backbone.layers.0.mixer.in_proj.weight"
    assert (plan.scales("adamw")[name].lr, plan.scales("adamw")[name].eps) == (1.0, 0.5)
    scale_optimizer(torch.optim.AdamW(wide.parameters()), wide, plan)
    scale_optimizer(torch.optim.Adam(wide.parameters()), wide, plan)
    for optimizer in (torch.optim.SGD(wide.parameters()), torch.optim.Adam(wide.parameters(), weight_decay=0.1)):
        with pytest.raises(
            ValueError, match=r"Some rows of backbone.layers.0.mixer.\w+.weight make hidden units and others what all"
        ):
            scale_optimizer(optimizer, wide, plan)
    plan = Plan.from_model(deep, LANGUAGE, base=base)
    attach_multipliers(deep, plan)
    scale_optimizer(torch.optim.SGD(deep.parameters()), deep, plan)


@pytest.mark.parametrize("grown", [{"state_size": 8}, {"head_dim": 16, "expand": 4}])
def test_states_of_another_size_are_refused(grown: dict[str, int]) -> None:
    base, module = (hugging_face("Mamba2", **{**_SSD, "n_groups": 1} | more) for more in ({}, grown))
    message = (
        r"The state of a unit of backbone\.layers\.0\.mixer has 64 entries .* and the base's has 32\..*number of heads"
    )
    with pytest.raises(ValueError, match=message):
        Plan.from_model(module, LANGUAGE, base=base)


class Recurrent(nn.Module):
    """A recurrent layer in a residual branch."""

    def __init__(self, kind: str, hidden: int = 12, embedding: int = 8) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(VOCABULARY, embedding), nn.Linear(embedding, VOCABULARY)
        self.norm = nn.LayerNorm(embedding)
        self.write = nn.Identity() if kind == "no output" else nn.Linear(hidden, embedding)
        self.layer: Any = nn.GRUCell(embedding, hidden) if kind == "cell" else None
        if self.layer is None:
            layer = nn.GRU if kind == "GRU" else nn.LSTM
            self.layer = layer(embedding, embedding if kind == "no output" else hidden, batch_first=True)

    def forward(self, tokens: Tensor) -> Any:
        h = self.embed(tokens)
        return self.out(h + self.write(self.made(self.norm(h))))

    def made(self, x: Tensor) -> Any:
        if not isinstance(self.layer, nn.GRUCell):
            return self.layer(x)[0]
        states = [x.new_zeros(len(x), 12)]
        for step in x.unbind(1):
            states.append(self.layer(step, states[-1]))
        return torch.stack(states[1:], 1)


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("no output", 4), ("GRU", 3), ("cell", 3)])
def test_recurrent_layers_in_branches(kind: str, gates: int) -> None:
    structure = discover(Recurrent(kind), TOKENS)
    hidden = 8 if kind == "no output" else 12
    found = {re.sub(r"layer\.|_l0", "", n): (f.row, f.fan_in, f.fan_out) for n, f in structure.parameters.items()}
    assert found["weight_ih"] == ("branch_in", 8, gates * hidden)
    assert found["weight_hh"] == ("branch_hidden", hidden, gates * hidden)
    assert found["bias_ih"] == found["bias_hh"] == ("branch_in_bias", 1, gates * hidden)
    (branch,) = structure.branches
    assert (branch.kind, branch.hidden, structure.unassigned) == ("recurrence", hidden, {})
    assert branch.site is not None and branch.folds == (() if kind == "no output" else ("write.bias", "write.weight"))


class OnStream(nn.Module):
    """A recurrent layer between two residual branches."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.read = nn.Linear(3, 8), nn.Linear(8, 2)
        self.rnn = getattr(nn, kind)(8, 8, batch_first=True)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        x = self.rnn(x + self.blocks[0](x))[0]
        return self.read(x + self.blocks[1](x))


@pytest.mark.parametrize("overrides", [None, {"rnn.*": "stream_matrix"}])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_layers_outside_of_branches_are_refused(kind: str, overrides: dict[str, str] | None) -> None:
    with pytest.raises(
        ValueError, match="OnStream has a recurrent layer outside of every residual branch: rnn "
    ) as error:
        Plan.from_model(OnStream(kind), torch.ones(2, 5, 3), overrides=overrides)
    assert "overrides={" not in str(error.value)


def test_gates_and_polynomials_are_no_recurrence() -> None:
    def gated(net: Net, tokens: Tensor) -> Any:
        h = net.embed(tokens)
        x = net.blocks(h)
        for gate, layer in zip(net.gates, net.layers, strict=True):
            weight = torch.sigmoid(gate(x))
            x = weight * torch.tanh(layer(x)) + (1 - weight) * x
        value = net.coefficients[0] * x
        for coefficient in net.coefficients[1:]:
            value = (value + coefficient) * x
        return net.out(h + net.write(value.cumsum(1)))

    parts: dict[str, Any] = {
        "blocks": nn.Linear(8, 12),
        "embed": nn.Embedding(VOCABULARY, 8),
        "write": nn.Linear(12, 8),
    }
    parts |= {name: nn.ModuleList(nn.Linear(12, 12) for _ in range(4)) for name in ("gates", "layers")}
    structure = discover(Net(gated, coefficients=nn.Parameter(torch.ones(5)), **parts), TOKENS)
    assert not structure.unassigned and structure.branches[0].kind == "mlp"
    assert structure.roles["layers.2.weight"] == "branch_hidden" and structure.roles["write.weight"] == "branch_out"
