"""What checkpoints say about multipliers, and what modules take from them."""

import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers
from helpers.architectures import ARCHITECTURES
from helpers.leaving import BASE, TWICE, Lit, Mode, lit, logits, trained, without_gains
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from mlu_lightning import MLUCallback, Plan, attach_multipliers, bake, fold, restore_multipliers, to_granite
from mlu_lightning.application.checkpoint import write_plan
from mlu_lightning.application.state_mark import without_mark
from mlu_lightning.models import ResNet

SIZES = {"depth": 2, "hidden": 6, "embedding": 4, "inputs": 3, "outputs": 2}


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
    assert torch.equal(logits(tied, architecture), expected)
    checkpoint["callbacks"]["MLUCallback"]["plan"] = without_gains(plan).to_yaml()
    with pytest.raises(ValueError, match=r"model\.lm_head\.weight are different weights.*tie_word_embeddings=False"):
        restore_multipliers(tied, checkpoint)


SAID = "the multiplier of the readout 'model.model.embed_tokens.weight'"


def test_hooks_that_folding_leaves_are_warned_about() -> None:
    tied, untied = ARCHITECTURES["tied llama"], ARCHITECTURES["llama"]
    with pytest.warns(UserWarning, match=rf"Folding leaves {SAID} in hooks.* refuses to load .*bake\(module, callback"):
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


def flipped(content: bytes, random: Random) -> bytes:
    changed = bytearray(content)
    for place in random.sample(range(len(content)), random.choice((1, 20))):
        changed[place] ^= 1 << random.randrange(8)
    return bytes(changed)


DAMAGE: list[Callable[[bytes, Random], bytes]] = [
    flipped,
    lambda content, random: content[: random.randrange(len(content))],
    lambda content, random: content[(cut := random.randrange(len(content))) :] + content[:cut],
]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("count", [15, pytest.param(350, marks=pytest.mark.slow)])
def test_damaged_checkpoints_are_value_errors(zipped: bool, count: int, tmp_path: Path) -> None:
    """Of 2,100 mutations, 90 in the default run, each is refused or read, as where a bit of a weight has changed."""
    path, refused = tmp_path / "a.ckpt", 0
    module, base = ResNet(**SIZES), ResNet(**SIZES | {"depth": 1})
    plan = Plan.from_model(module, (torch.ones(4, 3), torch.ones(4, 2)), base=base)
    checkpoint = {"state_dict": fold(module, plan).state_dict()}
    write_plan(module, checkpoint)
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for number in range(count):
        for damage in DAMAGE:
            path.write_bytes(damage(content, Random(number)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    restore_multipliers(ResNet(**SIZES), path)
                except ValueError:
                    refused += 1
    assert refused > count


@pytest.mark.parametrize(
    "checkpoint",
    [
        *(None, [], {"callbacks": 1}, {"callbacks": {"MLUCallback": "plan"}}, {"callbacks": {"MLUCallback": {}}}),
        *({"callbacks": {}, "state_dict": 1}, {"callbacks": {1: 1}}, {"callbacks": torch.ones(2)}),
        {"callbacks": {"MLUCallback": {"plan": "", "mode": "fold", "left_out": 1}}},
    ],
)
def test_what_is_no_checkpoint_is_a_value_error(checkpoint: Any) -> None:
    with pytest.raises(ValueError, match=r"not one of a Trainer|no plan|of another form"):
        restore_multipliers(nn.Linear(1, 1), checkpoint)


def test_weights_of_another_module_are_a_value_error() -> None:
    module = ResNet(**SIZES)
    checkpoint: dict[str, Any] = {"state_dict": {"embed.weight": torch.ones(1)}}
    write_plan(fold(module, Plan.from_model(module, (torch.ones(4, 3), torch.ones(4, 2)))), checkpoint)
    with pytest.raises(ValueError, match=r"The checkpoint's weights are not those of a ResNet: (?s:.*)Missing key"):
        restore_multipliers(ResNet(**SIZES), checkpoint)
