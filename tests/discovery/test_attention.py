"""Attention logits where head_dim is not the base's.

The oracle is a module in which every coordinate of the base is there twice: its function is the base's but for the sums
over head_dim in its logits, which are twice the base's. Under the rule (logits proportional to 1/head_dim relative to
the base) both have the same loss, whatever factor the module itself puts on its logits, and where.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.architectures import LANGUAGE
from helpers.attentions import (
    CASES,
    EXAMPLE,
    GROUPED,
    ROOT,
    RTOL,
    Plain,
    base_and_doubled,
    hugging_face,
    logits_of,
    loss_of,
)
from torch import Tensor, nn
from torch.nn import functional as F

from mlu_lightning import Plan, attach_multipliers, fold, scale_optimizer


@pytest.fixture(autouse=True)
def _unturned(monkeypatch: pytest.MonkeyPatch) -> None:
    """All positions of ``CausalTransformer``, which takes none, are 0."""
    monkeypatch.setattr("mlu_lightning.models._rotate", lambda x, context: x)


@pytest.mark.parametrize("name", CASES)
def test_a_logit_is_that_of_the_base(name: str) -> None:
    case = CASES[name]
    base, module = base_and_doubled(case)
    plan = Plan.from_model(module, case.example, base=base)
    multipliers = logits_of(plan)
    assert multipliers and {m.value for m in multipliers} == {multipliers[0].value}
    assert multipliers[0].value == pytest.approx(case.factor)
    expected = loss_of(base, case.example)
    without = replace(plan, multipliers=tuple(m for m in plan.multipliers if m.kind != "logits"))
    handle = attach_multipliers(module, without)
    if case.factor == 1:
        assert multipliers[0].value == 1.0
        torch.testing.assert_close(loss_of(module, case.example), expected, rtol=RTOL, atol=0)
        return
    unmultiplied = loss_of(module, case.example)
    assert not torch.allclose(unmultiplied, expected, rtol=1e-4, atol=0), "the measurement sees no logits"
    handle.remove()
    if all(multiplier.site is not None for multiplier in multipliers):
        handle = attach_multipliers(module, plan)
        torch.testing.assert_close(loss_of(module, case.example), expected, rtol=RTOL, atol=0)
        handle.remove()
    else:
        with pytest.raises(ValueError, match="cannot be attached as a hook"):
            attach_multipliers(module, plan)
    torch.testing.assert_close(loss_of(fold(module, plan), case.example), expected, rtol=RTOL, atol=0)


class Channels(nn.Module):
    """Residual attention whose queries, keys and values are parts of what a convolution returns, by channels."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.embed, self.readout = nn.Linear(3, 16), nn.Linear(16, 2)
        self.packed, self.out = nn.Conv1d(16, 6 * head_dim, 1), nn.Linear(2 * head_dim, 16)

    def forward(self, x: Tensor) -> Any:
        h = self.embed(x)
        packed = self.packed(h.mT).mT.chunk(3, -1)
        query, key, value = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in packed)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.readout(h + self.out(attended.transpose(1, 2).flatten(2)))


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
    assert (same.warnings, logits_of(same), same.branches[0].logits_scale) == ((), [], None)


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
    build = hugging_face("GPT2", False, n_positions=8, scale_attn_by_inverse_layer_idx=True)
    message = "the module itself puts on them cannot be read.*or is not the same in all blocks"
    with pytest.raises(ValueError, match=message):
        Plan.from_model(build(16), LANGUAGE, base=build(8))
    assert not Plan.from_model(build(8), LANGUAGE, base=build(8)).warnings


def test_a_factor_that_differs_where_head_dim_does_not() -> None:
    """Nothing is multiplied: it is a hyperparameter as others are."""
    module, base = (hugging_face("Granite", attention_multiplier=c, **GROUPED)(8) for c in (0.1, 0.3))
    plan = Plan.from_model(module, LANGUAGE, base=base)
    assert (logits_of(plan), plan.warnings) == ([], ())
    assert (plan.branches[0].logits_scale, plan.branches[0].base_logits_scale) == (0.1, 0.3)


@pytest.mark.parametrize("name", ["granite", "qwen3", "gpt-neox", "plain, cosine"])
def test_a_saved_plan_as_the_base(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, module, path = case.build(8), case.build(16), tmp_path / "plan.yaml"
    Plan.from_model(case.build(4), case.example, base=base).save(path)
    assert Plan.load(path) == Plan.from_model(case.build(4), case.example, base=base)
    found, expected = (Plan.from_model(module, case.example, base=each) for each in (path, base))
    assert (found.multipliers, found.base) == (expected.multipliers, expected.base)


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
    assert (str(logits_of(plan)[0].site), logits_of(plan)[0].folds) == (site, folds)


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
