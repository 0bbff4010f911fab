"""Language models of Hugging Face transformers, from configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from torch import nn

from helpers.architectures.architecture import LANGUAGE, VOCABULARY, Architecture

Build = Callable[[int, int, int], nn.Module]


def _config(cls: type, **numbers: Any) -> Any:
    return cls(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None, pad_token_id=None, **numbers)


def _gpt2(depth: int, heads: int, embedding: int, head_dim: int = 8) -> nn.Module:
    assert embedding == head_dim * heads, "GPT-2 has no head_dim of its own"
    config = _config(transformers.GPT2Config, n_layer=depth, n_head=heads, n_embd=embedding, n_positions=8)
    config.loss_type = "ForCausalLM"  # or else it is looked for in the name of the class, and missed with a warning
    return transformers.GPT2LMHeadModel(config)


def gpt2_with_heads_of(head_dim: int) -> nn.Module:
    """GPT-2 with two blocks and two heads, of any dimension, which its embedding then has twice."""
    return _gpt2(2, 2, 2 * head_dim, head_dim)


def _of_heads_of_eight(model: type, config: type, **numbers: Any) -> Build:
    """GPT-NeoX and BERT, which have no head_dim of their own."""

    def build(depth: int, heads: int, embedding: int) -> nn.Module:
        assert embedding == 8 * heads
        made = _config(
            config,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            hidden_size=embedding,
            intermediate_size=32 * heads,
            **numbers,
        )
        module: nn.Module = model(made)
        return module

    return build


def _grouped(model: type, config: type, experts: str | None = None, **numbers: Any) -> Build:
    """Llama and what has its config: grouped queries, gated perceptrons; and how experts are computed."""

    def build(depth: int, heads: int, embedding: int) -> nn.Module:
        made = _config(
            config,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=8,
            hidden_size=embedding,
            intermediate_size=24 * heads,
            **numbers,
        )
        made._experts_implementation = experts
        module: nn.Module = model(made)
        return module

    return build


def mixtral(experts: str) -> Build:
    """Mixtral with four experts, of which a token is sent to two."""
    numbers = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return _grouped(transformers.MixtralForCausalLM, transformers.MixtralConfig, experts, **numbers)


def _t5(tied: bool) -> Build:
    def build(depth: int, heads: int, embedding: int) -> nn.Module:
        config = transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=embedding,
            d_kv=8,
            d_ff=24 * heads,
            num_layers=depth,
            num_heads=heads,
            feed_forward_proj="relu" if tied else "gated-gelu",
            tie_word_embeddings=tied,  # for T5 this says only whether outputs are scaled as those of a tied table
            decoder_start_token_id=0,
        )
        model = transformers.T5ForConditionalGeneration(config)
        if not tied:
            model.lm_head = nn.Linear(embedding, VOCABULARY, bias=False)
        return model

    return build


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
# every branch ends in a norm
_GEMMA2_ROLES = _LLAMA_ROLES | {
    "model.layers.*.self_attn.o_proj.weight": "branch_out (before_norm)",
    "model.layers.*.mlp.down_proj.weight": "branch_out (before_norm)",
}
_LLAMA_BRANCHES = (("model.layers.*.self_attn", "attention", 1), ("model.layers.*.mlp", "mlp", 24))

_T5_ROLES = {
    "shared.weight": "embedding",
    "*.relative_attention_bias.weight": "branch_in_bias",
    "*Attention.[qkv].weight": "branch_in",
    "*Attention.o.weight": "branch_out",
    "*.DenseReluDense.wi*.weight": "branch_in",
    "*.DenseReluDense.wo.weight": "branch_out",
    "*.layer.*.layer_norm.weight": "branch_norm",
    "*.final_layer_norm.weight": "stream_norm",
}


def _like_llama(model: type, config: type, **roles: str) -> Architecture:
    return Architecture(
        build=_grouped(model, config),
        example=LANGUAGE,
        roles=_LLAMA_ROLES | {"lm_head.weight": "readout"} | roles,
        branches=_LLAMA_BRANCHES,
        readout="lm_head.weight",
    )


def _t5_architecture(tied: bool) -> Architecture:
    return Architecture(
        build=_t5(tied),
        example=LANGUAGE,
        roles=_T5_ROLES | ({} if tied else {"lm_head.weight": "readout"}),
        branches=(
            ("decoder.block.*.layer.*.SelfAttention", "attention", 1),
            ("decoder.block.*.layer.*.EncDecAttention", "attention", 1),
            ("decoder.block.*.layer.*.DenseReluDense", "mlp", 24),
        ),
        encoder=(
            ("encoder.block.*.layer.*.SelfAttention", "attention", 1),
            ("encoder.block.*.layer.*.DenseReluDense", "mlp", 24),
        ),
        readout="shared.weight" if tied else "lm_head.weight",
        tied=tied,
        warns="shared across depth",
    )


LANGUAGE_MODELS: dict[str, Architecture] = {
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
    "llama": _like_llama(transformers.LlamaForCausalLM, transformers.LlamaConfig),
    "tied llama": Architecture(
        build=_grouped(transformers.LlamaForCausalLM, transformers.LlamaConfig, tie_word_embeddings=True),
        example=LANGUAGE,
        roles=_LLAMA_ROLES,
        branches=_LLAMA_BRANCHES,
        readout="model.embed_tokens.weight",
        tied=True,
    ),
    "gemma2": Architecture(
        build=_grouped(transformers.Gemma2ForCausalLM, transformers.Gemma2Config),
        example=LANGUAGE,
        roles=_GEMMA2_ROLES,
        branches=_LLAMA_BRANCHES,
        readout="model.embed_tokens.weight",
        tied=True,
        unfoldable=True,
    ),
    "gpt-neox": Architecture(
        build=_of_heads_of_eight(transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig),
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
        build=_of_heads_of_eight(transformers.BertForMaskedLM, transformers.BertConfig, max_position_embeddings=8),
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
            "bert.encoder.layer.*.LayerNorm.*": "stream_norm (post_norm)",
            "cls.predictions.transform.dense.weight": "stream_matrix (in_head)",
            "cls.predictions.transform.dense.bias": "stream_norm",
            "cls.predictions.transform.LayerNorm.*": "stream_norm",
            "cls.predictions.bias": "readout_bias",
        },
        branches=(("bert.encoder.layer.*.attention", "attention", 1), ("bert.encoder.layer.*", "mlp", 32)),
        readout="bert.embeddings.word_embeddings.weight",
        tied=True,
        warns="post-norm",
    ),
    "mistral": _like_llama(transformers.MistralForCausalLM, transformers.MistralConfig),
    "qwen3": _like_llama(
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config,
        **{"model.layers.*.self_attn.[qk]_norm.weight": "branch_bounded"},
    ),
    "mixtral": Architecture(
        build=mixtral("batched_mm"),  # the only implementation for double precision and for tensors without values
        example=LANGUAGE,
        roles={name: role for name, role in _LLAMA_ROLES.items() if "_proj" not in name or "self_attn" in name}
        | {
            "model.layers.*.mlp.gate.weight": "branch_bounded_matrix",
            "model.layers.*.mlp.experts.gate_up_proj": "branch_in",
            "model.layers.*.mlp.experts.down_proj": "branch_out",
            "lm_head.weight": "readout",
        },
        branches=(("model.layers.*.self_attn", "attention", 1), ("model.layers.*.mlp", "mlp", 2 * 24)),
        readout="lm_head.weight",
        active={"model.layers.*.mlp.experts.*": 2},
    ),
    "tied t5": _t5_architecture(tied=True),
    "t5": _t5_architecture(tied=False),
}
