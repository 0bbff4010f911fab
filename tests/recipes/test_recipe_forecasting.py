"""The recipe that adds the callback to a training of GluonTS: what the plan is, what stays exact, and a quick run."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.recipe_results import rows
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from mlu_lightning import MLUCallback, Plan
from mlu_lightning.application.state_mark import MARK

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
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(expected["model.flatten.weight"], build().state_dict()["model.flatten.weight"])
    assert with_callback.trainer.callback_metrics == plain.trainer.callback_metrics


RATIOS = {"8 × depth": (8, 1, 1), "8 × MLP width": (1, 8, 1), "8 × embedding": (1, 1, 8)}


@pytest.mark.parametrize("shape", RATIOS)
def test_the_plan_is_the_table(shape: str) -> None:
    """theory.md, section 3, by hand, for Adam; heads grow as the embedding does."""
    depth, units, width = RATIOS[shape]
    plan = Plan.from_model(build(shape), recipe.first_batch(), base=build(), overrides=recipe.POSITIONS)
    scales, heads, layer = plan.scales("adam"), width, "model.encoder.layers.1"
    vectors = "model.patch_proj.weight", "model.positional_encoding.weight", f"{layer}.norm1.weight"
    sums = f"{layer}.self_attn.in_proj_weight", f"{layer}.linear1.weight", "model.flatten.weight"
    factors = {  # of lr, and of std where one is planned
        **dict.fromkeys(vectors, (1.0, 1.0)),
        **dict.fromkeys(sums, (1 / width, width**-0.5)),
        f"{layer}.self_attn.out_proj.weight": (1 / heads, width**0.5 / heads),
        f"{layer}.linear2.weight": (1 / units, width**0.5 / units),
        "model.args_proj.proj.0.weight": (1.0, None),
    }
    for name, (lr, std) in factors.items():
        assert scales[name].lr == pytest.approx(lr) and (std is None or scales[name].std == pytest.approx(std)), name
    multipliers = [1 / depth] * 2 * recipe.SHAPES[shape].depth + [1 / width] * 3
    assert [one.value for one in plan.multipliers if one.site is not None] == pytest.approx(multipliers)


def saved_and_loaded_agree(trained: Any, folder: Path) -> bool:
    trained.predictor.serialize(folder)
    predictors = trained.predictor, Predictor.deserialize(folder)
    means = [[one.mean for one in predictor.predict(recipe.series()[0])] for predictor in predictors]
    assert [*map(len, means)] == [200, 200]
    return np.array_equal(*means)


def test_a_saved_predictor_has_its_multipliers(tmp_path: Path) -> None:
    assert saved_and_loaded_agree(trained("8 × depth", [recipe.mlu()]), tmp_path)


def test_what_the_callback_is_told_is_needed() -> None:
    with pytest.warns(UserWarning, match="IterableSlice gave other data"):
        trained("8 × depth", [MLUCallback(build(), overrides=recipe.POSITIONS)])


def test_hooks_are_refused_where_weights_are_loaded_again(tmp_path: Path) -> None:
    callback = MLUCallback(build(), residual="hook", overrides=recipe.POSITIONS, example=recipe.first_batch())
    found = trained("8 × depth", [callback])
    with pytest.raises(RuntimeError, match=MARK):
        saved_and_loaded_agree(found, tmp_path)


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
    losses = [("base", 0, 1.0), ("base", 1, 2.0), ("8 × depth", 0, 3.0), ("8 × depth", 1, math.nan)]
    first, second = recipe._means([recipe.Training(shape, False, -7, seed, 1, loss) for shape, seed, loss in losses], 2)
    assert (first.shape, first.mlu, first.exponent, first.loss) == ("base", False, -7, 1.5)
    assert second.shape == "8 × depth" and math.isnan(second.loss)


def test_quick_study(in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.main(["--quick", "--seeds=1", f"--output={tmp_path}"])
    trainings = rows(tmp_path / "trainings.csv")
    assert len(trainings) == 7 and {row["shape"] for row in trainings} == set(recipe.SHAPES)
    assert all(math.isfinite(float(row["loss"])) for row in trainings)
    # the same weights and windows in both, other losses because of the callback
    losses = {(row["shape"], row["mlu"]): row["loss"] for row in trainings}
    assert losses["8 × depth", "True"] != losses["8 × depth", "False"]
    assert "nats per time step" in capsys.readouterr().out
    assert (tmp_path / "forecasting.png").read_bytes().startswith(b"\x89PNG")
