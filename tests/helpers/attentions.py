"""Attentions that put factors on their logits in many ways and places, at any head_dim."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from helpers.architectures import LANGUAGE, TOKENS, VOCABULARY, Encoder
from mlu_lightning import Plan
from mlu_lightning.models import Attention, CausalTransformer
from mlu_lightning.planning.entries import Multiplier

RTOL = 1e-6  # Hugging Face models compute the loss in single precision
HALF, ROOT = 0.5, math.sqrt(0.5)
# rotary angles of doubled coordinates are not those of the base, unless all positions are 0
UNTURNED = LANGUAGE | {"position_ids": torch.zeros_like(TOKENS), "attention_mask": torch.ones_like(TOKENS)}
IMAGES = {"pixel_values": torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8), "labels": torch.tensor([0, 2])}


@dataclass(frozen=True)
class Case:
    """An attention at any head_dim, and the factor that its logits need where that is twice the base's."""

    build: Callable[[int], nn.Module]
    example: Any
    factor: float


def hugging_face(name: str, head_dim_is_free: bool = True, **numbers: Any) -> Callable[[int], nn.Module]:
    """A causal language model with 4 heads; where head_dim is not free, the embedding grows with it.

    Numbers that depend on head_dim are given as functions of it.
    """

    def build(head_dim: int) -> nn.Module:
        given = {key: value(head_dim) if callable(value) else value for key, value in numbers.items()}
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        sizes |= {"hidden_size": 32, "head_dim": head_dim} if head_dim_is_free else {"hidden_size": 4 * head_dim}
        special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, **special, **(sizes | given))
        return transformers.AutoModelForCausalLM.from_config(config)

    return build


GROUPED = {"num_key_value_heads": 2}


def _t5(head_dim: int) -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_kv=head_dim, decoder_start_token_id=0, **sizes)
    )


def _bart(head_dim: int) -> nn.Module:
    parts = ("encoder", "decoder")
    sizes = {
        f"{part}_{what}": n for part in parts for what, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 64))
    }
    config = transformers.BartConfig(vocab_size=VOCABULARY, d_model=4 * head_dim, max_position_embeddings=16, **sizes)
    return transformers.BartForConditionalGeneration(config)


def _bert(head_dim: int) -> nn.Module:
    sizes = _ENCODER | {"hidden_size": 4 * head_dim}
    config = transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=8, **sizes)
    return transformers.BertForMaskedLM(config)


def _vit(head_dim: int) -> nn.Module:
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_labels=3, **_ENCODER | {"hidden_size": 4 * head_dim}
    )
    return transformers.ViTForImageClassification(config)


_ENCODER = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


class Plain(nn.Module):
    """One residual attention with 2 heads, whose logits are made by the method of the name ``how``."""

    def __init__(self, how: str, head_dim: int) -> None:
        super().__init__()
        self.how, self.head_dim = how, head_dim
        self.embed, self.readout = nn.Linear(3, 16), nn.Linear(16, 2)
        self.query, self.key, self.value = (nn.Linear(16, 2 * head_dim) for _ in range(3))
        self.out = nn.Linear(2 * head_dim, 16)
        if how in ("learned", "cosine"):
            self.temperature = nn.Parameter(torch.full((2, 1, 1), 2.0))
        if how in ("normalized_with_gain", "normalized_by_hand", "shifted"):
            self.gain = nn.Parameter(torch.ones(head_dim))
        self.register_buffer("factor", torch.tensor(head_dim**-0.5, dtype=torch.double))
        self.identity = nn.Identity()

    def forward(self, x: Tensor) -> Any:
        h = self.embed(x)
        parts = (part(h).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        attended: Tensor = getattr(self, self.how)(*parts)
        return self.readout(h + self.out(attended.transpose(1, 2).flatten(2)))

    def fused(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    def fused_with_scale(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=0.3)

    def fused_in_mup_form(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=3 / self.head_dim)

    def fused_with_dropout(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """In training no kernel takes dropout on the CPU: torch writes the product out."""
        return F.scaled_dot_product_attention(query, key, value, dropout_p=0.1 * self.training, scale=0.3)

    def divided(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT / math.sqrt(self.head_dim)).softmax(-1) @ value

    def unscaled(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT).softmax(-1) @ value

    def masked_and_capped(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logits = torch.tanh(0.3 * (query @ key.mT) / 5) * 5
        return logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -1e9).softmax(-1) @ value

    def quarter_powers(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = query * self.head_dim**-0.25, key / self.head_dim**0.25
        weights = torch.einsum("bhqd,bhkd->bhqk", query, key).softmax(-1)
        return torch.einsum("bhqk,bhkd->bhqd", weights, value)

    def added_to_biases(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        biases = torch.linspace(0, 1, query.shape[2], dtype=query.dtype).expand(1, 1, -1)
        logits = torch.baddbmm(biases, query.flatten(0, 1), key.flatten(0, 1).mT, beta=0.7, alpha=self.head_dim**-0.5)
        return (logits.softmax(-1) @ value.flatten(0, 1)).unflatten(0, query.shape[:2])

    def constant_tensor(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT / torch.sqrt(torch.tensor(self.head_dim))).softmax(-1) @ value

    def buffer(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT * self.factor).softmax(-1) @ value

    def learned(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT / self.head_dim * self.temperature).softmax(-1) @ value

    def cosine(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logits = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT
        return (logits * self.temperature.exp()).softmax(-1) @ value

    def cosine_by_hand(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = query * torch.rsqrt(query.square().sum(-1, keepdim=True) + 1e-12)
        return (3 * (query @ (key / key.norm(dim=-1, keepdim=True)).mT)).softmax(-1) @ value

    def normalized_queries(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (F.normalize(query, dim=-1) @ key.mT).softmax(-1) @ value

    def normalized(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.fused(F.rms_norm(query, query.shape[-1:]), F.rms_norm(key, key.shape[-1:]), value)

    def normalized_with_gain(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.fused(F.rms_norm(query, query.shape[-1:], self.gain), F.rms_norm(key, key.shape[-1:]), value)

    def normalized_by_hand(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query = self.gain * (query / (query.norm(dim=-1, keepdim=True) * self.head_dim**-0.5))
        return self.fused(query, key * torch.rsqrt(key.pow(2).mean(-1, keepdim=True)), value)

    def normalized_for_a_module(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.normalized_keys(self.identity(F.rms_norm(query, query.shape[-1:])), key, value)

    def normalized_keys(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.fused(query, F.rms_norm(key, key.shape[-1:]), value)

    def shifted(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.fused(query + self.gain, key, value)

    def queries_for_keys(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.fused(query, query + key, value)

    def filled_tensor(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT / torch.full([], self.head_dim**0.5)).softmax(-1) @ value

    def in_place(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query *= self.head_dim**-0.5
        return (query @ key.mT).softmax(-1) @ value

    def for_each_head(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT * torch.tensor([0.1, 0.2]).reshape(2, 1, 1).to(query)).softmax(-1) @ value


class Slices(nn.Module):
    """Residual attention whose queries are the last third of what its projection returns."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.embed, self.readout = nn.Linear(3, 16), nn.Linear(16, 2)
        self.packed, self.out = nn.Linear(16, 6 * head_dim), nn.Linear(2 * head_dim, 16)
        self.size = 2 * head_dim

    def forward(self, x: Tensor) -> Any:
        h = self.embed(x)
        packed = self.packed(h)
        value, key, query = packed[..., : self.size], packed[..., self.size : -self.size], packed[..., -self.size :]
        query, key, value = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.readout(h + self.out(attended.transpose(1, 2).flatten(2)))


EXAMPLE = (torch.linspace(-1, 1, 24).reshape(2, 4, 3),)
LLAMA = hugging_face("Llama", **GROUPED)
CASES: dict[str, Case] = {
    "causal transformer": Case(
        lambda dim: CausalTransformer(VOCABULARY, 8, 2, 32, heads=2, head_dim=dim), TOKENS, ROOT
    ),
    "pre-norm encoder": Case(lambda dim: Encoder(2, 2, 2 * dim, norm_first=True), (TOKENS,), ROOT),
    "post-norm encoder": Case(lambda dim: Encoder(2, 2, 2 * dim, norm_first=False), (TOKENS,), ROOT),
    "gpt2": Case(hugging_face("GPT2", False, n_positions=8), LANGUAGE, ROOT),
    "gpt2, eager": Case(hugging_face("GPT2", False, n_positions=8, attn_implementation="eager"), LANGUAGE, ROOT),
    "gpt-neox": Case(hugging_face("GPTNeoX", False), UNTURNED, ROOT),
    "gpt-neo, unscaled": Case(
        hugging_face("GPTNeo", False, attention_types=[[["global"], 2]], max_position_embeddings=8), LANGUAGE, HALF
    ),
    "llama": Case(LLAMA, UNTURNED, ROOT),
    "tied llama": Case(hugging_face("Llama", tie_word_embeddings=True, **GROUPED), UNTURNED, ROOT),
    "phi3": Case(hugging_face("Phi3", **GROUPED), UNTURNED, ROOT),
    "granite": Case(hugging_face("Granite", attention_multiplier=0.3, **GROUPED), UNTURNED, HALF),
    "granite in µP form": Case(hugging_face("Granite", attention_multiplier=lambda d: 3 / d, **GROUPED), UNTURNED, 1.0),
    "gemma2": Case(hugging_face("Gemma2", **GROUPED), UNTURNED, HALF),
    "gemma2, eager": Case(hugging_face("Gemma2", attn_implementation="eager", **GROUPED), UNTURNED, HALF),
    "gemma2, scalar = head_dim": Case(
        hugging_face("Gemma2", query_pre_attn_scalar=lambda d: d, **GROUPED), UNTURNED, ROOT
    ),
    "gemma3": Case(hugging_face("Gemma3Text", **GROUPED), UNTURNED, HALF),
    "qwen3": Case(hugging_face("Qwen3", **GROUPED), UNTURNED, ROOT),
    "olmo2": Case(hugging_face("Olmo2", False, **GROUPED), UNTURNED, ROOT),
    "opt": Case(
        hugging_face("OPT", False, ffn_dim=64, max_position_embeddings=16, word_embed_proj_dim=lambda d: 4 * d),
        LANGUAGE,
        ROOT,
    ),
    "bart": Case(_bart, LANGUAGE, ROOT),
    "t5": Case(_t5, LANGUAGE, HALF),
    "bert": Case(_bert, LANGUAGE, ROOT),
    "vit": Case(_vit, IMAGES, ROOT),
    "slices": Case(Slices, EXAMPLE, ROOT),
} | {
    f"plain, {how}": Case(lambda dim, how=how: Plain(how, dim), EXAMPLE, factor)  # type: ignore[misc]
    for how, factor in {
        "fused": ROOT,
        "fused_with_scale": HALF,
        "fused_in_mup_form": 1.0,
        "fused_with_dropout": HALF,
        "divided": ROOT,
        "unscaled": HALF,
        "masked_and_capped": HALF,
        "quarter_powers": ROOT,
        "added_to_biases": ROOT,
        "constant_tensor": ROOT,
        "buffer": ROOT,
        "learned": 1.0,
        "cosine": 1.0,
        "cosine_by_hand": 1.0,
        "normalized_with_gain": ROOT,
        "normalized_by_hand": ROOT,
        "normalized_for_a_module": ROOT,
        "normalized_keys": ROOT,
    }.items()
}


def loss_of(module: nn.Module, example: Any) -> Any:
    """Loss of a module in double precision."""
    with torch.no_grad():
        if isinstance(example, dict):
            given = {k: v.double() if v.is_floating_point() else v for k, v in example.items()}
            return module(**given).loss
        (x,) = example if isinstance(example, tuple) else (example,)
        output = module(x.double() if x.is_floating_point() else x)
        return (output - torch.linspace(-1, 1, output.shape[-1])).square().mean()


def logits_of(plan: Plan) -> list[Multiplier]:
    return [multiplier for multiplier in plan.multipliers if multiplier.kind == "logits"]


def base_and_doubled(case: Case) -> tuple[nn.Module, nn.Module]:
    """The base, and a module of twice its head_dim that has every coordinate of the base twice."""
    torch.manual_seed(0)
    base, module = case.build(8).double().eval(), case.build(16).double().eval()
    readouts = ("readout.weight", "lm_head.weight", "classifier.weight")  # the plan has a multiplier for these
    small = dict(base.named_parameters())
    with torch.no_grad():
        for parameter in small.values():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1) + (parameter.ndim == 1))
        for name, parameter in module.named_parameters():
            value = small[name].data
            for axis, (length, of_base) in enumerate(zip(parameter.shape, value.shape, strict=True)):
                assert length in (of_base, 2 * of_base)
                if length != of_base:
                    value = value.repeat_interleave(2, axis)
                    inputs = _input_axis(module.get_submodule(name.rpartition(".")[0]))
                    value = value / 2 if parameter.ndim == 2 and axis == inputs and name not in readouts else value
            parameter.copy_(value)
    return base, module


def _input_axis(owner: nn.Module) -> int | None:
    if isinstance(owner, Conv1D):
        return 0
    return 1 if isinstance(owner, (nn.Linear, nn.MultiheadAttention)) else None


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
    return logits.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
