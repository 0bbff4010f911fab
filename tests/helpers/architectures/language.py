"""Language models of Hugging Face transformers, from configurations."""

from dataclasses import replace
from typing import Any

import transformers as hf
from torch import nn

from helpers.architectures.architecture import LANGUAGE, VOCABULARY, Architecture, Build, hugging_face

TOKENIZER = {"vocab_size": VOCABULARY, **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))}


def _gpt2(head_dim: int = 8) -> Build:
    # the loss is looked for in the name of the class else, and missed with a warning
    numbers = {"n_positions": 8, "loss_type": "ForCausalLM", **TOKENIZER}
    return hugging_face(hf.GPT2LMHeadModel, hf.GPT2Config, 4 * head_dim, head_dim, **numbers)


def gpt2_with_heads_of(head_dim: int) -> nn.Module:
    """GPT-2 with two blocks and two heads, of any dimension, which its embedding then has twice."""
    return _gpt2(head_dim)(2, 2, 2 * head_dim)


def _grouped(model: type, config: type, **numbers: Any) -> Build:
    """Llama and what has its config: grouped queries, gated perceptrons."""
    groups = {"num_key_value_heads": lambda heads: heads // 2, "head_dim": 8}
    return hugging_face(model, config, 24, **groups, **TOKENIZER, **numbers)


def mixtral(experts: str) -> Build:
    """Mixtral with four experts, of which a token is sent to two, and how they are computed."""
    numbers = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": experts}
    return _grouped(hf.MixtralForCausalLM, hf.MixtralConfig, **numbers)


def _t5(tied: bool) -> Build:
    def build(depth: int, heads: int, embedding: int) -> nn.Module:
        sizes = {"d_model": embedding, "d_kv": 8, "d_ff": 24 * heads, "num_layers": depth, "num_heads": heads}
        kind = {"feed_forward_proj": "relu" if tied else "gated-gelu", "decoder_start_token_id": 0}
        # tie_word_embeddings says for T5 only whether outputs are scaled as those of a tied table
        config = hf.T5Config(vocab_size=VOCABULARY, tie_word_embeddings=tied, **sizes, **kind)
        model = hf.T5ForConditionalGeneration(config)
        if not tied:
            model.lm_head = nn.Linear(embedding, VOCABULARY, bias=False)
        return model

    return build


_LLAMA = """
    embedding: model.embed_tokens.weight
    branch_in: model.layers.*.self_attn.[qkv]_proj.weight model.layers.*.mlp.gate_proj.weight
    branch_in: model.layers.*.mlp.up_proj.weight
    branch_out: model.layers.*.self_attn.o_proj.weight model.layers.*.mlp.down_proj.weight
    branch_norm: model.layers.*.*layernorm.weight
    stream_norm: model.norm.weight
    branches: model.layers.*.self_attn attention 1
"""


def _like_llama(model: type, config: type, tied: bool = False, **numbers: Any) -> Architecture:
    readout = "model.embed_tokens.weight" if tied else "lm_head.weight"
    architecture = Architecture(_grouped(model, config, **numbers), LANGUAGE, readout, tied=tied)
    architecture = architecture.reads(f"{_LLAMA}branches: model.layers.*.mlp mlp 24")
    return architecture if tied else architecture.reads("readout: lm_head.weight")


def _t5_architecture(tied: bool) -> Architecture:
    readout = "shared.weight" if tied else "lm_head.weight"
    powers = (0.0, -0.5 if tied else 0.0)
    again = "*.relative_attention_bias.weight"
    architecture = Architecture(_t5(tied), LANGUAGE, readout, tied=tied, again=again, powers=powers).reads("""
        embedding: shared.weight
        branch_in_bias: *.relative_attention_bias.weight
        branch_in: *Attention.[qkv].weight *.DenseReluDense.wi*.weight
        branch_out: *Attention.o.weight *.DenseReluDense.wo.weight
        branch_norm: *.layer.*.layer_norm.weight
        stream_norm: *.final_layer_norm.weight
        branches: decoder.block.*.layer.*.SelfAttention attention 1
        branches: decoder.block.*.layer.*.EncDecAttention attention 1
        branches: decoder.block.*.layer.*.DenseReluDense mlp 24
        encoder: encoder.block.*.layer.*.SelfAttention attention 1
        encoder: encoder.block.*.layer.*.DenseReluDense mlp 24
    """)
    return architecture if tied else architecture.reads("readout: lm_head.weight")


_MIXTRAL_ACTIVE = {"model.layers.*.mlp.experts.*": 2}
_NEOX = hugging_face(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, 32, **TOKENIZER)
_BERT = hugging_face(hf.BertForMaskedLM, hf.BertConfig, 32, max_position_embeddings=8, **TOKENIZER)
_BERT_READOUT = "bert.embeddings.word_embeddings.weight"

LANGUAGE_MODELS: dict[str, Architecture] = {
    "gpt2": Architecture(_gpt2(), LANGUAGE, "transformer.wte.weight", tied=True).reads("""
        embedding: transformer.wte.weight transformer.wpe.weight
        branch_norm: transformer.h.*.ln_?.*
        branch_in: transformer.h.*.attn.c_attn.weight|bias transformer.h.*.mlp.c_fc.weight|bias
        branch_out: transformer.h.*.c_proj.weight|bias
        stream_norm: transformer.ln_f.*
        branches: transformer.h.*.attn attention 1
        branches: transformer.h.*.mlp mlp 32
    """),
    "llama": _like_llama(hf.LlamaForCausalLM, hf.LlamaConfig),
    "tied llama": _like_llama(hf.LlamaForCausalLM, hf.LlamaConfig, tied=True, tie_word_embeddings=True),
    # every branch ends in a norm
    "gemma2": replace(
        _like_llama(hf.Gemma2ForCausalLM, hf.Gemma2Config, tied=True), unfoldable=True, powers=(0.5, 0.0)
    ).reads("""
        branch_out (before_norm): model.layers.*.self_attn.o_proj.weight model.layers.*.mlp.down_proj.weight
    """),
    "gpt-neox": Architecture(_NEOX, LANGUAGE, "lm_head.weight", parallel=True).reads("""
        embedding: gpt_neox.embed_in.weight
        branch_norm: gpt_neox.layers.*.*layernorm.*
        branch_in: gpt_neox.layers.*.query_key_value.weight|bias gpt_neox.layers.*.dense_h_to_4h.weight|bias
        branch_out: gpt_neox.layers.*.dense.weight|bias gpt_neox.layers.*.dense_4h_to_h.weight|bias
        stream_norm: gpt_neox.final_layer_norm.*
        readout: lm_head.weight
        branches: gpt_neox.layers.*.attention attention 1
        branches: gpt_neox.layers.*.mlp mlp 32
    """),
    "bert": Architecture(_BERT, LANGUAGE, _BERT_READOUT, tied=True, warns="post-norm").reads("""
        embedding: bert.embeddings.*_embeddings.weight
        stream_norm: bert.embeddings.LayerNorm.* cls.predictions.transform.dense.bias
        stream_norm: cls.predictions.transform.LayerNorm.*
        branch_in: bert.encoder.layer.*.attention.self.*.weight|bias bert.encoder.layer.*.intermediate.dense.weight|bias
        branch_out: bert.encoder.layer.*.output.dense.weight|bias
        stream_norm (post_norm): bert.encoder.layer.*.LayerNorm.*
        stream_matrix (in_head): cls.predictions.transform.dense.weight
        readout_bias: cls.predictions.bias
        branches: bert.encoder.layer.*.attention attention 1
        branches: bert.encoder.layer.* mlp 32
    """),
    "mistral": _like_llama(hf.MistralForCausalLM, hf.MistralConfig),
    "qwen3": _like_llama(hf.Qwen3ForCausalLM, hf.Qwen3Config).reads("""
        branch_bounded: model.layers.*.self_attn.[qk]_norm.weight
    """),
    # the only implementation for double precision and for tensors without values
    "mixtral": Architecture(mixtral("batched_mm"), LANGUAGE, "lm_head.weight", active=_MIXTRAL_ACTIVE).reads(f"""
        {_LLAMA.strip()}
        branch_bounded_matrix: model.layers.*.mlp.gate.weight
        branch_in: model.layers.*.mlp.experts.gate_up_proj
        branch_out: model.layers.*.mlp.experts.down_proj
        readout: lm_head.weight
        branches: model.layers.*.mlp mlp {2 * 24}
    """),
    "tied t5": _t5_architecture(tied=True),
    "t5": _t5_architecture(tied=False),
}
