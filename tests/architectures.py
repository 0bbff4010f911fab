"""Architectures with the roles of their parameters as a person reads them off the source: the registry of the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from mlu_lightning.models import CausalTransformer, ResNet

VOCABULARY = 50
TOKENS = torch.arange(16).reshape(2, 8)
LANGUAGE = {"input_ids": TOKENS, "labels": TOKENS}


@dataclass(frozen=True)
class Architecture:
    """One architecture at any shape.

    Args:
        build: module with a number of blocks, heads of dimension 8 and an embedding dimension.
        example: input of its rehearsal.
        roles: role by pattern of parameter names; every parameter matches exactly one.
        branches: pattern of the name, kind, hidden width per head, of each branch of a block.
        parallel: whether the branches of a block share an addition.
        readout: name of the readout's matrix, empty if there is none.
        tied: whether that is the embedding.
        unfoldable: whether branches end in something that no parameter multiplies.
        warns: whether it is outside of the theory.
    """

    build: Callable[[int, int, int], nn.Module]
    example: Any
    roles: dict[str, str]
    branches: tuple[tuple[str, str, int], ...]
    readout: str
    parallel: bool = False
    tied: bool = False
    unfoldable: bool = False
    warns: bool = field(default=False)


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


def _config(cls: type, **numbers: Any) -> Any:
    return cls(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None, pad_token_id=None, **numbers)


def _gpt2(depth: int, heads: int, embedding: int) -> nn.Module:
    assert embedding == 8 * heads, "GPT-2 has no head_dim of its own"
    config = _config(transformers.GPT2Config, n_layer=depth, n_head=heads, n_embd=embedding, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


def _llama(tied: bool) -> Callable[[int, int, int], nn.Module]:
    def build(depth: int, heads: int, embedding: int) -> nn.Module:
        return transformers.LlamaForCausalLM(
            _config(
                transformers.LlamaConfig,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                num_key_value_heads=heads // 2,
                head_dim=8,
                hidden_size=embedding,
                intermediate_size=24 * heads,
                tie_word_embeddings=tied,
            )
        )

    return build


def _gemma(depth: int, heads: int, embedding: int) -> nn.Module:
    return transformers.Gemma2ForCausalLM(
        _config(
            transformers.Gemma2Config,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=8,
            hidden_size=embedding,
            intermediate_size=24 * heads,
        )
    )


def _neox(depth: int, heads: int, embedding: int) -> nn.Module:
    assert embedding == 8 * heads, "GPT-NeoX has no head_dim of its own"
    return transformers.GPTNeoXForCausalLM(
        _config(
            transformers.GPTNeoXConfig,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            hidden_size=embedding,
            intermediate_size=32 * heads,
        )
    )


def _bert(depth: int, heads: int, embedding: int) -> nn.Module:
    assert embedding == 8 * heads, "BERT has no head_dim of its own"
    return transformers.BertForMaskedLM(
        _config(
            transformers.BertConfig,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            hidden_size=embedding,
            intermediate_size=32 * heads,
            max_position_embeddings=8,
        )
    )


def _vit(depth: int, heads: int, embedding: int) -> nn.Module:
    assert embedding == 8 * heads, "ViT has no head_dim of its own"
    config = transformers.ViTConfig(
        num_hidden_layers=depth,
        num_attention_heads=heads,
        hidden_size=embedding,
        intermediate_size=32 * heads,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


_LLAMA_ROLES = {
    "model.embed_tokens.weight": "embedding",
    "model.layers.*.self_attn.[qkv]_proj.weight": "branch_in",
    "model.layers.*.self_attn.o_proj.weight": "branch_out",
    "model.layers.*.mlp.gate_proj.weight": "branch_in",
    "model.layers.*.mlp.up_proj.weight": "branch_in",
    "model.layers.*.mlp.down_proj.weight": "branch_out",
    "model.layers.*.*layernorm.weight": "branch_norm",
    "model.norm.weight": "stream_norm",
}
_LLAMA_BRANCHES = (("model.layers.*.self_attn", "attention", 1), ("model.layers.*.mlp", "mlp", 24))

_ENCODER_ROLES = {
    "tokens.weight": "embedding",
    "positions": "embedding",
    "encoder.layers.*.self_attn.in_proj_weight": "branch_in",
    "encoder.layers.*.self_attn.in_proj_bias": "branch_in_bias",
    "encoder.layers.*.self_attn.out_proj.weight": "branch_out",
    "encoder.layers.*.self_attn.out_proj.bias": "branch_out_bias",
    "encoder.layers.*.linear1.weight": "branch_in",
    "encoder.layers.*.linear1.bias": "branch_in_bias",
    "encoder.layers.*.linear2.weight": "branch_out",
    "encoder.layers.*.linear2.bias": "branch_out_bias",
    "readout.weight": "readout",
    "readout.bias": "readout_bias",
}
_ENCODER_BRANCHES = (("encoder.layers.*.self_attn", "attention", 1), ("encoder.layers.*", "mlp", 32))

ARCHITECTURES: dict[str, Architecture] = {
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
            "transform.weight": "stream_matrix",
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
        roles=_ENCODER_ROLES | {"encoder.layers.*.norm?.*": "post_norm"},
        branches=_ENCODER_BRANCHES,
        readout="readout.weight",
        warns=True,
    ),
    "gpt2": Architecture(
        build=_gpt2,
        example=LANGUAGE,
        roles={
            "transformer.wte.weight": "embedding",
            "transformer.wpe.weight": "embedding",
            "transformer.h.*.ln_?.*": "branch_norm",
            "transformer.h.*.attn.c_attn.weight": "branch_in",
            "transformer.h.*.attn.c_attn.bias": "branch_in_bias",
            "transformer.h.*.mlp.c_fc.weight": "branch_in",
            "transformer.h.*.mlp.c_fc.bias": "branch_in_bias",
            "transformer.h.*.c_proj.weight": "branch_out",
            "transformer.h.*.c_proj.bias": "branch_out_bias",
            "transformer.ln_f.*": "stream_norm",
        },
        branches=(("transformer.h.*.attn", "attention", 1), ("transformer.h.*.mlp", "mlp", 32)),
        readout="transformer.wte.weight",
        tied=True,
    ),
    "llama": Architecture(
        build=_llama(tied=False),
        example=LANGUAGE,
        roles=_LLAMA_ROLES | {"lm_head.weight": "readout"},
        branches=_LLAMA_BRANCHES,
        readout="lm_head.weight",
    ),
    "tied llama": Architecture(
        build=_llama(tied=True),
        example=LANGUAGE,
        roles=_LLAMA_ROLES,
        branches=_LLAMA_BRANCHES,
        readout="model.embed_tokens.weight",
        tied=True,
    ),
    "gemma2": Architecture(
        build=_gemma,
        example=LANGUAGE,
        roles=_LLAMA_ROLES,
        branches=_LLAMA_BRANCHES,
        readout="model.embed_tokens.weight",
        tied=True,
        unfoldable=True,
    ),
    "gpt-neox": Architecture(
        build=_neox,
        example=LANGUAGE,
        roles={
            "gpt_neox.embed_in.weight": "embedding",
            "gpt_neox.layers.*.*layernorm.*": "branch_norm",
            "gpt_neox.layers.*.query_key_value.weight": "branch_in",
            "gpt_neox.layers.*.query_key_value.bias": "branch_in_bias",
            "gpt_neox.layers.*.dense_h_to_4h.weight": "branch_in",
            "gpt_neox.layers.*.dense_h_to_4h.bias": "branch_in_bias",
            "gpt_neox.layers.*.dense.weight": "branch_out",
            "gpt_neox.layers.*.dense.bias": "branch_out_bias",
            "gpt_neox.layers.*.dense_4h_to_h.weight": "branch_out",
            "gpt_neox.layers.*.dense_4h_to_h.bias": "branch_out_bias",
            "gpt_neox.final_layer_norm.*": "stream_norm",
            "lm_head.weight": "readout",
        },
        branches=(("gpt_neox.layers.*.attention", "attention", 1), ("gpt_neox.layers.*.mlp", "mlp", 32)),
        readout="lm_head.weight",
        parallel=True,
    ),
    "bert": Architecture(
        build=_bert,
        example=LANGUAGE,
        roles={
            "bert.embeddings.*_embeddings.weight": "embedding",
            "bert.embeddings.LayerNorm.*": "stream_norm",
            "bert.encoder.layer.*.attention.self.*.weight": "branch_in",
            "bert.encoder.layer.*.attention.self.*.bias": "branch_in_bias",
            "bert.encoder.layer.*.output.dense.weight": "branch_out",
            "bert.encoder.layer.*.output.dense.bias": "branch_out_bias",
            "bert.encoder.layer.*.intermediate.dense.weight": "branch_in",
            "bert.encoder.layer.*.intermediate.dense.bias": "branch_in_bias",
            "bert.encoder.layer.*.LayerNorm.*": "post_norm",
            "cls.predictions.transform.dense.weight": "stream_matrix",
            "cls.predictions.transform.dense.bias": "stream_norm",
            "cls.predictions.transform.LayerNorm.*": "stream_norm",
            "cls.predictions.bias": "readout_bias",
        },
        branches=(("bert.encoder.layer.*.attention", "attention", 1), ("bert.encoder.layer.*", "mlp", 32)),
        readout="bert.embeddings.word_embeddings.weight",
        tied=True,
        warns=True,
    ),
    "vit": Architecture(
        build=_vit,
        example={"pixel_values": torch.ones(2, 3, 8, 8), "labels": torch.zeros(2, dtype=torch.long)},
        roles={
            "vit.embeddings.*": "embedding",
            "vit.layers.*.attention.[qkv]_proj.weight": "branch_in",
            "vit.layers.*.attention.[qkv]_proj.bias": "branch_in_bias",
            "vit.layers.*.attention.o_proj.weight": "branch_out",
            "vit.layers.*.attention.o_proj.bias": "branch_out_bias",
            "vit.layers.*.mlp.fc1.weight": "branch_in",
            "vit.layers.*.mlp.fc1.bias": "branch_in_bias",
            "vit.layers.*.mlp.fc2.weight": "branch_out",
            "vit.layers.*.mlp.fc2.bias": "branch_out_bias",
            "vit.layers.*.layernorm_*": "branch_norm",
            "vit.layernorm.*": "stream_norm",
            "classifier.weight": "readout",
            "classifier.bias": "readout_bias",
        },
        branches=(("vit.layers.*.attention", "attention", 1), ("vit.layers.*.mlp", "mlp", 32)),
        readout="classifier.weight",
    ),
}
