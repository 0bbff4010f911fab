"""Recurrent and state-space branches are refused with that reason, and nothing else is taken for one."""

import re
from typing import Any

import pytest
import torch
import transformers
from helpers.architectures import LANGUAGE, TOKENS, VOCABULARY
from helpers.architectures.language import TOKENIZER
from helpers.residual_networks import Net
from torch import Tensor, nn

from mlu_lightning import Plan, discover

_SCAN = "a state is multiplied and added to step by step"
_DECAY = "a state decays by the exponential of a cumulative sum"
_HIDDEN = {"hidden_size": 16, "num_hidden_layers": 2}
_MAMBA_2 = {**_HIDDEN, "state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
_GRIFFIN = _HIDDEN | {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
_GRIFFIN |= {"lru_width": 16, "attention_window_size": 8, "block_types": ["recurrent", "attention"]}


@pytest.mark.parametrize(
    ("name", "numbers", "branch", "how"),
    [
        ("Mamba", {**_HIDDEN, "state_size": 4, "time_step_rank": 2}, "backbone.layers.0.mixer and 1 more", _SCAN),
        ("Mamba2", _MAMBA_2, "backbone.layers.0.mixer and 1 more", _DECAY),
        ("Rwkv", {**_HIDDEN, "context_length": 16}, "rwkv.blocks.0.attention and 1 more", _SCAN),
        ("RecurrentGemma", _GRIFFIN, "model.layers.0.temporal_block", _SCAN),
    ],
)
def test_state_space_models_are_refused(name: str, numbers: dict[str, Any], branch: str, how: str) -> None:
    config = getattr(transformers, f"{name}Config")(**TOKENIZER, **numbers)
    module = getattr(transformers, f"{name}ForCausalLM")(config)
    message = f"has recurrent or state-space branches, which the theory does not cover: {branch} ({how})."
    with pytest.raises(ValueError, match=f"^{re.escape(f'{name}ForCausalLM {message}')}"):
        Plan.from_model(module, LANGUAGE)


class Recurrent(nn.Module):  # A recurrent layer in a residual branch
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.norm, self.write = nn.LayerNorm(8), nn.Linear(12, 8)
        self.layer = nn.GRUCell(8, 12) if kind == "cell" else getattr(nn, kind)(8, 12, batch_first=True)

    def forward(self, tokens: Tensor) -> Any:
        h = self.embed(tokens)
        x = self.norm(h)
        if isinstance(self.layer, nn.GRUCell):
            states = [x.new_zeros(len(x), 12)]
            for step in x.unbind(1):
                states.append(self.layer(step, states[-1]))
            made = torch.stack(states[1:], 1)
        else:
            made, _ = self.layer(x)
        return self.out(h + self.write(made))


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("LSTM", r"it calls \w*(Lstm|Rnn)\w*"),
        ("GRU", "layer.weight_hh_l0 is applied to its own output"),
        ("cell", "layer.weight_hh is applied to its own output"),
    ],
)
def test_recurrent_layers_are_refused(kind: str, how: str) -> None:
    with pytest.raises(ValueError, match=rf"Recurrent has recurrent or state-space branches.* \({how}\)"):
        discover(Recurrent(kind), TOKENS)


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
    assert not structure.unassigned
    assert structure.roles["layers.2.weight"] == "branch_hidden" and structure.roles["write.weight"] == "branch_out"
