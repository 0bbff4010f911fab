"""Checkpoints of runs without the plugin in runs with it, and the other way round."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs_by_hand import BASE, ByHand, Net, Residual, fit, listed

from mlu_lightning import MLUCallback
from mlu_lightning.application.state_mark import MARK, without_mark


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {name: folder / f"{name}.ckpt" for name in ("plain", "hook", "fold")}
    for name, path in found.items():
        callbacks = [] if name == "plain" else [MLUCallback(Net(BASE), residual=name)]  # type: ignore[arg-type]  # one of its two
        fit(Net(), *callbacks, max_epochs=2).save_checkpoint(path)
    return found


def end(module: Net, *callbacks: Any, ckpt_path: Path | None = None) -> dict[str, Any]:
    trainer = fit(module, *callbacks, ckpt_path=ckpt_path, num_sanity_val_steps=0)
    states = listed({"weights": without_mark(module.state_dict()), "optimizer": trainer.optimizers[0].state_dict()})
    return {"losses": module.losses[-12:], **states}


SAID = {
    "hook": r'trained as another function .* now has the plan\'s multipliers.* give MLUCallback residual="fold"',
    "fold": "the module is the function that they were trained as; from here on they have the plan's learning rates",
}


@pytest.mark.parametrize("residual", ["hook", "fold"])
def test_plain_run_goes_on_with_the_plugin(residual: Residual, checkpoints: dict[str, Path]) -> None:
    """At the plan's learning rates; folded, as the function that it was trained as."""
    with pytest.warns(UserWarning, match=f"checkpoint is of a run without MLUCallback.* {SAID[residual]}"):
        ours = end(Net(), MLUCallback(Net(BASE), residual=residual), ckpt_path=checkpoints["plain"])
    assert ours == end(ByHand(residual), ckpt_path=checkpoints["plain"])
    same = ours["losses"][0] == end(Net(), ckpt_path=checkpoints["plain"])["losses"][0]
    assert same is (residual == "fold")


@pytest.mark.parametrize("residual", ["hook", "fold"])
def test_run_with_the_plugin_goes_on_without_it(
    residual: Residual, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Lightning says what is missing; with the numbers by hand it is the run with the plugin, bit for bit."""
    whole = end(Net(), MLUCallback(Net(BASE), residual=residual))
    checkpoint = torch.load(checkpoints[residual], weights_only=True)
    checkpoint["state_dict"] = without_mark(checkpoint["state_dict"])
    torch.save(checkpoint, tmp_path / "unmarked.ckpt")
    with pytest.warns(UserWarning, match=r"Please add the following callbacks: \['MLUCallback'\]"):
        by_hand = end(ByHand(residual), ckpt_path=tmp_path / "unmarked.ckpt")
    assert by_hand == whole
    # it has to be known to the module that goes on, with hooks; folded weights are those of the same function
    if residual == "hook":
        with pytest.raises(RuntimeError, match=f"Unexpected key.*{MARK}"):
            end(Net(), ckpt_path=checkpoints[residual])
        return
    plain = end(Net(), ckpt_path=checkpoints[residual])
    assert plain["losses"][0] == whole["losses"][0]
    assert plain["weights"] != whole["weights"]


def test_checkpoint_that_was_not_written_to_its_end_is_not_taken(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    whole, module = checkpoints["hook"].read_bytes(), Net()
    for size in (0, len(whole) // 2, len(whole) - 1):
        (tmp_path / "part.ckpt").write_bytes(whole[:size])
        with pytest.raises((RuntimeError, OSError, EOFError)):
            fit(module, MLUCallback(Net(BASE), residual="hook"), ckpt_path=tmp_path / "part.ckpt")
        assert module.losses == []
        assert "configure_optimizers" not in vars(module)
