"""Residual networks of plain code."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.architectures.architecture import TOKENS, VOCABULARY, Architecture
from mlu_lightning.models import CausalTransformer, ResNet


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` between tables and a readout."""

    def __init__(self, depth: int, heads: int, embedding: int, norm_first: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, embedding)
        self.positions = nn.Parameter(torch.randn(1, 8, embedding))
        layer = nn.TransformerEncoderLayer(
            embedding, heads, 32 * heads, dropout=0.1, activation="gelu", batch_first=True, norm_first=norm_first
        )
        norm = nn.LayerNorm(embedding) if norm_first else None
        self.encoder = nn.TransformerEncoder(layer, depth, norm, enable_nested_tensor=False)
        self.readout = nn.Linear(embedding, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.readout(self.encoder(self.tokens(tokens) + self.positions))
        return output


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
        output: Tensor = self.out(torch.tanh(self.transform(self.blocks(self.stem(F.relu(self.patches(x)))))))
        return output


class Decoder(nn.Module):
    """``nn.TransformerDecoder`` with cross-attention to a memory that is made of data."""

    def __init__(self, depth: int, heads: int, embedding: int, norm_first: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, embedding)
        self.memory = nn.Linear(5, embedding)
        layer = nn.TransformerDecoderLayer(
            embedding, heads, 32 * heads, dropout=0.1, batch_first=True, norm_first=norm_first
        )
        self.decoder = nn.TransformerDecoder(layer, depth, nn.LayerNorm(embedding) if norm_first else None)
        self.readout = nn.Linear(embedding, VOCABULARY)

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        output: Tensor = self.readout(self.decoder(self.tokens(tokens), self.memory(memory)))
        return output


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
        output: Tensor = self.readout(h)
        return output


_TORCH_ROLES = {
    "tokens.weight": "embedding",
    "*.layers.*.in_proj_weight": "branch_in",
    "*.layers.*.in_proj_bias": "branch_in_bias",
    "*.layers.*.out_proj.weight": "branch_out",
    "*.layers.*.out_proj.bias": "branch_out_bias",
    "*.layers.*.linear1.weight": "branch_in",
    "*.layers.*.linear1.bias": "branch_in_bias",
    "*.layers.*.linear2.weight": "branch_out",
    "*.layers.*.linear2.bias": "branch_out_bias",
    "readout.weight": "readout",
    "readout.bias": "readout_bias",
}
_ENCODER_ROLES = _TORCH_ROLES | {"positions": "embedding"}
_ENCODER_BRANCHES = (("encoder.layers.*.self_attn", "attention", 1), ("encoder.layers.*", "mlp", 32))
_DECODER_ROLES = _TORCH_ROLES | {"memory.*": "embedding"}
_DECODER_BRANCHES = (
    ("decoder.layers.*.self_attn", "attention", 1),
    ("decoder.layers.*.multihead_attn", "attention", 1),
    ("decoder.layers.*", "mlp", 32),
)
_EXPERT_ROLES = {
    "embed.*": "embedding",
    "norms.*": "branch_norm",
    "experts.*.router.weight": "branch_bounded_matrix",
    "experts.*.router.bias": "branch_bounded",
    "experts.*.gate.*.weight": "branch_in",
    "experts.*.up.*.weight": "branch_in",
    "experts.*.down.*.weight": "branch_out",
    "experts.*.down.*.bias": "branch_out_bias",
    "readout.weight": "readout",
    "readout.bias": "readout_bias",
}

PLAIN: dict[str, Architecture] = {
    "resnet": Architecture(
        build=lambda depth, heads, embedding: ResNet(depth, 4 * heads, embedding, inputs=3, outputs=2),
        example=(torch.ones(4, 3), torch.ones(4, 2)),
        roles={
            "embed.weight": "embedding",
            "blocks.*.read.weight": "branch_in",
            "blocks.*.write.weight": "branch_out",
            "readout.weight": "readout",
        },
        branches=(("blocks.*", "mlp", 4),),
        readout="readout.weight",
    ),
    "causal transformer": Architecture(
        build=lambda depth, heads, embedding: CausalTransformer(VOCABULARY, 8, depth, embedding, heads, head_dim=8),
        example=torch.zeros(2, 9, dtype=torch.long),
        roles={
            "tokens.weight": "embedding",
            "branches.*.norm.weight": "branch_norm",
            "branches.*.query.weight": "branch_in",
            "branches.*.key.weight": "branch_in",
            "branches.*.value.weight": "branch_in",
            "branches.*.out.weight": "branch_out",
            "branches.*.read.weight": "branch_in",
            "branches.*.write.weight": "branch_out",
            "norm.weight": "stream_norm",
            "readout.weight": "readout",
        },
        branches=(("branches.*", "attention", 1), ("branches.*", "mlp", 32)),
        readout="readout.weight",
    ),
    "functional": Architecture(
        build=Functional,
        example=(torch.ones(4, 5),),
        roles={
            "patches.weight": "embedding",
            "patches.bias": "embedding",
            "stem.weight": "stream_matrix",
            "stem.bias": "stream_norm",
            "blocks.*.read": "branch_in",
            "blocks.*.read_bias": "branch_in_bias",
            "blocks.*.gain": "branch_in_bias",
            "blocks.*.between.weight": "branch_hidden",
            "blocks.*.between.bias": "branch_in_bias",
            "blocks.*.write": "branch_out",
            "blocks.*.layer_scale": "branch_norm",
            "transform.weight": "stream_matrix (in_head)",
            "transform.bias": "stream_norm",
            "out.weight": "readout",
            "out.bias": "readout_bias",
        },
        branches=(("blocks.*", "mlp", 8),),
        readout="out.weight",
    ),
    "pre-norm encoder": Architecture(
        build=lambda depth, heads, embedding: Encoder(depth, heads, embedding, norm_first=True),
        example=(TOKENS,),
        roles=_ENCODER_ROLES | {"encoder.layers.*.norm?.*": "branch_norm", "encoder.norm.*": "stream_norm"},
        branches=_ENCODER_BRANCHES,
        readout="readout.weight",
    ),
    "post-norm encoder": Architecture(
        build=lambda depth, heads, embedding: Encoder(depth, heads, embedding, norm_first=False),
        example=(TOKENS,),
        roles=_ENCODER_ROLES | {"encoder.layers.*.norm?.*": "stream_norm (post_norm)"},
        branches=_ENCODER_BRANCHES,
        readout="readout.weight",
        warns="post-norm",
    ),
    "pre-norm decoder": Architecture(
        build=lambda depth, heads, embedding: Decoder(depth, heads, embedding, norm_first=True),
        example=(TOKENS, torch.linspace(-1, 1, 60).reshape(2, 6, 5)),
        roles=_DECODER_ROLES | {"decoder.layers.*.norm?.*": "branch_norm", "decoder.norm.*": "stream_norm"},
        branches=_DECODER_BRANCHES,
        readout="readout.weight",
    ),
    "post-norm decoder": Architecture(
        build=lambda depth, heads, embedding: Decoder(depth, heads, embedding, norm_first=False),
        example=(TOKENS, torch.linspace(-1, 1, 60).reshape(2, 6, 5)),
        roles=_DECODER_ROLES | {"decoder.layers.*.norm?.*": "stream_norm (post_norm)"},
        branches=_DECODER_BRANCHES,
        readout="readout.weight",
        warns="post-norm",
    ),
    "average of experts": Architecture(
        build=lambda depth, heads, embedding: MixtureOfExperts(depth, heads, embedding, normalized=True),
        example=(torch.linspace(-1, 1, 20).reshape(4, 5),),
        roles=_EXPERT_ROLES,
        branches=(("experts.*", "mlp", 2 * 8),),
        readout="readout.weight",
        active={"experts.*.gate.*": 2, "experts.*.up.*": 2, "experts.*.down.*": 2},
    ),
    "sum of experts": Architecture(
        build=lambda depth, heads, embedding: MixtureOfExperts(depth, heads, embedding, normalized=False),
        example=(torch.linspace(-1, 1, 20).reshape(4, 5),),
        roles=_EXPERT_ROLES,
        branches=(("experts.*", "mlp", 2 * 8),),
        readout="readout.weight",
    ),
}
