"""Pre-activations of branches: where they are found in all architectures, and that what is read is what enters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, TOKENS
from torch import Tensor, nn
from torch.nn import functional as F

from mlu_lightning import Plan, discover
from mlu_lightning.models import Attention, CausalTransformer, ResNet
from mlu_lightning.pre_activations import attention_logits
from mlu_lightning.probing import locate_features, observe

DEPTH, HEADS, EMBEDDING = 2, 2, 16
UNREADABLE = {
    "functional": "its matrices are raw parameters: no submodule is given or returns hidden units",
    "average of experts": "experts",
    "sum of experts": "experts",
    "mixtral": "experts",
}
"""Architectures whose perceptrons cannot be read, and why."""
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # single precision


def read(module: nn.Module, example: Any) -> dict[str, Tensor]:
    structure = discover(module, example)
    return observe(module, example, locate_features(structure.features, structure.branches))


def seen_by_hooks(module: nn.Module, name: str, run: Any) -> Tensor:
    """What a submodule returns in evaluation mode."""
    found: list[Tensor] = []
    handle = module.get_submodule(name).register_forward_hook(lambda *args: found.append(args[-1]))
    with torch.no_grad():
        module.eval()
        run()
    handle.remove()
    return found[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_branch_can_be_read_unless_there_is_a_reason(name: str) -> None:
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    module = architecture.build(DEPTH, HEADS, EMBEDDING)
    structure = discover(module, architecture.example)
    expected = {
        f"{branch.kind}/{branch.name}"
        for branch in structure.branches
        if branch.kind == "attention" or name not in UNREADABLE
    }
    assert set(read(module, architecture.example)) == expected


def test_units_of_a_resnet_are_what_its_first_matrix_makes() -> None:
    torch.manual_seed(0)
    model = ResNet(depth=2, hidden=24, embedding=8, inputs=3, outputs=2)
    x = torch.randn(5, 3)
    stream = x @ model.embed.weight.T
    found = read(model, (x, torch.zeros(5, 2)))
    torch.testing.assert_close(found["mlp/blocks.0"], stream @ model.blocks[0].read.weight.T, **CLOSE)
    stream = stream + model.blocks[0](stream)
    torch.testing.assert_close(found["mlp/blocks.1"], stream @ model.blocks[1].read.weight.T, **CLOSE)


@pytest.mark.parametrize(
    ("architecture", "branch", "enters"),
    [
        ("gpt2", "mlp/transformer.h.1.mlp", "transformer.h.1.mlp.c_fc"),  # a formula of tanh and a cube follows
        (
            "gemma2",
            "mlp/model.layers.1.mlp",
            "model.layers.1.mlp.gate_proj",
        ),  # the gate, not what it is multiplied with
        ("llama", "mlp/model.layers.0.mlp", "model.layers.0.mlp.gate_proj"),
        ("pre-norm encoder", "mlp/encoder.layers.1", "encoder.layers.1.linear1"),
        ("hugging face resnet", "convolution/resnet.encoder.stages.0.layers.0.layer", None),
    ],
)
def test_units_are_what_enters_the_nonlinearity(architecture: str, branch: str, enters: str | None) -> None:
    torch.manual_seed(0)
    module = ARCHITECTURES[architecture].build(DEPTH, HEADS, EMBEDDING)
    example = ARCHITECTURES[architecture].example
    enters = enters or "resnet.encoder.stages.0.layers.0.layer.0.normalization"  # a convolution, a norm, and a ReLU
    run = (lambda: module(**example)) if isinstance(example, dict) else (lambda: module(*example))
    values = seen_by_hooks(module, enters, run)
    values = values.movedim(1, -1) if branch.startswith("convolution") else values
    rows = values.reshape(-1, values.shape[-1])
    chosen = torch.linspace(0, len(rows) - 1, min(32, len(rows)), dtype=torch.float64).round().long()
    torch.testing.assert_close(read(module, example)[branch], rows[chosen], **CLOSE)


def causal_logits(attention: Attention, stream: Tensor) -> Tensor:
    """Logits of the package's own attention, by the definition, with NaN for later tokens."""
    given = attention.norm(stream)
    query, key = (
        project(given).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for project in (attention.query, attention.key)
    )
    length, half = query.shape[-2], query.shape[-1] // 2
    angles = torch.outer(torch.arange(length), float(attention.context) ** -torch.linspace(0, 1, half))
    turn = torch.polar(torch.ones_like(angles), angles)
    query, key = (torch.complex(part[..., :half], part[..., half:]) * turn for part in (query, key))
    logits = (query @ key.conj().transpose(-2, -1)).real / math.sqrt(2 * half)
    return logits.masked_fill(torch.ones(length, length).triu(1).bool(), math.nan)


def test_logits_of_fused_attention_are_those_of_its_queries_and_keys() -> None:
    torch.manual_seed(0)
    model = CausalTransformer(vocabulary=9, context=8, depth=1, embedding=12, heads=2, head_dim=6)
    tokens = torch.randint(9, (1, 9))
    attention = model.branches[0]
    assert isinstance(attention, Attention)
    logits = causal_logits(attention, model.tokens(tokens[:, :-1]))
    found = read(model, tokens)["attention/branches.0"]
    assert found.isnan().sum() > 0
    torch.testing.assert_close(found, logits.reshape(-1, 8)[_evenly(16)].detach(), equal_nan=True, **CLOSE)


def _evenly(rows: int) -> Tensor:
    return torch.linspace(0, rows - 1, min(32, rows), dtype=torch.float64).round().long()


class Eager(nn.Module):
    """Attention written by hand, with a large negative number for what cannot be seen."""

    def __init__(self, masked: float) -> None:
        super().__init__()
        self.embed, self.readout = nn.Embedding(9, 12), nn.Linear(12, 9)
        self.attention = nn.ModuleDict({name: nn.Linear(12, 12) for name in ("query", "key", "value", "out")})
        self.masked = masked
        self.attend = _Attend(self)

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.embed(tokens)
        output: Tensor = self.readout(stream + self.attend(stream))
        return output


class _Attend(nn.Module):
    def __init__(self, owner: Eager) -> None:
        super().__init__()
        self.projections, self.masked = owner.attention, owner.masked

    def forward(self, stream: Tensor) -> Tensor:
        query, key, value = (self.projections[name](stream) for name in ("query", "key", "value"))
        later = torch.ones(stream.shape[1], stream.shape[1]).triu(1)
        logits = query @ key.transpose(1, 2) / math.sqrt(12) + self.masked * later
        branch: Tensor = self.projections["out"](logits.softmax(-1) @ value)
        return branch


@pytest.mark.parametrize("masked", [-1e4, torch.finfo(torch.float32).min])
def test_logits_of_eager_attention_leave_out_what_cannot_be_seen(masked: float) -> None:
    torch.manual_seed(0)
    module = Eager(masked)
    tokens = torch.arange(8)[None]
    structure = discover(module, tokens)
    (branch,) = structure.branches
    stream = module.embed(tokens)
    query, key = module.attention["query"](stream), module.attention["key"](stream)
    logits = (query @ key.transpose(1, 2) / math.sqrt(12)).masked_fill(torch.ones(8, 8).triu(1).bool(), math.nan)
    found = observe(module, tokens, locate_features(structure.features, structure.branches))
    torch.testing.assert_close(found[f"attention/{branch.name}"], logits[0].detach(), equal_nan=True, **CLOSE)


@pytest.mark.parametrize(("mask", "causal"), [(None, False), (None, True), ("bool", False), ("float", False)])
def test_attention_by_these_logits_is_torchs(mask: str | None, causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 4, generator=generator) for _ in range(3))
    given = torch.rand(5, 5, generator=generator)
    masks = {None: None, "bool": (given > 0.3) | torch.eye(5).bool(), "float": given}
    arguments = {"query": query, "key": key, "attn_mask": masks[mask], "is_causal": causal, "scale": 0.7}
    weights = attention_logits(arguments).softmax(-1)
    expected = F.scaled_dot_product_attention(query, key, value, masks[mask], is_causal=causal, scale=0.7)
    torch.testing.assert_close(weights @ value, expected, **CLOSE)


def test_grouped_keys_are_read_for_every_head() -> None:
    torch.manual_seed(0)
    module = ARCHITECTURES["mistral"].build(DEPTH, 4, 32)
    found = read(module, ARCHITECTURES["mistral"].example)["attention/model.layers.0.self_attn"]
    samples, length = TOKENS.shape
    assert found.shape == (32, length)  # of samples * 4 heads * length rows
    assert samples * 4 * length >= 32
    seen = (~found.isnan()).sum(1)
    assert seen.min() >= 1
    assert seen.max() <= length


def test_features_are_in_the_plan_and_nothing_is_left_in_the_module() -> None:
    torch.manual_seed(0)
    model = CausalTransformer(vocabulary=9, context=8, depth=1, embedding=12, heads=2, head_dim=6)
    tokens = torch.randint(9, (3, 9))
    plan = Plan.from_model(model, tokens, base=model)
    assert plan.features == discover(model, tokens).features
    assert Plan.from_yaml(plan.to_yaml(), "itself").features == plan.features
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    locations = locate_features(plan.features, plan.branches)
    first, again = (observe(model, tokens, locations) for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0, equal_nan=True)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


def test_watching_ends_when_the_forward_pass_fails() -> None:
    torch.manual_seed(0)
    model = CausalTransformer(vocabulary=9, context=8, depth=1, embedding=12, heads=2, head_dim=6)
    tokens = torch.randint(9, (3, 9))
    plan = Plan.from_model(model, tokens, base=model)
    locations = locate_features(plan.features, plan.branches)

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    handle = model.branches[0].out.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        observe(model, tokens, locations)
    handle.remove()
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert set(observe(model, tokens, locations)) == {"attention/branches.0", "mlp/branches.1"}
