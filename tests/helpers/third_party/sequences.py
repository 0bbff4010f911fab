"""Language, tabular, protein, speech and forecasting models, and diffusion Transformers, of other packages."""

from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn


def _tokens(rows: int = 2, low: int = 0) -> torch.Tensor:
    return low + torch.arange(8 * rows).reshape(rows, 8) % 16


def _numbers(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, int(torch.tensor(shape).prod())).sin().reshape(shape)


class Between(nn.Module):
    """Layers that keep a stream, between an embedding and a readout."""

    def __init__(self, layers: nn.Module, embedding: int) -> None:
        super().__init__()
        self.embed, self.layers, self.readout = nn.Linear(3, embedding), layers, nn.Linear(embedding, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.readout(self.layers(self.embed(x)))


class Forward(nn.Module):
    """The forward pass of a LightningModule, whose training_step takes batches of a dataset of its package."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def _x_transformer(size: int, wrapper: dict[str, Any] | None = None, **arguments: Any) -> tuple[nn.Module, Any]:
    found: Any = import_module("x_transformers")
    layers = found.Decoder(dim=32 * size, depth=2 * size, heads=2 * size, attn_dim_head=16, **arguments)
    return found.TransformerWrapper(num_tokens=16, max_seq_len=8, attn_layers=layers, **wrapper or {}), (_tokens(),)


def _encoder_decoder(size: int) -> tuple[nn.Module, Any]:
    sizes: dict[str, int] = {}
    for side in ("enc", "dec"):
        sizes |= {f"{side}_num_tokens": 16, f"{side}_max_seq_len": 8, f"{side}_attn_dim_head": 16}
        sizes |= {f"{side}_depth": size, f"{side}_heads": 2 * size}
    model = import_module("x_transformers").XTransformer(dim=32 * size, dec_cross_attn_dim_head=16, **sizes)
    return model, (_tokens(), _tokens())


def _litgpt(size: int, **arguments: Any) -> tuple[nn.Module, Any]:
    found: Any = import_module("litgpt")
    shape = {"n_layer": 2 * size, "n_embd": 32 * size, "n_head": 2 * size, "head_size": 16}
    kept = {"intermediate_size": 64 * size} if "mlp_class_name" in arguments else {}
    config = found.Config(block_size=8, vocab_size=16, padded_vocab_size=16, **shape, **kept, **arguments)
    return found.GPT(config), (_tokens(),)


def _lm(package: str, name: str, size: int, **more: Any) -> tuple[nn.Module, Any]:
    shape = {"num_tokens": 16, "max_seq_len": 8, "dim": 32 * size, "depth": 2 * size, "heads": 2 * size, "dim_head": 16}
    return getattr(import_module(package), name)(**shape, **more), (_tokens(),)


def _rtdl(name: str, size: int) -> tuple[nn.Module, Any]:
    found: Any = import_module("rtdl_revisiting_models")
    shape = {"d_out": 2, "n_blocks": 2 * size}
    if name == "MLP":
        return found.MLP(d_in=5, d_block=16 * size, dropout=0.0, **shape), (_numbers(8, 5),)
    if name == "ResNet":
        hidden = {"d_hidden": 32 * size, "d_hidden_multiplier": None, "dropout1": 0.0, "dropout2": 0.0}
        return found.ResNet(d_in=5, d_block=16 * size, **hidden, **shape), (_numbers(8, 5),)
    attention = {"attention_n_heads": 2 * size, "attention_dropout": 0.0, "residual_dropout": 0.0, "ffn_dropout": 0.0}
    hidden = {"ffn_d_hidden": 64 * size, "ffn_d_hidden_multiplier": None, "d_block": 32 * size}
    model = found.FTTransformer(n_cont_features=4, cat_cardinalities=[3, 3], **attention, **hidden, **shape)
    return model, (_numbers(8, 4), _tokens(2).reshape(8, 2) % 3)


def _esm(size: int) -> tuple[nn.Module, Any]:
    model = import_module("esm.model.esm2").ESM2(num_layers=2 * size, embed_dim=32 * size, attention_heads=2 * size)
    return model, (_tokens(low=4),)


def _perceiver(name: str, size: int) -> tuple[nn.Module, Any]:
    found: Any = import_module("perceiver_pytorch")
    shape = {"num_latents": 4, "latent_dim": 32 * size, "cross_heads": size, "latent_heads": 2 * size}
    shape |= {"cross_dim_head": 16, "latent_dim_head": 16}
    if name == "PerceiverIO":
        model = found.PerceiverIO(dim=8, queries_dim=8, logits_dim=10, depth=2 * size, **shape)
        return model, {"data": _numbers(2, 6, 8), "queries": _numbers(3, 8)}
    data = {"input_channels": 3, "input_axis": 2, "num_freq_bands": 2, "max_freq": 4.0, "num_classes": 10}
    return found.Perceiver(depth=size, **data, **shape), (_numbers(2, 8, 8, 3),)


def _conformer(size: int) -> tuple[nn.Module, Any]:
    layers = import_module("conformer").Conformer(dim=32 * size, depth=2 * size, dim_head=16, heads=2 * size)
    return Between(layers, 32 * size), (_numbers(2, 8, 3),)


def _neuralforecast(name: str, size: int) -> tuple[nn.Module, Any]:
    series = () if name in ("PatchTST", "LSTM") else (3,)
    shape: dict[str, Any] = {"hidden_size": 32 * size, "n_heads": 2 * size}
    if name == "PatchTST":
        shape |= {"encoder_layers": 2 * size, "linear_hidden_size": 64 * size, "patch_len": 4, "stride": 2}
    elif name == "LSTM":
        shape = {"encoder_hidden_size": 32 * size, "decoder_hidden_size": 32 * size}
    else:
        shape |= {"e_layers": 2 * size, "d_ff": 64 * size, "n_series": 3}
    model = getattr(import_module("neuralforecast.models"), name)(h=4, input_size=16, max_steps=1, **shape)
    values = _numbers(3, 16, *(series or (1,)))
    batch = {"insample_y": values, "insample_mask": torch.ones(values.shape[: 2 + len(series)])}
    batch |= dict.fromkeys(("futr_exog", "hist_exog", "stat_exog"))  # type: ignore[arg-type]  # there are none
    return Forward(model), {"windows_batch": batch}


def _gluonts(size: int) -> tuple[nn.Module, Any]:
    shape = {"d_model": 32 * size, "nhead": 2 * size, "dim_feedforward": 64 * size, "num_encoder_layers": 2 * size}
    data = {"prediction_length": 4, "context_length": 16, "num_feat_dynamic_real": 0, "patch_len": 4, "stride": 2}
    kept = {"padding_patch": "end", "dropout": 0.0, "activation": "gelu", "norm_first": True, "scaling": "mean"}
    model = import_module("gluonts.torch.model.patch_tst.module").PatchTSTModel(**shape, **data, **kept)
    return model, {"past_target": _numbers(3, 16), "past_observed_values": torch.ones(3, 16)}


def _diffusers(name: str, size: int) -> tuple[nn.Module, Any]:
    shape = {"num_attention_heads": 2 * size, "attention_head_dim": 16, "in_channels": 4}
    inputs: dict[str, Any] = {"timestep": torch.tensor([1, 2]), "return_dict": False}
    if name != "DiTTransformer2DModel":
        shape |= {"joint_attention_dim": 12, "pooled_projection_dim": 12}
        inputs |= {"encoder_hidden_states": _numbers(2, 3, 12), "pooled_projections": _numbers(2, 12)}
    if name == "FluxTransformer2DModel":
        more: dict[str, Any] = {
            "num_layers": size,
            "num_single_layers": size,
            "patch_size": 1,
            "axes_dims_rope": (4, 4, 8),
        }
        inputs |= {"hidden_states": _numbers(2, 4, 4), "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
        inputs["timestep"] = torch.tensor([1.0, 2.0])
    elif name == "SD3Transformer2DModel":
        more = {"num_layers": 2 * size, "sample_size": 8, "patch_size": 2, "out_channels": 4}
        more |= {"caption_projection_dim": 32 * size, "pos_embed_max_size": 8}
        inputs |= {"hidden_states": _numbers(2, 4, 8, 8)}
    else:
        more = {"num_layers": 2 * size, "sample_size": 8, "patch_size": 2, "out_channels": 4}
        more |= {"num_embeds_ada_norm": 10, "norm_num_groups": 4}
        inputs |= {"hidden_states": _numbers(2, 4, 8, 8), "class_labels": torch.tensor([1, 2])}
    return getattr(import_module("diffusers"), name)(**shape, **more), inputs


LLAMA = {"rotary_percentage": 1.0, "parallel_residual": False, "bias": False, "norm_class_name": "RMSNorm"}
GEMMA = {"mlp_class_name": "GemmaMLP", "scale_embeddings": True, "final_logit_softcapping": 30.0}
GEMMA |= {"attention_logit_softcapping": 50.0, "post_attention_norm": True, "post_mlp_norm": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "rotary_swiglu": {"rotary_pos_emb": True, "ff_swish": True, "ff_glu": True, "use_rmsnorm": True},
    "t5_bias": {"rel_pos_bias": True},
    "alibi": {"alibi_pos_bias": True, "alibi_num_heads": 2},
    "talking": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
    "mem_kv": {"attn_num_mem_kv": 4},
    "sandwich": {"sandwich_norm": True},
    "gate_residual": {"gate_residual": True},
    "residual_attn": {"residual_attn": True},
    "macaron": {"macaron": True},
    "post": {"pre_norm": False},
    "one_kv": {"attn_one_kv_head": True},
    "memory_tokens": {"wrapper": {"num_memory_tokens": 3}},
    "tied": {"wrapper": {"tie_embedding": True}},
}
MODELS = {f"x_transformers.{name}": partial(_x_transformer, **more) for name, more in VARIANTS.items()} | {
    "x_transformers.encdec": _encoder_decoder,
    **{f"rtdl.{name}": partial(_rtdl, name) for name in ("MLP", "ResNet", "FTTransformer")},
    "litgpt.pythia": partial(_litgpt, rotary_percentage=0.25, parallel_residual=True, bias=True),
    "litgpt.llama": partial(_litgpt, mlp_class_name="LLaMAMLP", **LLAMA),
    "litgpt.gemma2": partial(_litgpt, **LLAMA, **GEMMA),
    "litgpt.phi": partial(
        _litgpt, rotary_percentage=0.5, parallel_residual=True, shared_attention_norm=True, bias=True, lm_head_bias=True
    ),
    "litgpt.mixtral": partial(_litgpt, mlp_class_name="LLaMAMoE", n_expert=4, n_expert_per_token=2, **LLAMA),
    "esm.ESM2": _esm,
    "performer.LM": partial(_lm, "performer_pytorch", "PerformerLM", causal=False),
    "linear_attention_transformer.LM": partial(_lm, "linear_attention_transformer", "LinearAttentionTransformerLM"),
    "perceiver.Perceiver": partial(_perceiver, "Perceiver"),
    "perceiver.PerceiverIO": partial(_perceiver, "PerceiverIO"),
    "conformer.Conformer": _conformer,
    **{f"neuralforecast.{name}": partial(_neuralforecast, name) for name in ("PatchTST", "iTransformer", "LSTM")},
    "gluonts.PatchTST": _gluonts,
    "diffusers.DiT": partial(_diffusers, "DiTTransformer2DModel"),
    "diffusers.SD3": partial(_diffusers, "SD3Transformer2DModel"),
    "diffusers.Flux": partial(_diffusers, "FluxTransformer2DModel"),
}
