"""FeatureUpdate: what it logs, when, and that it changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.watched_runs import SILENT, Busy, Memory
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mlu_lightning import FeatureUpdate, MLUCallback
from mlu_lightning.models import CausalTransformer, ResNet
from mlu_lightning.observation import feature_updates

SHAPE = {"depth": 3, "hidden": 16, "embedding": 8, "inputs": 3, "outputs": 2}
PREFIX = "mlu/update/"


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Random inputs and targets."""

    def __init__(self, count: int = 24) -> None:
        draws = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(count, 3, generator=draws)
        self.targets = torch.randn(count, 2, generator=draws)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


def data(**kwargs: Any) -> DataLoader[Any]:
    return DataLoader(Pairs(), batch_size=4, **kwargs)


def fit(model: Any, *callbacks: Any, steps: int = 6, **settings: Any) -> dict[int, dict[str, float]]:
    """Train, and return what was logged under the callback's names by step."""
    seed_everything(1, verbose=False)
    memory = Memory()
    arguments = (
        SILENT | {"max_epochs": 1, "max_steps": steps, "callbacks": list(callbacks), "logger": memory} | settings
    )
    ckpt_path = arguments.pop("ckpt_path", None)
    Trainer(**arguments).fit(model, data(), ckpt_path=ckpt_path)
    found = {
        step: {name: value for name, value in values.items() if name.startswith(PREFIX)}
        for step, values in memory.logged.items()
    }
    return {step: values for step, values in found.items() if values}


def seeded(**changes: Any) -> ResNet:
    torch.manual_seed(0)
    return ResNet(**SHAPE | changes)


class ByHand(FeatureUpdate):
    """Beside the callback, notes what enters the activations and the readout, in another way."""

    def __init__(self) -> None:
        super().__init__(steps=1)
        self.seen: dict[int, list[Tensor]] = {}

    def note(self, trainer: Trainer, model: ResNet) -> None:
        inputs = Pairs().inputs[:4]
        with torch.no_grad():
            stream = inputs @ model.embed.weight.T
            found = [stream]
            for block in model.blocks:
                units = stream @ block.read.weight.T
                found.append(units)
                stream = stream + torch.tanh(units) @ block.write.weight.T / 3  # of a base of depth 1
            found += [stream, stream @ model.readout.weight.T]
        self.seen[trainer.global_step] = found

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self.note(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        self.note(trainer, pl_module)


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def test_logged_are_root_mean_squares_of_what_a_resnet_computes() -> None:
    watch = ByHand()
    logged = fit(seeded(), MLUCallback(seeded(depth=1)), watch)
    assert list(logged) == [1, 2, 3, 4, 5, 6]
    for step, values in logged.items():
        moves = [rms(now - before) for now, before in zip(watch.seen[step], watch.seen[0], strict=True)]
        assert values[f"{PREFIX}stream/s=0"] == pytest.approx(moves[0], rel=1e-5)
        for block in range(3):
            assert values[f"{PREFIX}mlp/blocks.{block}"] == pytest.approx(moves[1 + block], rel=1e-5)
        assert values[f"{PREFIX}mlp"] == pytest.approx((sum(m**2 for m in moves[1:4]) / 3) ** 0.5, rel=1e-5)
        assert values[f"{PREFIX}stream/s=1"] == pytest.approx(moves[4], rel=1e-5)
        assert values[f"{PREFIX}output"] == pytest.approx(moves[5], rel=1e-5)


def test_default_steps_are_powers_of_two_and_the_last() -> None:
    assert list(fit(seeded(), FeatureUpdate())) == [1, 2, 4, 6]
    assert list(fit(seeded(), FeatureUpdate(steps=3))) == [3, 6]
    assert list(fit(seeded(), FeatureUpdate(steps=[0, 5]))) == [5]


@pytest.mark.parametrize("plugin", [False, True])
def test_training_is_the_training_without_it(plugin: bool) -> None:
    """With dropout, batch norm, random numbers in steps, metrics and noise in validation (test_recorder's module)."""
    finals = []
    for watches in ([], [FeatureUpdate(steps=1)]):
        torch.manual_seed(0)
        model = Busy()
        callbacks = [*([MLUCallback()] if plugin else []), *watches]
        seed_everything(1, verbose=False)
        Trainer(max_steps=6, callbacks=callbacks, **SILENT).fit(model, data())
        finals.append([value.clone() for value in model.state_dict().values()])
    assert all(map(torch.equal, *finals))


def test_resumed_run_logs_what_the_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = fit(seeded(), FeatureUpdate(steps=4), steps=12, max_epochs=2)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=6, filename="{step}")
    first = fit(seeded(), FeatureUpdate(steps=4), saver, enable_checkpointing=True)
    torch.manual_seed(9)  # the weights that it begins with do not matter
    second = fit(ResNet(**SHAPE), FeatureUpdate(steps=4), steps=12, max_epochs=2, ckpt_path=tmp_path / "step=6.ckpt")
    assert first | second == whole
    assert list(second) == [8, 12]


def test_resumed_run_goes_on_with_its_probe(tmp_path: Path) -> None:
    """Nothing is learned, so that what is compared with the first step has moved if and only if it is another batch."""
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="{step}")
    fit(seeded(lr=0.0), FeatureUpdate(steps=1), saver, steps=3, enable_checkpointing=True)
    other = Pairs()
    other.inputs = other.inputs.flip(0)
    memory = Memory()
    arguments = SILENT | {"max_epochs": 1, "max_steps": 6, "callbacks": [FeatureUpdate(steps=1)], "logger": memory}
    Trainer(**arguments).fit(seeded(lr=0.0), DataLoader(other, batch_size=4), ckpt_path=tmp_path / "step=3.ckpt")
    found = [memory.logged[step][f"{PREFIX}stream/s=1"] for step in (4, 5, 6)]
    assert found == [0, 0, 0]


def test_resuming_without_its_state_is_warned_about(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="{step}")
    fit(seeded(), saver, steps=3, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="goes on from step 3, and its checkpoint has no FeatureUpdate"):
        found = fit(seeded(), FeatureUpdate(steps=1), ckpt_path=tmp_path / "step=3.ckpt")
    assert list(found) == [4, 5, 6]
    used = FeatureUpdate(steps=1)
    fit(seeded(), used)
    with pytest.warns(UserWarning, match="goes on from step 3, and its checkpoint has no FeatureUpdate"):
        assert fit(seeded(), used, ckpt_path=tmp_path / "step=3.ckpt") == found, (
            "what it saw of another run is forgotten"
        )


def test_checkpoints_monitor_it(tmp_path: Path) -> None:
    best = ModelCheckpoint(
        tmp_path, monitor="mlu/update/mlp", mode="max", every_n_train_steps=1, filename="best", save_weights_only=True
    )
    logged = fit(seeded(), FeatureUpdate(steps=1), best, enable_checkpointing=True)
    assert float(best.best_model_score or 0) == pytest.approx(max(values[f"{PREFIX}mlp"] for values in logged.values()))


def test_attention_is_logged_by_branch_and_for_all() -> None:
    torch.manual_seed(0)
    model = CausalTransformer(vocabulary=9, context=6, depth=2, embedding=12, heads=2, head_dim=4, lr=0.01)
    memory = Memory()
    tokens = torch.randint(9, (16, 7), generator=torch.Generator().manual_seed(0))
    trainer = Trainer(**SILENT | {"max_steps": 4, "callbacks": [FeatureUpdate()], "logger": memory})
    trainer.fit(model, DataLoader(tokens, batch_size=4))  # type: ignore[arg-type]  # a tensor is a dataset of its rows
    logged = {name for values in memory.logged.values() for name in values if name.startswith(PREFIX)}
    assert {f"{PREFIX}attention/branches.{i}" for i in (0, 2)} | {f"{PREFIX}mlp/branches.{i}" for i in (1, 3)} < logged
    assert {f"{PREFIX}attention", f"{PREFIX}mlp", f"{PREFIX}output", f"{PREFIX}stream/s=0.25"} < logged
    last = memory.logged[4]
    branches = [last[f"{PREFIX}attention/branches.{i}"] for i in (0, 2)]
    assert last[f"{PREFIX}attention"] == pytest.approx((sum(value**2 for value in branches) / 2) ** 0.5)
    assert min(branches) > 0


def test_probe_can_be_given_as_a_batch() -> None:
    probe = Pairs(24).inputs[20:], Pairs(24).targets[20:]
    one, other = fit(seeded(), FeatureUpdate(probe)), fit(seeded(), FeatureUpdate())
    assert list(one) == list(other)
    assert one != other


def test_what_cannot_be() -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `FeatureUpdate`"):  # Lightning's
        fit(seeded(), FeatureUpdate(), FeatureUpdate())
    with pytest.raises(
        ValueError, match=r"cannot take the probe in its validation_step: .*Give FeatureUpdate\(probe=...\)"
    ):
        fit(seeded(), FeatureUpdate(probe=(torch.ones(2, 5), torch.ones(2, 2))))
    with pytest.raises(ValueError, match='steps=-1 is none of: "log"'):
        FeatureUpdate(steps=-1)
    with pytest.raises(ValueError, match="depths=2 should be relative depths"):
        FeatureUpdate(depths=2)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match="positions=0 should be the number of rows"):
        FeatureUpdate(positions=0)


def test_what_is_in_one_observation_only_is_left_out() -> None:
    before = {"mlp/a": torch.zeros(2, 3), "output": torch.zeros(2, 1), "stream1/s=1": torch.zeros(1, 1)}
    after = {
        "mlp/a": torch.zeros(3, 3),
        "output": torch.ones(2, 1),
        "s=1": torch.ones(1),
        "stream1/s=1": torch.ones(1, 1),
    }
    assert feature_updates(before, after) == {"output": 1.0, "stream1/s=1": 1.0}
