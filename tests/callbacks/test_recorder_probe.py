"""ReferenceRecorder: which probe is recorded, and what can be recorded of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.watched_runs import SHAPE, Descent, Weights, fit, loader, record, samples
from lightning.pytorch import Callback, LightningModule
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from mlu_lightning.callbacks import ReferenceRecorder
from mlu_lightning.models import CausalTransformer, ResNet
from mlu_lightning.observation.reference import Reference
from mlu_lightning.utilities.state import ParametersChangedError


def recorded(path: Path, module: Any = None, *callbacks: Callback, **settings: Any) -> Reference:
    """The recording of the first step."""
    settings = {"steps": [0], "max_steps": 1} | settings
    return Reference.load(record(path, module or ResNet(**SHAPE), *callbacks, **settings))


def transformer(depth: int) -> CausalTransformer:
    return CausalTransformer(vocabulary=20, context=8, depth=depth, embedding=6, heads=2, head_dim=4)


def batches(samples: Any, batch_size: int) -> DataLoader[Any]:
    return DataLoader(samples, batch_size=batch_size)


def test_probe_is_of_the_validation_data_if_there_are_any(tmp_path: Path) -> None:
    for name, validation, expected in (
        ("validation", loader(8, seed=1), samples(8, seed=1)),
        ("several", [loader(8, seed=2), loader(8, seed=1)], samples(8, seed=2)),
        ("training", None, samples()),
    ):
        reference = recorded(tmp_path / name, validation=validation, limit_val_batches=0)
        assert all(map(torch.equal, reference.probe, (tensor[:4] for tensor in expected.tensors))), name
        assert reference.header.runs == ("training_step" if name == "training" else "validation_step")


def test_probe_can_be_given_as_batch_file_or_reference(tmp_path: Path) -> None:
    x, y = torch.randn(30, 3), torch.randn(30, 2)
    save_file({"0": x, "1": y}, tmp_path / "probe.safetensors")
    hashes = set()
    for number, probe in enumerate([(x, y), tmp_path / "probe.safetensors", str(tmp_path / "0.safetensors")]):
        reference = recorded(tmp_path / f"{number}.safetensors", probe=probe, positions=20)
        assert reference.probe[0].equal(x[:20]) and reference.probe[1].equal(y[:20])
        assert reference.header.locations["s=0"] == (20, 8)
        hashes.add(reference.probe_hash)
    assert len(hashes) == 1


def test_probe_has_as_many_samples_as_the_positions_need_and_not_few(tmp_path: Path) -> None:
    tokens = torch.randint(20, (40, 9))
    for positions, samples_kept in ((100, 13), (10, 8), (10**6, 30)):
        path = tmp_path / f"{positions}.safetensors"
        reference = recorded(path, transformer(1), positions=positions, data=batches(tokens, 30))
        assert reference.probe.equal(tokens[:samples_kept])
        assert reference.header.locations["s=0"] == (min(positions, 240), 6)


def test_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokens, weights = torch.randint(20, (12, 9)), Weights()
    settings: dict[str, Any] = {"positions": 10, "dtype": "bfloat16", "data": batches(tokens, 6)}
    reference = recorded(tmp_path / "run.safetensors", transformer(2), weights, **settings)
    locations = {f"s={s}": (10, 6) for s in ("0", "0.25", "0.5", "0.75", "1")} | {"output": (10, 20)}
    assert reference.header.locations == locations
    assert reference.header.data_sizes == {"tokens.weight": (20,), "readout.weight": (20,)}
    rows = [round(i * 47 / 9) for i in range(10)]
    expected = weights.at[0]["tokens.weight"][tokens[:6, :-1].flatten()[rows]]
    assert reference.read(0)["s=0"].equal(expected.bfloat16().float())


class Images(Descent):  # a convolutional network with a strided stage
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        sizes = (6, 6, 1), (6, 12, 2), (12, 12, 1)
        ends = [(nn.Conv2d(fan, 10, 3, stride, 1), nn.Conv2d(10, out, 3, 1, 1)) for fan, out, stride in sizes]
        self.blocks = nn.ModuleList(nn.Sequential(first, nn.ReLU(), last) for first, last in ends)
        self.down, self.last, self.head = nn.Conv2d(6, 12, 1, 2), nn.Identity(), nn.Linear(12, 3)

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        h = self.stem(batch["image"])
        h = h + self.blocks[0](h)
        h = self.down(h) + self.blocks[1](h)
        h = self.last(h + self.blocks[2](h))
        return nn.functional.cross_entropy(self.head(h.mean((2, 3))), batch["label"])


def test_images(tmp_path: Path) -> None:
    images, weights = torch.randn(8, 1, 8, 8), Weights()
    data = batches([{"image": image, "label": i % 3} for i, image in enumerate(images)], 4)
    settings: dict[str, Any] = {"depths": [0, 0.25, 0.75], "positions": 100, "data": data}
    reference = recorded(tmp_path / "run.safetensors", Images(), weights, **settings)
    # 4 images of 64 pixels are cut to 100 positions; the last stage has 4 images of 16
    assert reference.header.locations == {"s=0": (100, 6), "s=0.25": (100, 6), "s=0.75": (64, 12), "output": (4, 3)}
    stem = nn.functional.conv2d(images[:4], weights.at[0]["stem.weight"], weights.at[0]["stem.bias"], padding=1)
    rows = [round(i * 255 / 99) for i in range(100)]
    torch.testing.assert_close(reference.read(0)["s=0"], stem.permute(0, 2, 3, 1).reshape(-1, 6)[rows])


REFUSED: list[tuple[dict[str, Any], str]] = [
    *(
        ({"steps": "all"}, "steps='all' is none of"),
        ({"steps": 0}, "steps=0 is none of"),
        ({"steps": []}, "is none of"),
    ),
    *(({"depths": depths}, "relative depths from 0") for depths in ([0, 2], [], 0.5)),
    *(({"steps": [1, -2]}, "list of steps from 0"), ({"positions": 0}, "1 or more")),
    ({"dtype": "float16"}, "none of: 'float32', 'bfloat16'"),
]


class Foreign: ...


class Iterated(ResNet): ...


class Plain(Descent):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.layer(batch[0]), batch[1])


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    for arguments, message in REFUSED:
        with pytest.raises(ValueError, match=message):
            ReferenceRecorder(path, **arguments)
    foreign: Any = {"probe": (torch.ones(2, 3), Foreign())}
    for message, module, settings in (
        (r"Foreign.*a batch of tensors, numbers and strings", ResNet(**SHAPE), foreign),
        ("no residual branches", Plain(), {}),
        (r"no batch to probe Iterated with: .*Give the callback probe=", Iterated(**SHAPE), {"data": iter([])}),
    ):
        with pytest.raises(ValueError, match=message):
            record(path, module, **settings)
    assert not path.exists()


def test_random_transfer_is_the_same_in_each_run_and_moves_no_random_state(tmp_path: Path) -> None:
    class Augmented(ResNet):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0].add_(torch.randn(3)), batch[1]]

    probe = torch.randn(8, 3), torch.randn(8, 2)
    kept, values, losses = probe[0].clone(), [], []
    for name in ("one", "two"):
        torch.manual_seed(0)
        module = Augmented(**SHAPE)
        torch.manual_seed(len(values))
        reference = recorded(tmp_path / name, module, probe=probe)
        assert reference.probe[0].equal(kept) and probe[0].equal(kept)
        values.append(reference.read(0)["s=0"])
    assert values[0].equal(values[1])
    for callbacks in ([], [ReferenceRecorder(tmp_path / "three", probe)]):
        torch.manual_seed(0)
        weights = Weights()
        fit(Augmented(**SHAPE), *callbacks, weights)
        losses.append(weights.losses)
    assert losses[0] == losses[1]


def test_probe_of_a_reference_is_passed_through_the_same_step(tmp_path: Path) -> None:
    one = recorded(tmp_path / "one")  # without validation data
    two = recorded(tmp_path / "two", probe=one.path, validation=loader())
    assert two.header.runs == one.header.runs == "training_step"


PROBE = torch.ones(4, 3), torch.ones(4, 2)


class Untested(ResNet):
    validation_step = LightningModule.validation_step  # type: ignore[assignment]  # as in a class that has none


def test_given_probe_goes_through_validation_step_if_there_is_one(tmp_path: Path) -> None:
    for module, expected in ((ResNet(**SHAPE), "validation_step"), (Untested(**SHAPE), "training_step")):
        assert recorded(tmp_path / expected, module, probe=PROBE).header.runs == expected


def test_probe_that_the_module_cannot_take_is_refused(tmp_path: Path) -> None:
    message = r"ResNet cannot take the probe in its validation_step: .*probe=\.\.\.\) a batch as"
    with pytest.raises(ValueError, match=message):
        recorded(tmp_path / "run", probe=(torch.ones(4, 5), torch.ones(4, 2)))
    assert not (tmp_path / "run").exists()


def test_depths_are_recorded_in_order(tmp_path: Path) -> None:
    assert recorded(tmp_path / "run", depths=[1, 0.5, 0, 0.5]).header.depths == (0, 0.5, 1)


def test_datasets_that_are_asked_for_whole_batches(tmp_path: Path) -> None:
    data = samples()
    whole = DataLoader(data, sampler=BatchSampler(SequentialSampler(data), 4, drop_last=False), batch_size=None)
    assert recorded(tmp_path / "run", data=whole).probe[0].equal(data.tensors[0][:4])


class Clamped(ResNet):  # changes a weight in its training_step
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.readout.weight.data.mul_(0.9)
        return super().training_step(batch)


def test_step_that_changes_parameters_is_not_probed(tmp_path: Path) -> None:
    class ClampedAndUntested(Clamped, Untested): ...

    message = r"ClampedAndUntested changes its parameters readout.weight .*validation_step"
    with pytest.raises(ParametersChangedError, match=message):
        recorded(tmp_path / "one", ClampedAndUntested(**SHAPE), probe=PROBE)
    assert recorded(tmp_path / "two", Clamped(**SHAPE), probe=PROBE).header.runs == "validation_step"
