"""FeatureUpdate: what it logs, when, and that it changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import watched_runs
from helpers.watched_runs import Memory, Weights
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mlu_lightning import FeatureUpdate, MLUCallback
from mlu_lightning.models import CausalTransformer, ResNet
from mlu_lightning.observation import feature_updates

SHAPE = watched_runs.SHAPE | {"depth": 3}
PREFIX = "mlu/update/"
INPUTS, TARGETS = watched_runs.samples().tensors


def data(inputs: Tensor = INPUTS) -> DataLoader[Any]:
    return DataLoader(TensorDataset(inputs, TARGETS), batch_size=4)


def fit(model: Any, *callbacks: Any, steps: int = 6, **settings: Any) -> dict[int, dict[str, float]]:
    """Train, and return what was logged under the callback's names by step."""
    seed_everything(1, verbose=False)
    memory = Memory()
    settings = {"data": data(), "max_epochs": 1, "logger": memory} | settings
    watched_runs.fit(model, *callbacks, steps=steps, **settings)
    found = {
        step: {name[len(PREFIX) :]: value for name, value in values.items() if name.startswith(PREFIX)}
        for step, values in memory.logged.items()
    }
    return {step: values for step, values in found.items() if values}


def seeded(**changes: Any) -> ResNet:
    torch.manual_seed(0)
    return ResNet(**SHAPE | changes)


def saver(folder: Path, steps: int = 3) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_train_steps=steps, filename="{step}")


def features(weights: dict[str, Tensor]) -> list[Tensor]:
    """The embedding, what enters the activations of each block, the last stream, and the output."""
    stream = INPUTS[:4] @ weights["embed.weight"].T
    found = [stream]
    for block in range(3):
        found.append(stream @ weights[f"blocks.{block}.read.weight"].T)
        # the third is of a base of depth 1
        stream = stream + torch.tanh(found[-1]) @ weights[f"blocks.{block}.write.weight"].T / 3
    return [*found, stream, stream @ weights["readout.weight"].T]


def test_logged_are_root_mean_squares_of_what_a_resnet_computes() -> None:
    weights = Weights()
    logged = fit(seeded(), MLUCallback(seeded(depth=1), residual="hook"), FeatureUpdate(steps=1), weights)
    assert list(logged) == [1, 2, 3, 4, 5, 6]
    names = ["stream/s=0", *(f"mlp/blocks.{block}" for block in range(3)), "stream/s=1", "output"]
    for step, values in logged.items():
        pairs = zip(features(weights.at[step]), features(weights.at[0]), strict=True)
        moves = [(now - before).square().mean().sqrt().item() for now, before in pairs]
        assert [values[name] for name in names] == pytest.approx(moves, rel=1e-5)
        assert values["all/mlp"] == pytest.approx((sum(m**2 for m in moves[1:4]) / 3) ** 0.5, rel=1e-5)


def test_resumed_run_logs_what_the_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = fit(seeded(), FeatureUpdate(steps=4), steps=12, max_epochs=2)
    first = fit(seeded(), FeatureUpdate(steps=4), saver(tmp_path, 6), enable_checkpointing=True)
    torch.manual_seed(9)  # the weights that it begins with do not matter
    second = fit(ResNet(**SHAPE), FeatureUpdate(steps=4), steps=12, max_epochs=2, ckpt_path=tmp_path / "step=6.ckpt")
    assert first | second == whole and list(second) == [8, 12]


def test_resumed_run_goes_on_with_its_probe(tmp_path: Path) -> None:
    """Nothing is learned, so that what is compared with the first step has moved if and only if it is another batch."""
    fit(seeded(lr=0.0), FeatureUpdate(steps=1), saver(tmp_path), steps=3, enable_checkpointing=True)
    settings: Any = {"data": data(INPUTS.flip(0)), "ckpt_path": tmp_path / "step=3.ckpt"}
    logged = fit(seeded(lr=0.0), FeatureUpdate(steps=1), **settings)
    assert [logged[step]["stream/s=1"] for step in (4, 5, 6)] == [0, 0, 0]


def test_resuming_without_its_state_is_warned_about(tmp_path: Path) -> None:
    fit(seeded(), saver(tmp_path), steps=3, enable_checkpointing=True)
    used, message = FeatureUpdate(steps=1), "goes on from step 3, and its checkpoint has no FeatureUpdate"
    with pytest.warns(UserWarning, match=message):
        found = fit(seeded(), FeatureUpdate(steps=1), ckpt_path=tmp_path / "step=3.ckpt")
    assert list(found) == [4, 5, 6]
    fit(seeded(), used)
    with pytest.warns(UserWarning, match=message):
        again = fit(seeded(), used, ckpt_path=tmp_path / "step=3.ckpt")
    assert again == found, "what it saw of another run is forgotten"


def test_attention_is_logged_by_branch_and_for_all() -> None:
    torch.manual_seed(0)
    model = CausalTransformer(vocabulary=9, context=6, depth=2, embedding=12, heads=2, head_dim=4, lr=0.01)
    tokens: Any = torch.randint(9, (16, 7), generator=torch.Generator().manual_seed(0))
    logged = fit(model, FeatureUpdate(), steps=4, data=DataLoader(tokens, batch_size=4))
    names = {name for values in logged.values() for name in values}
    assert {f"attention/branches.{i}" for i in (0, 2)} | {f"mlp/branches.{i}" for i in (1, 3)} < names
    assert {"all/attention", "all/mlp", "output", "stream/s=0.25"} < names
    branches = [logged[4][f"attention/branches.{i}"] for i in (0, 2)]
    assert logged[4]["all/attention"] == pytest.approx((sum(value**2 for value in branches) / 2) ** 0.5)
    assert min(branches) > 0


def test_probe_can_be_given_as_a_batch() -> None:
    one, other = fit(seeded(), FeatureUpdate((INPUTS[20:], TARGETS[20:]))), fit(seeded(), FeatureUpdate())
    assert list(one) == list(other) and one != other


def test_what_cannot_be() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `FeatureUpdate`"):  # Lightning's
        fit(seeded(), FeatureUpdate(), FeatureUpdate())
    message = r"cannot take the probe in its validation_step: .*Give FeatureUpdate\(probe=...\)"
    with pytest.raises(ValueError, match=message):
        fit(seeded(), FeatureUpdate(probe=(torch.ones(2, 5), torch.ones(2, 2))))
    refused: list[tuple[Any, str]] = [
        ({"steps": -1}, 'steps=-1 is none of: "log"'),
        ({"depths": 2}, "depths=2 should be relative depths"),
        ({"positions": 0}, "positions=0 should be the number of rows"),
    ]
    for arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            FeatureUpdate(**arguments)


def test_what_is_in_one_observation_only_is_left_out() -> None:
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    before = {"mlp/a": torch.zeros(2, 3), "output": torch.zeros(2, 1), "stream1/s=1": zero}
    after = {"mlp/a": torch.zeros(3, 3), "output": torch.ones(2, 1), "s=1": torch.ones(1), "stream1/s=1": one}
    assert feature_updates(before, after) == {"output": 1.0, "stream1/s=1": 1.0}
