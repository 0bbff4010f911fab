"""What checkpoints say about multipliers, and what modules take from them."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.architectures import ARCHITECTURES
from helpers.leaving import BASE, TWICE, Lit, Mode, lit, logits, trained
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from mlu_lightning import MLUCallback, attach_multipliers, bake, restore_multipliers, to_granite
from mlu_lightning.application.state_mark import without_mark


@pytest.mark.parametrize("mode", ["hook", "fold"])
def test_from_a_checkpoint(tmp_path: Path, mode: Mode) -> None:
    architecture = ARCHITECTURES["tied llama"]
    module, plan, trainer = trained(architecture, mode, TWICE)
    expected = logits(module, architecture)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = lit(architecture, TWICE)
    again.load_state_dict(without_mark(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]))
    assert not torch.allclose(logits(again, architecture), expected, rtol=0.1)
    with pytest.raises(ValueError, match=r"does not have the plan's multipliers, .*restore_multipliers\(module, check"):
        bake(again, plan)
    restored = restore_multipliers(again, torch.load(tmp_path / "last.ckpt", weights_only=True))
    assert restored == plan
    for leave in (lambda module, plan: module, to_granite, bake):
        assert torch.equal(logits(leave(again, plan), architecture), expected)


@pytest.mark.parametrize("mode", ["hook", "fold"])
def test_from_a_checkpoint_of_a_baked_module(tmp_path: Path, mode: Mode) -> None:
    architecture, path = ARCHITECTURES["tied llama"], tmp_path / "baked.ckpt"
    module, plan, trainer = trained(architecture, mode, TWICE)
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    expected = logits(bake(module, plan), architecture)
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    plain, again = (Lit(transformers.LlamaForCausalLM(module.model.config)) for _ in range(2))
    plain.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(logits(plain, architecture), expected)
    assert restore_multipliers(plain, checkpoint) == plan
    assert torch.equal(logits(bake(plain, plan), architecture), expected)
    evaluating = Trainer(accelerator="cpu", barebones=True, callbacks=[MLUCallback()])
    data = DataLoader([architecture.example], batch_size=None)
    for _ in range(2):
        evaluating.predict(again, data, ckpt_path=path)
        assert torch.equal(logits(again, architecture), expected)
    attach_multipliers(hooked := lit(architecture, TWICE), plan)
    with pytest.raises(ValueError, match="baked module, a plain one, and this one has multipliers in hooks already"):
        restore_multipliers(hooked, checkpoint)
    with pytest.raises(ValueError, match=r"baked into its weights, and this one has them in hooks.* saved before bake"):
        evaluating.predict(hooked, data, ckpt_path=path)
    where = "hooks" if mode == "hook" else "its weights"
    with pytest.raises(ValueError, match=f"in {where}, and this one .* baked into"):
        evaluating.predict(module, data, ckpt_path=tmp_path / "before.ckpt")
    tied = Lit.load_from_checkpoint(path, model=architecture.build(*TWICE))
    with pytest.raises(ValueError, match=r"model\.lm_head\.weight are different weights.*tie_word_embeddings=False"):
        restore_multipliers(tied, checkpoint)


SAID = "the multiplier of the readout 'model.model.embed_tokens.weight'"


def test_hooks_that_folding_leaves_are_warned_about() -> None:
    tied, untied = ARCHITECTURES["tied llama"], ARCHITECTURES["llama"]
    with pytest.warns(
        UserWarning,
        match=rf"Folding leaves {SAID} in hooks.* refuses to load .*bake\(module, callback",
    ):
        trained(tied, "fold", TWICE)
    several = "Folding leaves the multipliers of the branch .*, the branch .* and 2 more in"
    with pytest.warns(UserWarning, match=several):
        trained(ARCHITECTURES["gemma2"], "fold", TWICE)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Folding leaves")
        trained(untied, "fold", TWICE)
        trained(tied, "hook", TWICE)
        trained(tied, "fold", BASE)


@pytest.mark.parametrize("mode", ["hook", "fold"])
def test_plain_checkpoint_in_a_run_in_which_folding_leaves_hooks(mode: Mode, tmp_path: Path) -> None:
    message = {
        "hook": rf"another one with residual=\"fold\", too, because {SAID} can only be in hooks.*without MLUC",
        "fold": rf"but the module is another function than they were trained as, because {SAID} can only be in hooks",
    }[mode]
    architecture, data = ARCHITECTURES["tied llama"], DataLoader([ARCHITECTURES["tied llama"].example], batch_size=None)
    settings: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = Trainer(max_epochs=1, **settings)
    trainer.fit(lit(architecture, TWICE), data)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    callback = MLUCallback(lit(architecture, BASE), residual=mode)
    with pytest.warns(UserWarning, match=message):
        trainer = Trainer(max_epochs=1, callbacks=[callback], **settings)
        trainer.fit(lit(architecture, TWICE), data, ckpt_path=tmp_path / "plain.ckpt")


def test_a_checkpoint_without_a_plan() -> None:
    with pytest.raises(ValueError, match=r"no plan, because .* multipliers of MLUCallback.*multiplied=True"):
        restore_multipliers(nn.Linear(1, 1), {"callbacks": {"ModelCheckpoint": {}}})
