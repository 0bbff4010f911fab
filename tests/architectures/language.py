"""Language models of Hugging Face transformers, from configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from torch import nn

from architectures.architecture import LANGUAGE, VOCABULARY, Architecture


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
        warns="post-norm",
    ),
}
