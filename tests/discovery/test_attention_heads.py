"""Attention whose heads or dimensions differ from the base's, how far its logits move, and roles of what heads have."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.architectures import LANGUAGE, VOCABULARY
from helpers.attentions import CASES, RTOL, hugging_face, logits_of, loss_of
from helpers.residual_networks import Net
from torch import Tensor, nn
from torch.nn import functional as F

from mlu_lightning import Plan, attach_multipliers, discover, initialize, scale_optimizer

FEATURES, D = torch.linspace(-1, 1, 120).reshape(3, 8, 5), 16


def _deepseek(heads: int, query_dim: int, value_dim: int) -> nn.Module:
    """Latent attention: keys and values of different dimensions from one matrix, a part of keys shared by heads."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": heads, "v_head_dim": value_dim}
    sizes |= {"qk_nope_head_dim": query_dim - 4, "qk_rope_head_dim": 4, "kv_lora_rank": 16, "first_k_dense_replace": 2}
    return hugging_face("DeepseekV3", q_lora_rank=None, **sizes)(4)


@pytest.mark.parametrize(
    ("heads", "query_dim", "value_dim", "m"), [(8, 12, 6, 2.0), (4, 20, 6, 1.0), (4, 12, 18, 3.0), (8, 20, 12, 4.0)]
)
def test_values_of_another_dimension_than_keys(heads: int, query_dim: int, value_dim: int, m: float) -> None:
    """The hidden width is that of what the output matrix reads, heads times value_dim; logits follow query_dim."""
    base, module = _deepseek(4, 12, 6), _deepseek(heads, query_dim, value_dim)
    plan = Plan.from_model(module, LANGUAGE, base=base)
    assert (plan.branches[0].hidden, plan.branches[0].head_dim) == (heads, query_dim)
    planned = plan.parameters["model.layers.0.self_attn.o_proj.weight"]
    assert (str(planned.role), planned.ratios.inputs) == ("branch_out", m)
    assert planned.fans[0] == heads * value_dim
    by_hand = copy.deepcopy(module)
    for layer in by_hand.model.layers:
        layer.self_attn.scaling = 12**-0.5 * 12 / query_dim
    expected = loss_of(by_hand, LANGUAGE)
    attach_multipliers(module, replace(plan, multipliers=tuple(logits_of(plan))))
    torch.testing.assert_close(loss_of(module, LANGUAGE), expected, rtol=RTOL, atol=0)
    assert bool(plan.warnings) == (query_dim != 12)


@pytest.mark.parametrize(("heads", "key_heads"), [(8, 4), (8, 2), (4, 4)])
def test_ratios_of_grouped_queries(heads: int, key_heads: int) -> None:
    """Hidden units are query heads for W_Q and W_O, and key heads for W_K and W_V, of which the base has 4 and 2."""
    build = hugging_face("Llama", num_attention_heads=heads, num_key_value_heads=key_heads)
    plan = Plan.from_model(build(8), LANGUAGE, base=CASES["llama"].build(8))
    ratios = {"q": (1.0, heads / 4), "k": (1.0, key_heads / 2), "v": (1.0, key_heads / 2), "o": (heads / 4, 1.0)}
    for part, (inputs, outputs) in ratios.items():
        planned = plan.parameters[f"model.layers.1.self_attn.{part}_proj.weight"]
        role = "branch_out" if part == "o" else "branch_in"
        assert (planned.role, planned.ratios.inputs, planned.ratios.outputs) == (role, inputs, outputs), part
    # n and g of theory.md, section 3: a key head's gradient is the sum over its group, 1/(l m) with m of key heads
    scales = plan.scales("sgd")
    assert scales["model.layers.1.self_attn.k_proj.weight"].lr == key_heads / 2
    assert scales["model.layers.1.self_attn.q_proj.weight"].lr == heads / 4
    assert logits_of(plan) == []


PARTS = "query", "key", "value"


class TwoBlocks(nn.Module):
    """Two residual attentions on tokens, with or without a norm of queries and keys, that keep their logits."""

    def __init__(self, head_dim: int, norm: bool) -> None:
        super().__init__()
        self.embed, self.readout = nn.Embedding(VOCABULARY, 64), nn.Linear(64, VOCABULARY, bias=False)
        self.blocks = nn.ModuleList(self._block(head_dim, norm) for _ in range(2))
        self.logits: list[Tensor] = []

    @staticmethod
    def _block(head_dim: int, norm: bool) -> nn.ModuleDict:
        parts: dict[str, nn.Module] = {"norm": nn.RMSNorm(64)}
        parts |= {part: nn.Linear(64, 4 * head_dim, bias=False) for part in PARTS}
        parts["out"] = nn.Linear(4 * head_dim, 64, bias=False)
        norms = {f"{part}_norm": nn.RMSNorm(head_dim) if norm else nn.Identity() for part in PARTS[:2]}
        return nn.ModuleDict(parts | norms)

    def forward(self, tokens: Tensor) -> Any:
        h = self.embed(tokens)
        self.logits.clear()
        for block in self.blocks:
            x = block["norm"](h)
            query, key, value = (block[part](x).unflatten(-1, (4, -1)).transpose(1, 2) for part in PARTS)
            logits = block["query_norm"](query) @ block["key_norm"](key).mT * query.shape[-1] ** -0.5
            self.logits.append(logits)
            h = h + block["out"]((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return self.readout(h)


def _moved(head_dim: int, norm: bool, multiplied: bool) -> float:
    """Root mean square by which attention logits have changed after ten steps of AdamW."""
    tokens = torch.randint(VOCABULARY, (32, 16), generator=torch.Generator().manual_seed(7))
    tokens[:, 8:] = tokens[:, :8]
    changes = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        base, module = TwoBlocks(16, norm), TwoBlocks(head_dim, norm)
        plan = Plan.from_model(module, (tokens,), base=base)
        initialize(module, plan, "normal", seed=seed)
        if not multiplied:
            plan = replace(plan, multipliers=tuple(m for m in plan.multipliers if m.kind != "logits"))
        attach_multipliers(module, plan)
        optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.0)
        scale_optimizer(optimizer, module, plan)
        seen = []
        for _ in range(11):
            output = module(tokens)
            seen.append(torch.stack(module.logits).detach())
            optimizer.zero_grad()
            F.cross_entropy(output[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
        changes.append((seen[-1] - seen[0]).square().mean().sqrt().item())
    return sum(changes) / len(changes)


@pytest.mark.parametrize("norm", [False, True])
def test_logits_move_as_far_at_every_head_dim(norm: bool) -> None:
    """Queries and keys become correlated, so that 1/sqrt(head_dim) is too much, with query-key norm and without."""
    at_base = _moved(16, norm, multiplied=True)
    assert 0.7 < _moved(64, norm, multiplied=True) / at_base < 1.3
    assert _moved(64, norm, multiplied=False) / at_base > 1.4


class NormedAttention(nn.Module):  # attention with norms of queries and keys, a temperature and a sink for every head
    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.embed, self.out = nn.Linear(5, D), nn.Linear(D, 3)
        self.qkv = nn.Linear(D, 3 * heads * head_dim, bias=False)
        self.write = nn.Linear(heads * head_dim, D, bias=False)
        self.shared_gain = nn.Parameter(torch.ones(head_dim))
        self.gain = nn.Parameter(torch.ones(heads, head_dim))
        self.temperature = nn.Parameter(torch.zeros(heads, 1, 1))
        self.sink = nn.Parameter(torch.zeros(heads))

    def forward(self, x: Tensor) -> Any:
        h = self.embed(x)
        parts = self.qkv(h).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        queries, keys, values = parts.unbind(0)
        queries = F.rms_norm(queries, (self.head_dim,)) * self.shared_gain
        keys = F.rms_norm(keys, (self.head_dim,)) * self.gain[:, None]
        logits = queries @ keys.mT * self.temperature.exp()
        sinks = self.sink.reshape(1, -1, 1, 1).expand(len(x), -1, 8, 1)
        weights = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
        return self.out(h + self.write((weights @ values).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize(("heads", "head_dim"), [(4, 4), (2, 8), (1, 16)])
def test_gains_of_heads(heads: int, head_dim: int) -> None:
    """What has an entry for every head grows with them; what all of them share does not, however many there are."""
    structure = discover(NormedAttention(heads, head_dim), (FEATURES,))
    assert not structure.unassigned
    (branch,) = structure.branches
    assert (branch.kind, branch.hidden, branch.head_dim) == ("attention", heads, head_dim)
    assert structure.roles["shared_gain"] == "branch_bounded"
    assert structure.parameters["gain"].fan_out == heads * head_dim
    if heads == 1:  # a single number shows nothing of what it is for
        assert structure.roles["temperature"] == structure.roles["sink"] == "branch_bounded"
        return
    assert {structure.roles[name] for name in ("gain", "temperature", "sink")} == {"branch_in_bias"}
    assert structure.parameters["temperature"].fan_out == structure.parameters["sink"].fan_out == heads


@pytest.mark.parametrize("heads", [1, 2])
def test_a_norm_before_units_are_split_into_heads(heads: int) -> None:
    """It has the same role at one head, as a base may have, as at many."""

    def forward(net: Net, x: Tensor) -> Any:
        h = net.embed(x)
        queries, keys, values = net.blocks(h).chunk(3, -1)
        parts = (part.unflatten(-1, (heads, 8)).transpose(1, 2) for part in (net.norm(queries), net.norm(keys), values))
        return net.out(h + net.write(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)))

    parts = {"embed": nn.Linear(5, D), "out": nn.Linear(D, 3), "blocks": nn.Linear(D, 24 * heads)}
    module = Net(forward, write=nn.Linear(8 * heads, D), norm=nn.RMSNorm(8 * heads), **parts)
    assert discover(module, (FEATURES,)).roles["norm.weight"] == "branch_in_bias"
