"""Attention logits where head_dim is not the base's.

The oracle is a module in which every coordinate of the base is there twice: its function is the base's but for the sums
over head_dim in its logits, which are twice the base's. Under the rule (logits proportional to 1/head_dim relative to
the base) both have the same loss, whatever factor the module itself puts on its logits, and where.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.architectures import LANGUAGE, TOKENS, VOCABULARY, Encoder
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from mlu_lightning import Plan, attach_multipliers, fold, initialize, scale_optimizer
from mlu_lightning.models import CausalTransformer
from mlu_lightning.planning.entries import Multiplier

HALF, ROOT = 0.5, math.sqrt(0.5)
RTOL = 1e-6  # Hugging Face models compute the loss in single precision
# rotary angles of doubled coordinates are not those of the base, unless all positions are 0
UNTURNED = LANGUAGE | {"position_ids": torch.zeros_like(TOKENS), "attention_mask": torch.ones_like(TOKENS)}
IMAGES = {"pixel_values": torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8), "labels": torch.tensor([0, 2])}


@dataclass(frozen=True)
class Case:
    """An attention at any head_dim, and the factor that its logits need where that is twice the base's.

    Args:
        build: module with a head_dim.
        example: input of its rehearsal.
        factor: of the logits.
    """

    build: Callable[[int], nn.Module]
    example: Any
    factor: float


def _hugging_face(name: str, head_dim_is_free: bool = True, **numbers: Any) -> Callable[[int], nn.Module]:
    """A causal language model with 4 heads; where head_dim is not free, the embedding grows with it.

    Numbers that depend on head_dim are given as functions of it.
    """

    def build(head_dim: int) -> nn.Module:
        given = {key: value(head_dim) if callable(value) else value for key, value in numbers.items()}
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        sizes |= {"hidden_size": 32, "head_dim": head_dim} if head_dim_is_free else {"hidden_size": 4 * head_dim}
        special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, **special, **(sizes | given))
        module: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
        return module

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
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 4 * head_dim, "intermediate_size": 64}
    return transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=8, **sizes)
    )


def _vit(head_dim: int) -> nn.Module:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 4 * head_dim, "intermediate_size": 64}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes)
    return transformers.ViTForImageClassification(config)


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

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        parts = (part(h).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        attended = getattr(self, self.how)(*parts)
        h = h + self.out(attended.transpose(1, 2).flatten(2))
        output: Tensor = self.readout(h)
        return output

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

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        packed = self.packed(h)
        value, key, query = packed[..., : self.size], packed[..., self.size : -self.size], packed[..., -self.size :]
        query, key, value = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (query, key, value))
        output: Tensor = self.readout(
            h + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        )
        return output


EXAMPLE = (torch.linspace(-1, 1, 24).reshape(2, 4, 3),)
LLAMA = _hugging_face("Llama", **GROUPED)
CASES: dict[str, Case] = {
    "causal transformer": Case(
        lambda dim: CausalTransformer(VOCABULARY, 8, 2, 32, heads=2, head_dim=dim), TOKENS, ROOT
    ),
    "pre-norm encoder": Case(lambda dim: Encoder(2, 2, 2 * dim, norm_first=True), (TOKENS,), ROOT),
    "post-norm encoder": Case(lambda dim: Encoder(2, 2, 2 * dim, norm_first=False), (TOKENS,), ROOT),
    "gpt2": Case(_hugging_face("GPT2", False, n_positions=8), LANGUAGE, ROOT),
    "gpt2, eager": Case(_hugging_face("GPT2", False, n_positions=8, attn_implementation="eager"), LANGUAGE, ROOT),
    "gpt-neox": Case(_hugging_face("GPTNeoX", False), UNTURNED, ROOT),
    "gpt-neo, unscaled": Case(
        _hugging_face("GPTNeo", False, attention_types=[[["global"], 2]], max_position_embeddings=8), LANGUAGE, HALF
    ),
    "llama": Case(LLAMA, UNTURNED, ROOT),
    "tied llama": Case(_hugging_face("Llama", tie_word_embeddings=True, **GROUPED), UNTURNED, ROOT),
    "phi3": Case(_hugging_face("Phi3", **GROUPED), UNTURNED, ROOT),
    "granite": Case(_hugging_face("Granite", attention_multiplier=0.3, **GROUPED), UNTURNED, HALF),
    "granite in µP form": Case(
        _hugging_face("Granite", attention_multiplier=lambda d: 3 / d, **GROUPED), UNTURNED, 1.0
    ),
    "gemma2": Case(_hugging_face("Gemma2", **GROUPED), UNTURNED, HALF),
    "gemma2, eager": Case(_hugging_face("Gemma2", attn_implementation="eager", **GROUPED), UNTURNED, HALF),
    "gemma2, scalar = head_dim": Case(
        _hugging_face("Gemma2", query_pre_attn_scalar=lambda d: d, **GROUPED), UNTURNED, ROOT
    ),
    "gemma3": Case(_hugging_face("Gemma3Text", **GROUPED), UNTURNED, HALF),
    "qwen3": Case(_hugging_face("Qwen3", **GROUPED), UNTURNED, ROOT),
    "olmo2": Case(_hugging_face("Olmo2", False, **GROUPED), UNTURNED, ROOT),
    "opt": Case(
        _hugging_face("OPT", False, ffn_dim=64, max_position_embeddings=16, word_embed_proj_dim=lambda d: 4 * d),
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


@pytest.fixture(autouse=True)
def _unturned(monkeypatch: pytest.MonkeyPatch) -> None:
    """All positions of ``CausalTransformer``, which takes none, are 0."""
    monkeypatch.setattr("mlu_lightning.models._rotate", lambda x, context: x)


def _pair(case: Case) -> tuple[nn.Module, nn.Module]:
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


def _loss(module: nn.Module, example: Any) -> Tensor:
    with torch.no_grad():
        if isinstance(example, dict):
            given = {k: v.double() if v.is_floating_point() else v for k, v in example.items()}
            loss: Tensor = module(**given).loss
            return loss
        (x,) = example if isinstance(example, tuple) else (example,)
        output = module(x.double() if x.is_floating_point() else x)
        return (output - torch.linspace(-1, 1, output.shape[-1])).square().mean()


def _logits(plan: Plan) -> list[Multiplier]:
    return [multiplier for multiplier in plan.multipliers if multiplier.kind == "logits"]


@pytest.mark.parametrize("name", CASES)
def test_a_logit_is_that_of_the_base(name: str) -> None:
    case = CASES[name]
    base, module = _pair(case)
    plan = Plan.from_model(module, case.example, base=base)
    assert [multiplier.value for multiplier in _logits(plan)] == [pytest.approx(case.factor)] * len(_logits(plan))
    assert _logits(plan)
    expected = _loss(base, case.example)
    without = replace(plan, multipliers=tuple(m for m in plan.multipliers if m.kind != "logits"))
    handle = attach_multipliers(module, without)
    if case.factor == 1:
        assert [multiplier.value for multiplier in _logits(plan)] == [1.0] * len(_logits(plan))
        torch.testing.assert_close(_loss(module, case.example), expected, rtol=RTOL, atol=0)
        return
    assert not torch.allclose(_loss(module, case.example), expected, rtol=1e-4, atol=0), (
        "the measurement sees no logits"
    )
    handle.remove()
    if all(multiplier.site is not None for multiplier in _logits(plan)):
        handle = attach_multipliers(module, plan)
        torch.testing.assert_close(_loss(module, case.example), expected, rtol=RTOL, atol=0)
        handle.remove()
    else:
        with pytest.raises(ValueError, match="cannot be attached as a hook"):
            attach_multipliers(module, plan)
    torch.testing.assert_close(_loss(fold(module, plan), case.example), expected, rtol=RTOL, atol=0)


class Channels(nn.Module):
    """Residual attention whose queries, keys and values are parts of what a convolution returns, by channels."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.embed, self.readout = nn.Linear(3, 16), nn.Linear(16, 2)
        self.packed, self.out = nn.Conv1d(16, 6 * head_dim, 1), nn.Linear(2 * head_dim, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        packed = self.packed(h.mT).mT.chunk(3, -1)
        query, key, value = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in packed)
        attended = F.scaled_dot_product_attention(query, key, value)
        output: Tensor = self.readout(h + self.out(attended.transpose(1, 2).flatten(2)))
        return output


def _changed(how: str, head_dim: int = 16) -> Plan:
    return Plan.from_model(Plain(how, head_dim), EXAMPLE, base=Plain(how, 8))


@pytest.mark.parametrize("how", ["filled_tensor", "in_place", "for_each_head"])
def test_a_factor_that_cannot_be_read(how: str) -> None:
    message = (
        r"head_dim of .* is 16 and the base's is 8, so its logits have to be multiplied, but the factor that the module "
        r"itself puts on them cannot be read.*Multiply queries times keys by a Python number.*or keep head_dim"
    )
    with pytest.raises(ValueError, match=message):
        _changed(how)
    with pytest.raises(ValueError, match=r"the factor that the base itself puts on them cannot be read"):
        Plan.from_model(Plain("divided", 16), EXAMPLE, base=Plain(how, 8))
    same = _changed(how, head_dim=8)
    assert (same.warnings, _logits(same), same.branches[0].logits_scale) == ((), [], None)


@pytest.mark.parametrize("how", ["normalized", "normalized_queries", "shifted", "queries_for_keys"])
def test_queries_that_cannot_be_multiplied(how: str) -> None:
    """What is before a norm or a constant, or makes keys too, does not multiply logits; an identity after it does."""
    message = (
        r"head_dim of .* is 16 and the base's is 8, so its logits have to be multiplied by 0\.7071, but its queries can "
        r"be multiplied nowhere.*pass the queries through a submodule of their own, after their norm"
    )
    with pytest.raises(ValueError, match=message):
        _changed(how)
    assert not _changed(how, head_dim=8).warnings


def test_parts_that_are_not_in_the_last_dimension() -> None:
    with pytest.raises(ValueError, match="its queries can be multiplied nowhere: they are made together with keys"):
        Plan.from_model(Channels(16), EXAMPLE, base=Channels(8))


def test_a_factor_that_differs_along_the_depth() -> None:
    build = _hugging_face("GPT2", False, n_positions=8, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(
        ValueError, match=r"the module itself puts on them cannot be read.*or is not the same in all blocks"
    ):
        Plan.from_model(build(16), LANGUAGE, base=build(8))
    assert not Plan.from_model(build(8), LANGUAGE, base=build(8)).warnings


def test_a_factor_that_differs_where_head_dim_does_not() -> None:
    """Nothing is multiplied: it is a hyperparameter as others are."""
    module, base = (_hugging_face("Granite", attention_multiplier=c, **GROUPED)(8) for c in (0.1, 0.3))
    plan = Plan.from_model(module, LANGUAGE, base=base)
    assert (_logits(plan), plan.warnings) == ([], ())
    assert (plan.branches[0].logits_scale, plan.branches[0].base_logits_scale) == (0.1, 0.3)


@pytest.mark.parametrize("name", ["granite", "qwen3", "gpt-neox", "plain, cosine"])
def test_a_saved_plan_as_the_base(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, module, path = case.build(8), case.build(16), tmp_path / "plan.yaml"
    Plan.from_model(case.build(4), case.example, base=base).save(path)
    assert Plan.load(path) == Plan.from_model(case.build(4), case.example, base=base)
    found = Plan.from_model(module, case.example, base=path)
    assert found.multipliers == Plan.from_model(module, case.example, base=base).multipliers
    assert found.base == Plan.from_model(module, case.example, base=base).base


@pytest.mark.parametrize(
    ("name", "site", "folds"),
    [
        ("qwen3", "model.layers.0.self_attn.q_norm output", ("model.layers.0.self_attn.q_norm.weight",)),
        ("olmo2", "model.layers.0.self_attn.q_norm output", ("model.layers.0.self_attn.q_norm.weight",)),
        ("gemma3", "model.layers.0.self_attn.q_norm output", ()),  # which holds its gain less 1
        ("gpt-neox", "gpt_neox.layers.0.attention.query_key_value output, entries 0 to 16 of every 48", ()),
        ("phi3", "model.layers.0.self_attn.qkv_proj output, entries 0 to 64", ()),
        ("slices", "packed output, entries 64 to 96", ()),
        ("plain, normalized_with_gain", "None", ("gain",)),
        ("plain, normalized_for_a_module", "identity output", ()),
    ],
)
def test_where_queries_are_multiplied(name: str, site: str, folds: tuple[str, ...]) -> None:
    plan = Plan.from_model(CASES[name].build(16), CASES[name].example, base=CASES[name].build(8))
    assert (str(_logits(plan)[0].site), _logits(plan)[0].folds) == (site, folds)


def test_a_gain_that_holds_the_factor_trains_as_the_gain_does() -> None:
    """Qwen3's queries, multiplied by a hook after their norm and by their gain."""
    torch.manual_seed(0)
    case = CASES["qwen3"]
    hooked = case.build(16).double()
    plan = Plan.from_model(hooked, case.example, base=case.build(8))
    folded = fold(copy.deepcopy(hooked), plan)
    attach_multipliers(hooked, plan)
    losses = []
    for module in (hooked, folded):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, eps=1e-2, weight_decay=0.1)
        scale_optimizer(optimizer, module, plan)
        for _ in range(5):
            optimizer.zero_grad()
            loss = module(**case.example).loss
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=RTOL, atol=0)
    gains = [module.get_parameter("model.layers.0.self_attn.q_norm.weight") for module in (hooked, folded)]
    assert (gains[0] - 1).abs().max() > 1e-3
    torch.testing.assert_close(gains[1], gains[0] * ROOT, rtol=RTOL, atol=0)


def _deepseek(heads: int, query_dim: int, value_dim: int) -> nn.Module:
    """Latent attention: keys and values of different dimensions from one matrix, a part of keys shared by heads."""
    build = _hugging_face(
        "DeepseekV3",
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=query_dim - 4,
        qk_rope_head_dim=4,
        v_head_dim=value_dim,
        first_k_dense_replace=2,
    )
    return build(4)


@pytest.mark.parametrize(
    ("heads", "query_dim", "value_dim", "m"), [(8, 12, 6, 2.0), (4, 20, 6, 1.0), (4, 12, 18, 3.0), (8, 20, 12, 4.0)]
)
def test_values_of_another_dimension_than_keys(heads: int, query_dim: int, value_dim: int, m: float) -> None:
    """The hidden width is that of what the output matrix reads, heads times value_dim; logits follow query_dim."""
    torch.manual_seed(0)
    base, module = _deepseek(4, 12, 6), _deepseek(heads, query_dim, value_dim)
    plan = Plan.from_model(module, LANGUAGE, base=base)
    assert (plan.branches[0].hidden, plan.branches[0].head_dim) == (heads, query_dim)
    planned = plan.parameters["model.layers.0.self_attn.o_proj.weight"]
    assert (str(planned.role), planned.ratios.inputs) == ("branch_out", m)
    assert planned.fans[0] == heads * value_dim
    by_hand = copy.deepcopy(module)
    for layer in by_hand.model.layers:
        layer.self_attn.scaling = 12**-0.5 * 12 / query_dim
    expected = _loss(by_hand, LANGUAGE)
    attach_multipliers(module, replace(plan, multipliers=tuple(_logits(plan))))
    torch.testing.assert_close(_loss(module, LANGUAGE), expected, rtol=RTOL, atol=0)
    assert bool(plan.warnings) == (query_dim != 12)


@pytest.mark.parametrize(("heads", "key_heads"), [(8, 4), (8, 2), (4, 4)])
def test_ratios_of_grouped_queries(heads: int, key_heads: int) -> None:
    """Hidden units are query heads for W_Q and W_O, and key heads for W_K and W_V, of which the base has 4 and 2."""
    build = _hugging_face("Llama", num_attention_heads=heads, num_key_value_heads=key_heads)
    plan = Plan.from_model(build(8), LANGUAGE, base=LLAMA(8))
    found = {
        part: (str(planned.role), planned.ratios.inputs, planned.ratios.outputs)
        for part in "qkvo"
        for planned in [plan.parameters[f"model.layers.1.self_attn.{part}_proj.weight"]]
    }
    assert found == {
        "q": ("branch_in", 1.0, heads / 4),
        "k": ("branch_in", 1.0, key_heads / 2),
        "v": ("branch_in", 1.0, key_heads / 2),
        "o": ("branch_out", heads / 4, 1.0),
    }
    # n and g of theory.md, section 3: a key head's gradient is the sum over its group, 1/(l m) with m of key heads
    scales = plan.scales("sgd")
    assert scales["model.layers.1.self_attn.k_proj.weight"].lr == key_heads / 2
    assert scales["model.layers.1.self_attn.q_proj.weight"].lr == heads / 4
    assert _logits(plan) == []


class TwoBlocks(nn.Module):
    """Two residual attentions on tokens, with or without a norm of queries and keys, that keep their logits."""

    def __init__(self, head_dim: int, norm: bool) -> None:
        super().__init__()
        self.embed, self.readout = nn.Embedding(VOCABULARY, 64), nn.Linear(64, VOCABULARY, bias=False)
        self.blocks = nn.ModuleList(self._block(head_dim, norm) for _ in range(2))
        self.logits: list[Tensor] = []

    @staticmethod
    def _block(head_dim: int, norm: bool) -> nn.ModuleDict:
        parts: dict[str, nn.Module] = {"norm": nn.RMSNorm(64)}
        parts |= {part: nn.Linear(64, 4 * head_dim, bias=False) for part in ("query", "key", "value")}
        parts |= {f"{part}_norm": nn.RMSNorm(head_dim) if norm else nn.Identity() for part in ("query", "key")}
        return nn.ModuleDict(parts | {"out": nn.Linear(4 * head_dim, 64, bias=False)})

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens)
        self.logits.clear()
        for block in self.blocks:
            x = block["norm"](h)
            query, key, value = (
                block[part](x).unflatten(-1, (4, -1)).transpose(1, 2) for part in ("query", "key", "value")
            )
            logits = block["query_norm"](query) @ block["key_norm"](key).mT * query.shape[-1] ** -0.5
            self.logits.append(logits)
            h = h + block["out"]((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))
        output: Tensor = self.readout(h)
        return output


def _moved(head_dim: int, norm: bool, multiplied: bool) -> float:
    """Root mean square by which attention logits have changed after ten steps of AdamW."""
    tokens = torch.randint(VOCABULARY, (32, 16), generator=torch.Generator().manual_seed(7))
    tokens[:, 8:] = tokens[:, :8]
    changes = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        base, module = TwoBlocks(16, norm), TwoBlocks(head_dim, norm)
        plan = Plan.from_model(module, (tokens,), base=base)
        initialize(module, plan, "normal", seed=seed)
        if not multiplied:
            plan = replace(plan, multipliers=tuple(m for m in plan.multipliers if m.kind != "logits"))
        attach_multipliers(module, plan)
        optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.0)
        scale_optimizer(optimizer, module, plan)
        seen = []
        for _ in range(11):
            output = module(tokens)
            seen.append(torch.stack(module.logits).detach())
            optimizer.zero_grad()
            F.cross_entropy(output[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
        changes.append((seen[-1] - seen[0]).square().mean().sqrt().item())
    return sum(changes) / len(changes)


@pytest.mark.parametrize("norm", [False, True])
def test_logits_move_as_far_at_every_head_dim(norm: bool) -> None:
    """Queries and keys become correlated, so that 1/sqrt(head_dim) is too much, with query-key norm and without."""
    at_base = _moved(16, norm, multiplied=True)
    assert 0.7 < _moved(64, norm, multiplied=True) / at_base < 1.3
    assert _moved(64, norm, multiplied=False) / at_base > 1.4
