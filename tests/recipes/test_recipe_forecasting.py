"""The recipe that adds the callback to a training of GluonTS: what the plan is, what stays exact, and a quick run."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.recipe_results import rows
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from mlu_lightning import MLUCallback, Plan

pytest.importorskip("gluonts.torch", reason="The recipe is of GluonTS: pip install 'gluonts[torch]'.")

from gluonts.model.predictor import Predictor

from recipes.forecasting import run as recipe


def trained(shape: str, callbacks: Sequence[Callback], seed: int = 0) -> Any:
    seed_everything(seed, verbose=False)
    return recipe.training(recipe.SHAPES[shape], 2.0**-7, 2, callbacks)


def build(shape: str = "base") -> LightningModule:
    return recipe.estimator(recipe.SHAPES[shape], 0.0, 1).create_lightning_module()


def test_at_the_base_shape_the_training_is_that_of_gluonts_bit_for_bit() -> None:
    plain, with_callback = trained("base", []), trained("base", [recipe.mlu()])
    expected, found = plain.trained_net.state_dict(), with_callback.trained_net.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(expected["model.flatten.weight"], build().state_dict()["model.flatten.weight"])
    assert with_callback.trainer.callback_metrics == plain.trainer.callback_metrics


@pytest.mark.parametrize(
    ("shape", "depth", "units", "width"),
    [("8 × depth", 8, 1, 1), ("8 × MLP width", 1, 8, 1), ("8 × embedding", 1, 1, 8)],
)
def test_the_plan_is_the_table(shape: str, depth: float, units: float, width: float) -> None:
    """theory.md, section 3, by hand, for Adam; heads grow as the embedding does."""
    plan = Plan.from_model(build(shape), recipe.first_batch(), base=build(), overrides=recipe.POSITIONS)
    scales, heads, layer = plan.scales("adam"), width, "model.encoder.layers.1"
    factors = {  # of lr, and of std where one is planned
        "model.patch_proj.weight": (1.0, 1.0),
        "model.positional_encoding.weight": (1.0, 1.0),
        f"{layer}.self_attn.in_proj_weight": (1 / width, width**-0.5),
        f"{layer}.self_attn.out_proj.weight": (1 / heads, width**0.5 / heads),
        f"{layer}.linear1.weight": (1 / width, width**-0.5),
        f"{layer}.linear2.weight": (1 / units, width**0.5 / units),
        f"{layer}.norm1.weight": (1.0, 1.0),
        "model.flatten.weight": (1 / width, width**-0.5),
        "model.args_proj.proj.0.weight": (1.0, None),
    }
    for name, (lr, std) in factors.items():
        assert scales[name].lr == pytest.approx(lr) and (std is None or scales[name].std == pytest.approx(std)), name
    branches = 2 * recipe.SHAPES[shape].depth
    assert [multiplier.value for multiplier in plan.multipliers] == pytest.approx(
        [1 / depth] * branches + [1 / width] * 3
    )


def saved_and_loaded_agree(trained: Any, folder: Path) -> bool:
    trained.predictor.serialize(folder)
    loaded, data = Predictor.deserialize(folder), recipe.series()[0]
    pairs = list(zip(trained.predictor.predict(data), loaded.predict(data), strict=True))
    assert len(pairs) == 200
    return all(bool((one.mean == other.mean).all()) for one, other in pairs)


def test_a_saved_predictor_has_its_multipliers(tmp_path: Path) -> None:
    assert saved_and_loaded_agree(trained("8 × depth", [recipe.mlu()]), tmp_path)


def test_what_the_callback_is_told_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.positional_encoding\.weight .* took no part in the forward pass"):
        trained("8 × depth", [MLUCallback(build())])
    callback = MLUCallback(build(), overrides=recipe.POSITIONS)
    with pytest.warns(UserWarning, match="IterableSlice gave other data"):
        found = trained("8 × depth", [callback])
    assert not saved_and_loaded_agree(found, tmp_path)


class Breaks(Callback):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise RuntimeError("broken")


def test_the_loss_of_a_training_that_broke_off_is_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    case = recipe.Training("base", False, -7, 0, 1)
    assert math.isfinite(recipe.train(case).loss)
    training = recipe.training
    monkeypatch.setattr(recipe, "training", lambda *args: training(*args[:3], [Breaks()]))
    assert math.isnan(recipe.train(case).loss)


def test_means_over_seeds() -> None:
    found = [
        recipe.Training(shape, False, -7, seed, 1, loss)
        for shape, losses in (("base", (1.0, 2.0)), ("8 × depth", (3.0, math.nan)))
        for seed, loss in enumerate(losses)
    ]
    first, second = recipe._means(found, 2)
    assert (first.shape, first.mlu, first.exponent, first.loss) == ("base", False, -7, 1.5)
    assert second.shape == "8 × depth" and math.isnan(second.loss)


def test_quick_study(in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.main(["--quick", "--seeds=1", f"--output={tmp_path}"])
    trainings = rows(tmp_path / "trainings.csv")
    assert len(trainings) == 7
    assert {row["shape"] for row in trainings} == set(recipe.SHAPES)
    assert all(math.isfinite(float(row["loss"])) for row in trainings)
    # the same weights and windows in both, other losses because of the callback
    losses = {(row["shape"], row["mlu"]): row["loss"] for row in trainings}
    assert losses["8 × depth", "True"] != losses["8 × depth", "False"]
    assert "nats per time step" in capsys.readouterr().out
    assert (tmp_path / "forecasting.png").read_bytes().startswith(b"\x89PNG")
