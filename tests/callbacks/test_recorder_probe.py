"""ReferenceRecorder: which probe is recorded, and what can be recorded of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.watched_runs import SHAPE, Weights, fit, loader, samples
from lightning.pytorch import LightningModule
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mlu_lightning.callbacks import ReferenceRecorder
from mlu_lightning.models import CausalTransformer, ResNet
from mlu_lightning.observation.reference import Reference
from mlu_lightning.utilities.state import ParametersChangedError


def test_probe_is_of_the_validation_data_if_there_are_any(tmp_path: Path) -> None:
    for name, validation, expected in (
        ("validation", loader(8, seed=1), samples(8, seed=1)),
        ("several", [loader(8, seed=2), loader(8, seed=1)], samples(8, seed=2)),
        ("training", None, samples()),
    ):
        recorder = ReferenceRecorder(tmp_path / f"{name}.safetensors", steps=[0])
        fit(ResNet(**SHAPE), recorder, steps=1, validation=validation, limit_val_batches=0)
        reference = Reference.load(recorder.path)
        for found, tensor in zip(reference.probe, expected.tensors, strict=True):
            assert found.equal(tensor[:4]), name
        assert reference.header.runs == ("training_step" if name == "training" else "validation_step")


def test_probe_can_be_given_as_batch_file_or_reference(tmp_path: Path) -> None:
    x, y = torch.randn(30, 3), torch.randn(30, 2)
    save_file({"0": x, "1": y}, tmp_path / "probe.safetensors")
    probes: list[Any] = [(x, y), tmp_path / "probe.safetensors", str(tmp_path / "0.safetensors")]
    hashes = set()
    for number, probe in enumerate(probes):
        recorder = ReferenceRecorder(tmp_path / f"{number}.safetensors", probe, steps=[0], positions=20)
        fit(ResNet(**SHAPE), recorder, steps=1)
        reference = Reference.load(recorder.path)
        assert reference.probe[0].equal(x[:20]) and reference.probe[1].equal(y[:20])
        assert reference.header.locations["s=0"] == (20, 8)
        hashes.add(reference.probe_hash)
    assert len(hashes) == 1


def test_probe_has_as_many_samples_as_the_positions_need_and_not_few(tmp_path: Path) -> None:
    tokens = torch.randint(20, (40, 9))
    for positions, samples_kept in ((100, 13), (10, 8), (10**6, 30)):
        model = CausalTransformer(vocabulary=20, context=8, depth=1, embedding=6, heads=1, head_dim=4)
        recorder = ReferenceRecorder(tmp_path / f"{positions}.safetensors", steps=[0], positions=positions)
        fit(model, recorder, steps=1, data=DataLoader(tokens, batch_size=30))  # type: ignore[arg-type]
        reference = Reference.load(recorder.path)
        assert reference.probe.equal(tokens[:samples_kept])
        assert reference.header.locations["s=0"] == (min(positions, 240), 6)


def test_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(20, (12, 9))
    model = CausalTransformer(vocabulary=20, context=8, depth=2, embedding=6, heads=2, head_dim=4)
    recorder = ReferenceRecorder(tmp_path / "run.safetensors", steps=[0], positions=10, dtype="bfloat16")
    weights = Weights()
    fit(model, recorder, weights, steps=1, data=DataLoader(tokens, batch_size=6))  # type: ignore[arg-type]
    reference = Reference.load(recorder.path)
    assert reference.header.locations == {f"s={s}": (10, 6) for s in ("0", "0.25", "0.5", "0.75", "1")} | {
        "output": (10, 20)
    }
    assert reference.header.data_sizes == {"tokens.weight": (20,), "readout.weight": (20,)}
    rows = [round(i * 47 / 9) for i in range(10)]
    expected = weights.at[0]["tokens.weight"][tokens[:6, :-1].flatten()[rows]]
    assert reference.read(0)["s=0"].equal(expected.bfloat16().float())


class Images(LightningModule):
    """A convolutional network with a strided stage."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(fan, 10, 3, stride, 1), nn.ReLU(), nn.Conv2d(10, 12 if stride == 2 else fan, 3, 1, 1)
            )
            for fan, stride in ((6, 1), (6, 2), (12, 1))
        )
        self.down = nn.Conv2d(6, 12, 1, 2)
        self.last = nn.Identity()
        self.head = nn.Linear(12, 3)

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        h = self.stem(batch["image"])
        h = h + self.blocks[0](h)
        h = self.down(h) + self.blocks[1](h)
        h = self.last(h + self.blocks[2](h))
        return nn.functional.cross_entropy(self.head(h.mean((2, 3))), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_images(tmp_path: Path) -> None:
    data = [{"image": torch.randn(1, 8, 8), "label": i % 3} for i in range(8)]
    recorder = ReferenceRecorder(tmp_path / "run.safetensors", steps=[0], depths=[0, 0.25, 0.75], positions=100)
    weights = Weights()
    fit(Images(), recorder, weights, steps=1, data=DataLoader(data, batch_size=4))  # type: ignore[arg-type]
    reference = Reference.load(recorder.path)
    # 4 images of 64 pixels are cut to 100 positions; the last stage has 4 images of 16
    assert reference.header.locations == {"s=0": (100, 6), "s=0.25": (100, 6), "s=0.75": (64, 12), "output": (4, 3)}
    images = torch.stack([sample["image"] for sample in data[:4]])  # type: ignore[misc]
    stem = nn.functional.conv2d(images, weights.at[0]["stem.weight"], weights.at[0]["stem.bias"], padding=1)
    rows = [round(i * 255 / 99) for i in range(100)]
    torch.testing.assert_close(reference.read(0)["s=0"], stem.permute(0, 2, 3, 1).reshape(-1, 6)[rows])


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    for arguments, message in (
        ({"steps": "all"}, "steps='all' is none of"),
        ({"steps": 0}, "steps=0 is none of"),
        ({"steps": [1, -2]}, "list of steps from 0"),
        ({"steps": []}, "is none of"),
        ({"depths": [0, 2]}, "relative depths between 0"),
        ({"depths": []}, "relative depths between 0"),
        ({"depths": 0.5}, "relative depths between 0"),
        ({"positions": 0}, "1 or more"),
        ({"dtype": "float16"}, "none of: 'float32', 'bfloat16'"),
    ):
        with pytest.raises(ValueError, match=message):
            ReferenceRecorder(path, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Foreign.*a batch of tensors, numbers and strings"):

        class Foreign: ...

        fit(ResNet(**SHAPE), ReferenceRecorder(path, probe=(torch.ones(2, 3), Foreign())))
    with pytest.raises(ValueError, match="no residual branches"):
        fit(Plain(), ReferenceRecorder(path))
    with pytest.raises(ValueError, match=r"no batch to probe Iterated with: .*Give the callback probe="):
        fit(Iterated(**SHAPE), ReferenceRecorder(path), data=iter([]))  # type: ignore[arg-type]
    assert not path.exists()


class Iterated(ResNet): ...


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_random_transfer_is_the_same_in_each_run_and_moves_no_random_state(tmp_path: Path) -> None:
    class Augmented(ResNet):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0].add_(torch.randn(3)), batch[1]]

    x, y = torch.randn(8, 3), torch.randn(8, 2)
    kept = x.clone()
    values = []
    for name in ("one", "two"):
        torch.manual_seed(0)
        module = Augmented(**SHAPE)
        torch.manual_seed(len(values))
        recorder = ReferenceRecorder(tmp_path / f"{name}.safetensors", (x, y), steps=[0])
        fit(module, recorder, steps=1)
        reference = Reference.load(recorder.path)
        assert reference.probe[0].equal(kept) and x.equal(kept)
        values.append(reference.read(0)["s=0"])
    assert values[0].equal(values[1])
    torch.manual_seed(0)
    module = Augmented(**SHAPE)
    runs = []
    for callbacks in ([], [ReferenceRecorder(tmp_path / "three.safetensors", (x, y))]):
        torch.manual_seed(0)
        weights = Weights()
        fit(Augmented(**SHAPE), *callbacks, weights)
        runs.append(weights.losses)
    assert runs[0] == runs[1]


def test_probe_of_a_reference_is_passed_through_the_same_step(tmp_path: Path) -> None:
    one = ReferenceRecorder(tmp_path / "one.safetensors")
    fit(ResNet(**SHAPE), one)  # without validation data
    two = ReferenceRecorder(tmp_path / "two.safetensors", one.path)
    fit(ResNet(**SHAPE), two, validation=loader())
    assert Reference.load(two.path).header.runs == Reference.load(one.path).header.runs == "training_step"


def test_given_probe_goes_through_validation_step_if_there_is_one(tmp_path: Path) -> None:
    class Untested(ResNet):
        validation_step = LightningModule.validation_step  # type: ignore[assignment]

    for module, expected in ((ResNet(**SHAPE), "validation_step"), (Untested(**SHAPE), "training_step")):
        recorder = ReferenceRecorder(tmp_path / f"{expected}.safetensors", (torch.ones(4, 3), torch.ones(4, 2)))
        fit(module, recorder)
        assert Reference.load(recorder.path).header.runs == expected


def test_probe_that_the_module_cannot_take_is_refused(tmp_path: Path) -> None:
    recorder = ReferenceRecorder(tmp_path / "run.safetensors", (torch.ones(4, 5), torch.ones(4, 2)))
    with pytest.raises(
        ValueError, match=r"ResNet cannot take the probe in its validation_step: .*probe=\.\.\.\) a batch as"
    ):
        fit(ResNet(**SHAPE), recorder)
    assert not recorder.path.exists()


def test_depths_are_recorded_in_order(tmp_path: Path) -> None:
    recorder = ReferenceRecorder(tmp_path / "run.safetensors", depths=[1, 0.5, 0, 0.5], steps=[0])
    fit(ResNet(**SHAPE), recorder)
    assert Reference.load(recorder.path).header.depths == (0, 0.5, 1)


def test_datasets_that_are_asked_for_whole_batches(tmp_path: Path) -> None:
    from torch.utils.data import BatchSampler, SequentialSampler

    data = samples()
    whole = DataLoader(data, sampler=BatchSampler(SequentialSampler(data), 4, drop_last=False), batch_size=None)
    recorder = ReferenceRecorder(tmp_path / "run.safetensors", steps=[0])
    fit(ResNet(**SHAPE), recorder, data=whole)
    assert Reference.load(recorder.path).probe[0].equal(data.tensors[0][:4])


class Clamped(ResNet):
    """Changes a weight in its training_step."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.readout.weight.data.mul_(0.9)
        return super().training_step(batch)


def test_step_that_changes_parameters_is_not_probed(tmp_path: Path) -> None:
    class Untested(Clamped):
        validation_step = LightningModule.validation_step  # type: ignore[assignment]

    with pytest.raises(
        ParametersChangedError, match=r"Untested changes its parameters readout.weight .*validation_step"
    ):
        fit(Untested(**SHAPE), ReferenceRecorder(tmp_path / "one.safetensors", (torch.ones(4, 3), torch.ones(4, 2))))
    fit(Clamped(**SHAPE), ReferenceRecorder(tmp_path / "two.safetensors", (torch.ones(4, 3), torch.ones(4, 2))))
    assert Reference.load(tmp_path / "two.safetensors").header.runs == "validation_step"
