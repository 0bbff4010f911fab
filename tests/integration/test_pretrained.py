"""What ``save_pretrained`` writes is the trained function, or it refuses: ``from_pretrained`` is not strict."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.trainers import quiet
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mlu_lightning import MLUCallback, attach_multipliers, bake

TOKENS = torch.arange(24).reshape(4, 6) % 7


class Wrapped(LightningModule):
    def __init__(self, kind: str, depth: int = 4, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        if kind == "tied":
            tied = GPT2Config(vocab_size=7, n_positions=8, n_embd=width, n_layer=depth, n_head=heads)
            self.model: Any = GPT2LMHeadModel(tied)
        else:
            sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": heads}
            untied = LlamaConfig(vocab_size=7, num_hidden_layers=depth, tie_word_embeddings=False, **sizes)
            self.model = LlamaForCausalLM(untied)

    def training_step(self, tokens: Any) -> Any:
        return self.model(input_ids=tokens, labels=tokens).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize(("kind", "residual"), [("tied", "fold"), ("untied", "fold"), ("untied", "hook")])
def test_it_is_the_trained_function_or_an_error(kind: str, residual: Any, tmp_path: Path) -> None:
    callback = MLUCallback(lambda: Wrapped(kind, 2, 8, 2), residual=residual, verify=False)
    module, data = Wrapped(kind), DataLoader(TOKENS, batch_size=2)  # type: ignore[arg-type]
    quiet(callback, max_steps=2).fit(module, data)
    expected = logits(module.model)
    module.trainer = None
    if (kind, residual) != ("untied", "fold"):
        for saved in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            with pytest.raises(ValueError, match=r"not among what save_pretrained writes.*bake\(module, plan\)"):
                saved.model.save_pretrained(tmp_path)
        assert not [*tmp_path.iterdir()]
        assert callback.plan is not None
        baked = bake(copy.deepcopy(module), callback.plan)
        with pytest.raises(ValueError, match="save_pretrained"):
            module.model.save_pretrained(tmp_path)
        module = baked
    module.model.save_pretrained(tmp_path)
    assert torch.allclose(logits(type(module.model).from_pretrained(tmp_path)), expected, atol=1e-6)


def test_a_handle_that_is_removed_lets_it_save(tmp_path: Path) -> None:
    callback = MLUCallback(lambda: Wrapped("untied", 2, 8, 2), verify=False)
    quiet(callback, max_steps=1).fit(Wrapped("untied"), DataLoader(TOKENS, batch_size=2))  # type: ignore[arg-type]
    assert callback.plan is not None
    module = Wrapped("untied")
    handle = attach_multipliers(module, callback.plan)
    assert "save_pretrained" in vars(module.model)
    handle.remove()
    assert "save_pretrained" not in vars(module.model)
    module.model.save_pretrained(tmp_path)
