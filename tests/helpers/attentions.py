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
class Case:  # an attention at any head_dim, and the factor that its logits need where that is twice the base's
    build: Callable[[int], nn.Module]
    example: Any
    factor: float


def built(name: str, head: str, **numbers: Any) -> Callable[[int], nn.Module]:
    """A model of transformers; numbers that depend on head_dim are given as functions of it."""

    def build(head_dim: int) -> nn.Module:
        given = {key: value(head_dim) if callable(value) else value for key, value in numbers.items()}
        config = getattr(transformers, f"{name}Config")(**given)
        return getattr(transformers, f"AutoModelFor{head}").from_config(config)

    return build


def hugging_face(name: str, head_dim_is_free: bool = True, **numbers: Any) -> Callable[[int], nn.Module]:
    """A causal language model with 4 heads; where head_dim is not free, the embedding grows with it."""
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {"hidden_size": 32, "head_dim": int} if head_dim_is_free else {"hidden_size": lambda dim: 4 * dim}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return built(name, "CausalLM", vocab_size=VOCABULARY, **special, **(sizes | numbers))


GROUPED = {"num_key_value_heads": 2}
_BART = {"layers": 1, "attention_heads": 4, "ffn_dim": 64}


fused = F.scaled_dot_product_attention


def rms_normed(part: Tensor, gain: Tensor | None = None) -> Tensor:
    return F.rms_norm(part, part.shape[-1:], gain)


def added_to_biases(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    biases = torch.linspace(0, 1, q.shape[2], dtype=q.dtype).expand(1, 1, -1)
    logits = torch.baddbmm(biases, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0.7, alpha=net.head_dim**-0.5)
    return (logits.softmax(-1) @ v.flatten(0, 1)).unflatten(0, q.shape[:2])


def cosine_by_hand(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * torch.rsqrt(q.square().sum(-1, keepdim=True) + 1e-12)
    return (3 * (q @ (k / k.norm(dim=-1, keepdim=True)).mT)).softmax(-1) @ v


def in_place(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q *= net.head_dim**-0.5
    return (q @ k.mT).softmax(-1) @ v


def masked_and_capped(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = torch.tanh(0.3 * (q @ k.mT) / 5) * 5
    return logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -1e9).softmax(-1) @ v


def normalized_by_hand(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = net.gain * (q / (q.norm(dim=-1, keepdim=True) * net.head_dim**-0.5))
    return fused(q, k * torch.rsqrt(k.pow(2).mean(-1, keepdim=True)), v)


def quarter_powers(net: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhqd,bhkd->bhqk", q * net.head_dim**-0.25, k / net.head_dim**0.25).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def _of_logits(logits: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda net, q, k, v: logits(net, q, k).softmax(-1) @ v


FORMS: dict[str, Callable[..., Tensor]] = {
    "fused": lambda net, q, k, v: fused(q, k, v),
    "fused_with_scale": lambda net, q, k, v: fused(q, k, v, scale=0.3),
    "fused_in_mup_form": lambda net, q, k, v: fused(q, k, v, scale=3 / net.head_dim),
    # in training no kernel takes dropout on the CPU: torch writes the product out
    "fused_with_dropout": lambda net, q, k, v: fused(q, k, v, dropout_p=0.1 * net.training, scale=0.3),
    "normalized": lambda net, q, k, v: fused(rms_normed(q), rms_normed(k), v),
    "normalized_with_gain": lambda net, q, k, v: fused(rms_normed(q, net.gain), rms_normed(k), v),
    "normalized_for_a_module": lambda net, q, k, v: fused(net.identity(rms_normed(q)), rms_normed(k), v),
    "normalized_keys": lambda net, q, k, v: fused(q, rms_normed(k), v),
    "shifted": lambda net, q, k, v: fused(q + net.gain, k, v),
    "queries_for_keys": lambda net, q, k, v: fused(q, q + k, v),
    "divided": _of_logits(lambda net, q, k: q @ k.mT / math.sqrt(net.head_dim)),
    "unscaled": _of_logits(lambda net, q, k: q @ k.mT),
    "constant_tensor": _of_logits(lambda net, q, k: q @ k.mT / torch.sqrt(torch.tensor(net.head_dim))),
    "buffer": _of_logits(lambda net, q, k: q @ k.mT * net.factor),
    "learned": _of_logits(lambda net, q, k: q @ k.mT / net.head_dim * net.temperature),
    "cosine": _of_logits(lambda net, q, k: F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * net.temperature.exp()),
    "normalized_queries": _of_logits(lambda net, q, k: F.normalize(q, dim=-1) @ k.mT),
    "filled_tensor": _of_logits(lambda net, q, k: q @ k.mT / torch.full([], net.head_dim**0.5)),
    "for_each_head": _of_logits(lambda net, q, k: q @ k.mT * torch.tensor([0.1, 0.2]).reshape(2, 1, 1).to(q)),
}
for form in (added_to_biases, cosine_by_hand, in_place, masked_and_capped, normalized_by_hand, quarter_powers):
    FORMS[form.__name__] = form


class Plain(nn.Module):  # one residual attention with 2 heads, of one of the forms
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
        return self.readout(h + self.out(FORMS[self.how](self, *parts).transpose(1, 2).flatten(2)))


class Packed(nn.Module):
    """Residual attention whose queries, keys and values, [..., heads, head_dim], are split from what one layer makes."""

    def __init__(self, units: int, layer: nn.Module, split: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.embed, self.readout = nn.Linear(3, 16), nn.Linear(16, 2)
        self.packed, self.out, self.split = layer, nn.Linear(units, 16), split

    def forward(self, x: Tensor) -> Any:
        h = self.embed(x)
        parts = (part.transpose(1, 2) for part in self.split(self.packed, h))
        return self.readout(h + self.out(fused(*parts).transpose(1, 2).flatten(2)))


def slices(head_dim: int) -> Packed:
    """Queries are the last third."""
    size = 2 * head_dim

    def split(layer: nn.Module, h: Tensor) -> Any:
        made = layer(h)
        thirds = made[..., -size:], made[..., size:-size], made[..., :size]
        return (third.unflatten(-1, (2, -1)) for third in thirds)

    return Packed(size, nn.Linear(16, 3 * size), split)


EXAMPLE = (torch.linspace(-1, 1, 24).reshape(2, 4, 3),)
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART: dict[str, Any] = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in _BART.items()}
BART |= {"vocab_size": VOCABULARY, "max_position_embeddings": 16}
ENCODER: dict[str, Any] = {"hidden_size": lambda dim: 4 * dim, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER |= {"intermediate_size": 64}
GPT_NEO = {"attention_types": [[["global"], 2]], "max_position_embeddings": 8}
OPT = {"ffn_dim": 64, "max_position_embeddings": 16, "word_embed_proj_dim": lambda head_dim: 4 * head_dim}
CASES: dict[str, Case] = {
    "causal transformer": Case(lambda dim: CausalTransformer(VOCABULARY, 8, 2, 32, 2, head_dim=dim), TOKENS, ROOT),
    "pre-norm encoder": Case(lambda dim: Encoder(2, 2, 2 * dim, norm_first=True), (TOKENS,), ROOT),
    "post-norm encoder": Case(lambda dim: Encoder(2, 2, 2 * dim, norm_first=False), (TOKENS,), ROOT),
    "gpt2": Case(hugging_face("GPT2", False, n_positions=8), LANGUAGE, ROOT),
    "gpt2, eager": Case(hugging_face("GPT2", False, n_positions=8, attn_implementation="eager"), LANGUAGE, ROOT),
    "gpt-neox": Case(hugging_face("GPTNeoX", False), UNTURNED, ROOT),
    "gpt-neo, unscaled": Case(hugging_face("GPTNeo", False, **GPT_NEO), LANGUAGE, HALF),
    "llama": Case(hugging_face("Llama", **GROUPED), UNTURNED, ROOT),
    "tied llama": Case(hugging_face("Llama", tie_word_embeddings=True, **GROUPED), UNTURNED, ROOT),
    "phi3": Case(hugging_face("Phi3", **GROUPED), UNTURNED, ROOT),
    "granite": Case(hugging_face("Granite", attention_multiplier=0.3, **GROUPED), UNTURNED, HALF),
    "granite in µP form": Case(hugging_face("Granite", attention_multiplier=lambda d: 3 / d, **GROUPED), UNTURNED, 1.0),
    "gemma2": Case(hugging_face("Gemma2", **GROUPED), UNTURNED, HALF),
    "gemma2, eager": Case(hugging_face("Gemma2", attn_implementation="eager", **GROUPED), UNTURNED, HALF),
    "gemma2, scalar = head_dim": Case(hugging_face("Gemma2", query_pre_attn_scalar=int, **GROUPED), UNTURNED, ROOT),
    "gemma3": Case(hugging_face("Gemma3Text", **GROUPED), UNTURNED, HALF),
    "qwen3": Case(hugging_face("Qwen3", **GROUPED), UNTURNED, ROOT),
    "olmo2": Case(hugging_face("Olmo2", False, **GROUPED), UNTURNED, ROOT),
    "opt": Case(hugging_face("OPT", False, **OPT), LANGUAGE, ROOT),
    "bart": Case(built("Bart", "Seq2SeqLM", d_model=lambda dim: 4 * dim, **BART), LANGUAGE, ROOT),
    "t5": Case(built("T5", "Seq2SeqLM", d_kv=int, **T5), LANGUAGE, HALF),
    "bert": Case(
        built("Bert", "MaskedLM", vocab_size=VOCABULARY, max_position_embeddings=8, **ENCODER), LANGUAGE, ROOT
    ),
    "vit": Case(built("ViT", "ImageClassification", image_size=8, patch_size=4, num_labels=3, **ENCODER), IMAGES, ROOT),
    "slices": Case(slices, EXAMPLE, ROOT),
} | {
    f"plain, {how}": Case(lambda dim, how=how: Plain(how, dim), EXAMPLE, factor)  # type: ignore[misc]
    for factor, names in {
        1.0: "fused_in_mup_form learned cosine cosine_by_hand",
        HALF: "fused_with_scale fused_with_dropout unscaled masked_and_capped",
        ROOT: """fused divided quarter_powers added_to_biases constant_tensor buffer normalized_with_gain normalized_by_hand
        normalized_for_a_module normalized_keys""",
    }.items()
    for how in names.split()
}


def loss_of(module: nn.Module, example: Any) -> Any:
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
    made = attention.query(given), attention.key(given)
    query, key = (part.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in made)
    length, half = query.shape[-2], query.shape[-1] // 2
    angles = torch.outer(torch.arange(length), float(attention.context) ** -torch.linspace(0, 1, half))
    turn = torch.polar(torch.ones_like(angles), angles)
    query, key = (torch.complex(part[..., :half], part[..., half:]) * turn for part in (query, key))
    logits = (query @ key.conj().transpose(-2, -1)).real / math.sqrt(2 * half)
    return logits.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
