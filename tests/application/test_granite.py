"""Export to Granite: its weights, its config and its function, and the models that cannot become one."""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.architectures import ARCHITECTURES, TOKENS
from helpers.leaving import BASE, TWICE, assert_refused, lit, multiplied, tied_llama, trained
from torch import nn

from mlu_lightning import Plan, attach_multipliers, bake, to_granite
from mlu_lightning.application.state_mark import without_mark
from mlu_lightning.discovery.structure import Site
from mlu_lightning.planning.entries import Multiplier


def saved_config(exported: Any, folder: Path) -> dict[str, Any]:
    exported.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", ["llama", "tied llama"])
def test_granite_keeps_weights_and_has_multipliers(name: str, tmp_path: Path) -> None:
    module, plan, _ = trained(ARCHITECTURES[name], "hook", TWICE)
    exported = to_granite(module, plan)
    for key, value in without_mark(module.model.state_dict()).items():
        assert torch.equal(exported.state_dict()[key], value)
        assert exported.state_dict()[key].data_ptr() != value.data_ptr()
    tied = name == "tied llama"
    assert (exported.lm_head.weight is exported.model.embed_tokens.weight) == tied
    config = saved_config(exported, tmp_path)
    numbers = {"residual_multiplier": 0.25, "embedding_multiplier": 1.0, "logits_scaling": 2.0}
    numbers["tie_word_embeddings"] = tied
    assert {key: config[key] for key in numbers} == numbers
    assert config["attention_multiplier"] == pytest.approx(8**-0.5, rel=1e-15)
    # what a run with folded weights leaves to multiply is a tied readout only
    module, plan, _ = trained(ARCHITECTURES[name], "fold", TWICE)
    config = saved_config(to_granite(module, plan), tmp_path)
    assert (config["residual_multiplier"], config["logits_scaling"]) == (1.0, 2.0 if tied else 1.0)


def test_logits_go_into_granites_attention_multiplier() -> None:
    def build(head_dim: int) -> nn.Module:
        config = copy.deepcopy(ARCHITECTURES["llama"].build(*TWICE).config)
        config.head_dim, config.rope_parameters = head_dim, {"rope_type": "default", "rope_theta": 100.0}
        model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        return model

    module, plan = multiplied(build, {"input_ids": TOKENS, "labels": TOKENS}, (8,), (32,), double=False)
    exported = to_granite(module, plan)
    assert exported.config.attention_multiplier == pytest.approx(32**-0.5 * 0.5, rel=1e-15)
    assert exported.config.rope_parameters["rope_theta"] == 100.0
    assert exported.config.residual_multiplier == 1.5
    expected = module(TOKENS).logits
    torch.testing.assert_close(exported(TOKENS).logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    torch.testing.assert_close(bake(module, plan)(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


def test_granite_of_granite_and_of_mistral() -> None:
    numbers = ARCHITECTURES["tied llama"].build(*TWICE).config.to_dict()
    numbers = {key: numbers[key] for key in ("vocab_size", "num_attention_heads", "head_dim", "pad_token_id")}
    numbers |= {"bos_token_id": None, "eos_token_id": None, "num_key_value_heads": 2, "intermediate_size": 64}
    own = {"residual_multiplier": 0.3, "embedding_multiplier": 7.0, "attention_multiplier": 0.2, "logits_scaling": 5.0}

    def build(name: str, **more: Any) -> Callable[[int, int], nn.Module]:
        config, kind = (getattr(transformers, f"{name}{end}") for end in ("Config", "ForCausalLM"))
        return lambda depth, width: kind(config(num_hidden_layers=depth, hidden_size=width, **numbers, **more))

    mistral, granite = build("Mistral", sliding_window=None), build("Granite", **own)
    for each, residual, scaling, embedding in ((granite, 0.3, 5.0, 7.0), (mistral, 1.0, 1.0, 1.0)):
        module, plan = multiplied(each, {"input_ids": TOKENS, "labels": TOKENS}, (1, 16), (3, 48), double=False)
        exported = to_granite(module, plan)
        assert exported.config.residual_multiplier == pytest.approx(residual * 0.5, rel=1e-15)
        assert exported.config.logits_scaling == pytest.approx(scaling * 3, rel=1e-15)
        assert exported.config.embedding_multiplier == embedding
        torch.testing.assert_close(exported(TOKENS).logits, module(TOKENS).logits, rtol=0, atol=1e-6)


def _with_softcap(module: Any) -> None:
    module.lm_head.register_forward_hook(lambda _, args, output: 0.1 * torch.tanh(output / 0.1))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt2", lambda module: None, r"other weights: transformer\.wte\.weight \[50, 32\] is not in Granite; .* and "),
        ("gemma2", lambda module: None, r"other weights: .*pre_feedforward_layernorm\.weight \[32\] is not in Granite"),
        (
            "tied llama",
            lambda llama: setattr(llama.config, "sliding_window", 4),
            r"the last 4 tokens of up to 2048, .*config\.sliding_window to None",
        ),
        ("tied llama", _with_softcap, r"computes something else .* differ by \d.* of the largest.*bake\(module, plan"),
        ("causal transformer", lambda module: None, r"no Hugging Face model in this CausalTransformer.*bake"),
    ],
)
def test_not_a_granite(name: str, change: Callable[[Any], None], message: str) -> None:
    architecture = ARCHITECTURES[name]
    module, plan = multiplied(architecture.build, architecture.example, BASE, TWICE, double=False)
    change(module)
    modes, random = [part.training for part in module.train().modules()], torch.get_rng_state()
    assert_refused(to_granite, module, plan, message)
    assert modes == [part.training for part in module.modules()]
    assert torch.equal(random, torch.get_rng_state())


def test_granite_has_one_multiplier_for_all_branches() -> None:
    architecture = ARCHITECTURES["tied llama"]
    module = architecture.build(*TWICE)
    plan = Plan.from_model(module, architecture.example, base=architecture.build(*BASE))
    odd = (replace(m, value=0.125) if m.name == "model.layers.1.mlp" else m for m in plan.multipliers)
    attach_multipliers(module, plan := replace(plan, multipliers=tuple(odd)))
    assert_refused(to_granite, module, plan, r"branches have different multipliers, 0\.125, 0\.5, and Granite has one")


def test_granite_does_not_hold_what_is_outside_of_the_model() -> None:
    architecture = ARCHITECTURES["tied llama"]
    module = lit(architecture, TWICE)
    module.extra = nn.Identity()
    plan = Plan.from_model(module, architecture.example, base=lit(architecture, BASE))
    plan = replace(plan, multipliers=(*plan.multipliers, Multiplier("extra", "branch", 0.5, Site("extra"), ())))
    attach_multipliers(module, plan)
    assert_refused(to_granite, module, plan, "'extra', which the plan multiplies, is outside of it")


def test_granite_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    module, plan = tied_llama()
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert_refused(to_granite, module, plan, r"pip install 'mlu-lightning\[hf\]'", ImportError)
