"""Attention logits where head_dim is not the base's, whatever factor the module itself puts on them, and where.

Compared with a module that has every coordinate of the base twice, and the base's loss if logits go as 1/head_dim.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import attentions
from helpers.architectures import LANGUAGE
from helpers.attentions import CASES, EXAMPLE, RTOL, Plain, base_and_doubled, logits_of, loss_of
from torch import nn

from mlu_lightning import Plan, attach_multipliers, fold, scale_optimizer


@pytest.fixture(autouse=True)
def _unturned(monkeypatch: pytest.MonkeyPatch) -> None:
    """All positions of ``CausalTransformer``, which takes none, are 0."""
    monkeypatch.setattr("mlu_lightning.models._rotate", lambda x, context: x)


def channels(head_dim: int) -> nn.Module:
    """Queries, keys and values are parts of what a convolution returns."""
    layer = nn.Conv1d(16, 6 * head_dim, 1)
    return attentions.Packed(2 * head_dim, layer, lambda layer, h: layer(h.mT).mT.unflatten(-1, (3, 2, -1)).unbind(-3))


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


UNREAD = (
    r"head_dim of .* is 16 and the base's is 8, so its logits have to be multiplied, but the factor that the module "
    r"itself puts on them cannot be read.*Multiply queries times keys by a Python number.*or keep head_dim"
)
NOWHERE = (
    r"head_dim of .* is 16 and the base's is 8, so its logits have to be multiplied by 0\.7071, but its queries can "
    r"be multiplied nowhere.*pass the queries through a submodule of their own, after their norm"
)
# before a norm or a constant, or where keys are made too, logits are not multiplied; by an identity after it they are
NOWHERE_IN = "normalized", "normalized_queries", "shifted", "queries_for_keys"
BY_DEPTH = attentions.hugging_face("GPT2", False, n_positions=8, scale_attn_by_inverse_layer_idx=True)
UNREADABLE_IN = "filled_tensor", "in_place", "for_each_head"
REFUSED: dict[str, tuple[Callable[[int], nn.Module], Any, str]] = {
    **{how: (partial(Plain, how), EXAMPLE, UNREAD) for how in UNREADABLE_IN},
    **{how: (partial(Plain, how), EXAMPLE, NOWHERE) for how in NOWHERE_IN},
    "parts of channels": (channels, EXAMPLE, "queries can be multiplied nowhere: they are made together with keys"),
    "another factor in each block": (BY_DEPTH, LANGUAGE, "them cannot be read.*or is not the same in all blocks"),
}


@pytest.mark.parametrize(("build", "example", "message"), REFUSED.values(), ids=REFUSED)
def test_logits_that_cannot_be_multiplied(build: Callable[[int], nn.Module], example: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.from_model(build(16), example, base=build(8))
    if message is UNREAD:
        with pytest.raises(ValueError, match=r"the factor that the base itself puts on them cannot be read"):
            Plan.from_model(Plain("divided", 16), example, base=build(8))
    same = Plan.from_model(build(8), example, base=build(8))
    assert (same.warnings, logits_of(same)) == ((), [])
    assert message is not UNREAD or same.branches[0].logits_scale is None


def test_a_factor_that_differs_where_head_dim_does_not() -> None:
    """Nothing is multiplied: it is a hyperparameter as others are."""
    build = partial(attentions.hugging_face, "Granite", num_key_value_heads=2)
    module, base = (build(attention_multiplier=c)(8) for c in (0.1, 0.3))
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
    torch.testing.assert_close(gains[1], gains[0] * 0.5**0.5, rtol=RTOL, atol=0)
