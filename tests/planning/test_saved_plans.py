"""Checkpoints say where the multipliers of their module are, whoever saves them, when, and with weights alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs_by_hand import BASE, ByHand, Net, Residual, fit
from helpers.trainers import quiet
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from mlu_lightning import MLUCallback, Plan, bake, fold, restore_multipliers
from mlu_lightning.application.state_mark import without_mark

INPUTS = torch.ones(1, 3)


class Subclass(MLUCallback):
    """Somebody's own, whose checkpoints are those of any other."""


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def by_hand(path: Path, residual: Residual) -> Tensor:
    module = ByHand(residual)
    module.load_state_dict(without_mark(read(path)["state_dict"]))
    return module(INPUTS)


def evaluated(path: Path, callback: MLUCallback | None = None) -> tuple[Net, Trainer]:
    module, trainer = Net(), quiet(callback or MLUCallback())
    trainer.validate(module, ckpt_path=path, verbose=False)
    return module, trainer


# what a run is with, what is done afterwards, and where multipliers are then
ENDS: dict[str, tuple[Residual, Callable[[Net, Plan], Any], Residual]] = {
    **{name: (name, lambda module, plan: None, name) for name in ("hook", "fold")},
    "hook, then folded": ("hook", fold, "fold"),
    "hook, then baked": ("hook", bake, "fold"),
    "fold, then baked": ("fold", bake, "fold"),
}
weights_alone = pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights-only"])


@weights_alone
@pytest.mark.parametrize("end", ENDS)
def test_checkpoint_after_a_fit(end: str, weights_only: bool, tmp_path: Path) -> None:
    residual, change, place = ENDS[end]
    module, callback = Net(), Subclass(Net(BASE), residual=residual)
    trainer = fit(module, callback, max_epochs=1)
    assert callback.plan is not None
    change(module, callback.plan)
    trainer.save_checkpoint(tmp_path / "first.ckpt", weights_only)
    expected = by_hand(tmp_path / "first.ckpt", place)
    assert torch.equal(module(INPUTS), expected)

    loaded = Net()
    if place == "fold":
        assert torch.equal(Net.load_from_checkpoint(tmp_path / "first.ckpt")(INPUTS), expected)
    assert restore_multipliers(loaded, read(tmp_path / "first.ckpt")) == callback.plan
    assert torch.equal(loaded(INPUTS), expected)

    # and what Trainers that only evaluated it save again
    other = MLUCallback()
    first, evaluating = evaluated(tmp_path / "first.ckpt", other)
    assert torch.equal(first(INPUTS), expected)
    assert other.plan == callback.plan
    evaluating.save_checkpoint(tmp_path / "second.ckpt", weights_only)
    second, _ = evaluated(tmp_path / "second.ckpt")
    assert torch.equal(second(INPUTS), expected)
    torch.testing.assert_close(bake(second, other.plan)(INPUTS), expected)
    assert torch.equal(bake(second, other.plan)(INPUTS), second(INPUTS))


@pytest.mark.parametrize("residual", ["hook", "fold"])
def test_model_checkpoint_of_weights_alone(residual: Residual, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, save_weights_only=True)
    fit(Net(), MLUCallback(Net(BASE), residual=residual), saves, enable_checkpointing=True)
    path = Path(saves.best_model_path)
    assert "optimizer_states" not in read(path)
    assert torch.equal(evaluated(path)[0](INPUTS), by_hand(path, residual))


@weights_alone
def test_module_of_another_run_in_the_same_trainer(weights_only: bool, tmp_path: Path) -> None:
    callback = MLUCallback(Net(BASE))
    trainer = fit(Net(), callback, max_epochs=1)
    plain, theirs = Net(), Net()
    fit(plain, max_epochs=1)
    trainer.validate(plain, verbose=False)
    trainer.save_checkpoint(tmp_path / "plain.ckpt", weights_only)
    found, _ = evaluated(tmp_path / "plain.ckpt")
    assert torch.equal(found(INPUTS), plain(INPUTS))
    fit(theirs, other := MLUCallback(Net(BASE), alpha=2.0), max_epochs=1)
    trainer.validate(theirs, verbose=False)
    assert callback.plan == other.plan
    trainer.save_checkpoint(tmp_path / "theirs.ckpt", weights_only)
    found, _ = evaluated(tmp_path / "theirs.ckpt")
    assert torch.equal(found(INPUTS), theirs(INPUTS))
    with pytest.raises(ValueError, match="multipliers of another plan than that of this MLUCallback"):
        trainer.fit(theirs)


def test_place_that_a_newer_version_knows(tmp_path: Path) -> None:
    trainer = fit(Net(), MLUCallback(Net(BASE)), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "newer.ckpt")
    newer = read(tmp_path / "newer.ckpt")
    newer["callbacks"]["MLUCallback"]["mode"] = "elsewhere"
    torch.save(newer, tmp_path / "newer.ckpt")
    message = "place that this version does not know, 'elsewhere'; it knows hook, fold, baked. Update mlu-lightning"
    with pytest.raises(ValueError, match=message):
        restore_multipliers(Net(), newer)
    for evaluate in (evaluated, lambda path: trainer.validate(ckpt_path=path)):
        with pytest.raises(ValueError, match=message):
            evaluate(tmp_path / "newer.ckpt")


def test_checkpoints_that_do_not_fit_what_the_module_became(tmp_path: Path) -> None:
    module, callback = Net(), MLUCallback(Net(BASE), residual="hook")
    trainer = fit(module, callback, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "hook.ckpt")
    assert callback.plan is not None
    bake(module, callback.plan)
    trainer.save_checkpoint(tmp_path / "baked.ckpt")
    message = r"module with its multipliers in {}, and this one has them in {}, .*Give residual='{}' to MLUCallback"
    with pytest.raises(ValueError, match=message.format("hooks", "its weights", "hook")):
        trainer.validate(module, ckpt_path=tmp_path / "hook.ckpt", verbose=False)
    with pytest.raises(ValueError, match=message.format("its weights", "hooks", "fold")):
        fit(Net(), MLUCallback(Net(BASE), residual="hook"), ckpt_path=tmp_path / "baked.ckpt")
