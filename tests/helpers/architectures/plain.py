"""Residual networks of plain code."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.architectures.architecture import TOKENS, VOCABULARY, Architecture
from mlu_lightning.models import CausalTransformer, ResNet


class Encoder(nn.Module):  # ``nn.TransformerEncoder`` between tables and a readout
    def __init__(self, depth: int, heads: int, embedding: int, norm_first: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, embedding)
        self.positions = nn.Parameter(torch.randn(1, 8, embedding))
        settings = {"dropout": 0.1, "activation": "gelu", "batch_first": True, "norm_first": norm_first}
        layer = nn.TransformerEncoderLayer(embedding, heads, 32 * heads, **settings)
        norm = nn.LayerNorm(embedding) if norm_first else None
        self.encoder = nn.TransformerEncoder(layer, depth, norm, enable_nested_tensor=False)
        self.readout = nn.Linear(embedding, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.readout(self.encoder(self.tokens(tokens) + self.positions))


class ScaledMLP(nn.Module):
    """A functional residual block with biases, a hand-written norm on the hidden units, and a layer scale."""

    def __init__(self, embedding: int, hidden: int) -> None:
        super().__init__()
        self.read = nn.Parameter(torch.randn(embedding, hidden) / embedding**0.5)
        self.read_bias = nn.Parameter(torch.randn(hidden))
        self.gain = nn.Parameter(torch.ones(hidden))
        self.between = nn.Linear(hidden, hidden)
        self.write = nn.Parameter(torch.randn(embedding, hidden) / hidden**0.5)
        self.layer_scale = nn.Parameter(torch.full((embedding,), 0.1))

    def forward(self, h: Tensor) -> Tensor:
        units = torch.einsum("bd,dm->bm", h, self.read) + self.read_bias
        units = units * torch.rsqrt(units.square().mean(-1, keepdim=True) + 1e-6) * self.gain
        units = F.gelu(self.between(F.gelu(units, approximate="tanh")))
        return h + self.layer_scale * (units @ self.write.T)


class Functional(nn.Module):
    """Raw parameters, a block without a module of its own for the branch, and a transform before the readout."""

    def __init__(self, depth: int, heads: int, embedding: int) -> None:
        super().__init__()
        self.patches = nn.Linear(5, embedding)
        self.stem = nn.Linear(embedding, embedding)
        self.blocks = nn.Sequential(*(ScaledMLP(embedding, 8 * heads) for _ in range(depth)))
        self.transform = nn.Linear(embedding, embedding)
        self.out = nn.Linear(embedding, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.transform(self.blocks(self.stem(F.relu(self.patches(x)))))))


class Decoder(nn.Module):  # ``nn.TransformerDecoder`` with cross-attention to a memory that is made of data
    def __init__(self, depth: int, heads: int, embedding: int, norm_first: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, embedding)
        self.memory = nn.Linear(5, embedding)
        settings = {"dropout": 0.1, "batch_first": True, "norm_first": norm_first}
        layer = nn.TransformerDecoderLayer(embedding, heads, 32 * heads, **settings)
        self.decoder = nn.TransformerDecoder(layer, depth, nn.LayerNorm(embedding) if norm_first else None)
        self.readout = nn.Linear(embedding, VOCABULARY)

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        return self.readout(self.decoder(self.tokens(tokens), self.memory(memory)))


class Experts(nn.Module):
    """Top-2 routing over SwiGLU experts, of which each is a module; routing weights add up to one if asked to."""

    def __init__(self, embedding: int, hidden: int, normalized: bool) -> None:
        super().__init__()
        self.normalized = normalized
        self.router = nn.Linear(embedding, 4)
        self.gate = nn.ModuleList(nn.Linear(embedding, hidden, bias=False) for _ in range(4))
        self.up = nn.ModuleList(nn.Linear(embedding, hidden, bias=False) for _ in range(4))
        self.down = nn.ModuleList(nn.Linear(hidden, embedding) for _ in range(4))

    def forward(self, h: Tensor) -> Tensor:
        weights, chosen = self.router(h).softmax(-1).topk(2, dim=-1)
        if self.normalized:
            weights = weights / weights.sum(-1, keepdim=True)
        shares = [(weights * (chosen == i)).sum(-1, keepdim=True) for i in range(4)]
        outputs = [self.down[i](F.silu(self.gate[i](h)) * self.up[i](h)) for i in range(4)]
        return torch.stack([share * output for share, output in zip(shares, outputs, strict=True)]).sum(0)


class MixtureOfExperts(nn.Module):
    """Residual blocks of experts that are all computed, and weighted with zero where they are not chosen."""

    def __init__(self, depth: int, heads: int, embedding: int, normalized: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(5, embedding)
        self.norms = nn.ModuleList(nn.RMSNorm(embedding) for _ in range(depth))
        self.experts = nn.ModuleList(Experts(embedding, 8 * heads, normalized) for _ in range(depth))
        self.readout = nn.Linear(embedding, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for norm, experts in zip(self.norms, self.experts, strict=True):
            h = h + experts(norm(h))
        return self.readout(h)


_TORCH = """
    embedding: tokens.weight positions memory.*
    branch_in: *.layers.*.in_proj_weight|bias *.layers.*.linear1.weight|bias
    branch_out: *.layers.*.out_proj.weight|bias *.layers.*.linear2.weight|bias
    readout: readout.weight|bias
"""
_PRE_NORM = "branch_norm: *.layers.*.norm?.*\nstream_norm: ??coder.norm.*"
_POST_NORM = "stream_norm (post_norm): *.layers.*.norm?.*"


def _stack(model: type[Encoder | Decoder], example: Any, attentions: tuple[str, ...], norm_first: bool) -> Architecture:
    found = Architecture(
        partial(model, norm_first=norm_first), example, "readout.weight", warns="" if norm_first else "post-norm"
    ).reads(_TORCH)
    layers = f"{model.__name__.lower()}.layers.*"
    for name in attentions:
        found = found.reads(f"branches: {layers}.{name} attention 1")
    return found.reads(f"branches: {layers} mlp 32").reads(_PRE_NORM if norm_first else _POST_NORM)


_ENCODER = Encoder, (TOKENS,), ("self_attn",)
_DECODER = Decoder, (TOKENS, torch.linspace(-1, 1, 60).reshape(2, 6, 5)), ("self_attn", "multihead_attn")


def _experts(normalized: bool) -> Architecture:
    build = partial(MixtureOfExperts, normalized=normalized)
    active = dict.fromkeys([f"experts.*.{part}.*" for part in ("gate", "up", "down")], 2) if normalized else {}
    return Architecture(build, (torch.linspace(-1, 1, 20).reshape(4, 5),), "readout.weight", active=active).reads("""
        embedding: embed.*
        branch_norm: norms.*
        branch_bounded_matrix: experts.*.router.weight
        branch_bounded: experts.*.router.bias
        branch_in: experts.*.gate.*.weight experts.*.up.*.weight
        branch_out: experts.*.down.*.weight|bias
        readout: readout.weight|bias
        branches: experts.* mlp 16
    """)


_EXAMPLE = torch.ones(4, 3), torch.ones(4, 2)


def _transformer(depth: int, heads: int, embedding: int) -> nn.Module:
    return CausalTransformer(VOCABULARY, 8, depth, embedding, heads, head_dim=8)


PLAIN: dict[str, Architecture] = {
    "resnet": Architecture(
        lambda depth, heads, d: ResNet(depth, 4 * heads, d, 3, 2), _EXAMPLE, "readout.weight"
    ).reads("""
        embedding: embed.weight
        branch_in: blocks.*.read.weight
        branch_out: blocks.*.write.weight
        readout: readout.weight
        branches: blocks.* mlp 4
    """),
    "causal transformer": Architecture(_transformer, torch.zeros(2, 9, dtype=torch.long), "readout.weight").reads("""
        embedding: tokens.weight
        branch_norm: branches.*.norm.weight
        branch_in: branches.*.query.weight branches.*.key.weight branches.*.value.weight branches.*.read.weight
        branch_out: branches.*.out.weight branches.*.write.weight
        stream_norm: norm.weight
        readout: readout.weight
        branches: branches.* attention 1
        branches: branches.* mlp 32
    """),
    "functional": Architecture(Functional, (torch.ones(4, 5),), "out.weight").reads("""
        embedding: patches.weight patches.bias
        stream_matrix: stem.weight
        stream_norm: stem.bias transform.bias
        branch_in: blocks.*.read
        branch_in_bias: blocks.*.read_bias blocks.*.gain blocks.*.between.bias
        branch_hidden: blocks.*.between.weight
        branch_out: blocks.*.write
        branch_norm: blocks.*.layer_scale
        stream_matrix (in_head): transform.weight
        readout: out.weight|bias
        branches: blocks.* mlp 8
    """),
    "pre-norm encoder": _stack(*_ENCODER, norm_first=True),
    "post-norm encoder": _stack(*_ENCODER, norm_first=False),
    "pre-norm decoder": _stack(*_DECODER, norm_first=True),
    "post-norm decoder": _stack(*_DECODER, norm_first=False),
    "average of experts": _experts(normalized=True),
    "sum of experts": _experts(normalized=False),
}
