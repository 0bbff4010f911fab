"""EmbeddingDistance: runs and references that it does not compare."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.watched_runs import LARGE, SHAPE, Descent, EncoderDecoder, build_base, couple, fit, loader, measure, record
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mlu_lightning import MLUCallback
from mlu_lightning.callbacks import EmbeddingDistance, ReferenceRecorder
from mlu_lightning.models import CausalTransformer, ResidualBlock, ResNet
from mlu_lightning.observation.reference import Reference


def refused(message: str, reference: Any, *callbacks: Callback, **settings: Any) -> None:
    with pytest.raises(ValueError, match=message):
        measure(reference, *callbacks, **settings)


def repeated(*sample: Tensor) -> DataLoader[Any]:
    samples: Any = [sample] * 8
    return DataLoader(samples, batch_size=4)


def test_uncoupled_embeddings_are_refused_with_the_remedy(tmp_path: Path) -> None:
    path = record(tmp_path / "large.safetensors", None, couple(seed=0))
    for callbacks in ([], [couple(seed=1)], [MLUCallback(build_base)]):
        message = r"not coupled: .* of its size \(independent embeddings by 1.4\).*init=\"coupl"
        refused(message, path, *callbacks, metrics=["gram", "rms"])
    measure(path, metrics=["gram", "cka", "procrustes", "output"])


def test_larger_embedding_than_the_references_is_refused_for_rms_only(tmp_path: Path) -> None:
    path = record(tmp_path / "small.safetensors", ResNet(**SHAPE), couple())
    message = r"has 32 coordinates in this run and 8 in .*leave \"rms\" out of metrics"
    refused(message, path, couple(), module=ResNet(**LARGE), metrics=["rms"])
    measure(path, couple(), module=ResNet(**LARGE), metrics=["gram", "cka", "procrustes", "output"])


def tokens_of(vocabulary: int) -> DataLoader[Any]:
    tokens: Any = torch.randint(vocabulary, (24, 9), generator=torch.Generator().manual_seed(0))
    return DataLoader(tokens, batch_size=4)


def transformer(vocabulary: int, embedding: int = 6) -> CausalTransformer:
    return CausalTransformer(vocabulary, context=8, depth=2, embedding=embedding, heads=2, head_dim=4)


@pytest.mark.parametrize(("reference", "run"), [(20, 10), (10, 20)])
def test_other_vocabulary_is_refused_before_the_probe_is_passed(reference: int, run: int, tmp_path: Path) -> None:
    path = record(tmp_path / "large.safetensors", transformer(reference, 12), data=tokens_of(reference))
    message = rf"tokens.weight has {run} entries .* and {reference} in .*another tokenizer"
    refused(message, path, module=transformer(run), data=tokens_of(run), metrics=["gram"])


class Renamed(Descent):  # the same data by other names, so that only the pass itself fails
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 8), nn.Linear(8, 2)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        h = self.stem(batch[0])
        return nn.functional.mse_loss(self.head(h + self.block(h)), batch[1])


def test_probe_that_the_module_cannot_take_is_refused(tmp_path: Path) -> None:
    message = r"Renamed cannot take the probe in its training_step: .*of the same data.*Record a"
    data = repeated(torch.ones(5), torch.ones(2))
    refused(message, record(tmp_path / "large.safetensors"), module=Renamed(), data=data, metrics=["gram"])


def test_other_outputs_are_refused(tmp_path: Path) -> None:
    path, module = record(tmp_path / "large.safetensors"), ResNet(**SHAPE | {"outputs": 5})
    data = repeated(torch.ones(3), torch.ones(5))
    refused("readout.weight has 5 entries", path, module=module, data=data, metrics=["gram"])


def test_no_common_step_is_refused(tmp_path: Path) -> None:
    path = record(tmp_path / "large.safetensors", steps=[5, 6])
    refused(r"at the steps 5, 6, and this run goes from 0 to 3.*Train longer", path, metrics=["gram"], steps=3)
    assert list(measure(path, metrics=["gram"], steps=5).distances()) == [5]
    refused(r"seen at step 0, but .* has no recording at step 0", path, metrics=["rms"])


ARGUMENTS: list[tuple[Any, str]] = [
    (("a.safetensors", ["rms", "l2"]), r"metrics=\['rms', 'l2'\] should be .* rms, gram, cka, procrustes, output"),
    *((("a.safetensors", metrics), "should be a list of some of") for metrics in ([], "gram")),
    *(([paths], "files of the same name: give a dict") for paths in (["x/a.st", "y/a.st"], ["x/a:v0", "y/a:v0"])),
    (({},), "one or more references"),
    (({"floor": "a.safetensors"},), 'none of them by the name "floor"'),
    *(
        ((dict.fromkeys(names, "a.safetensors"),), "by one that goes on from another's")
        for names in (["a", "a/b"], ["b/a", "b"], ["floor/a"], [""])
    ),
]


def test_arguments_are_checked() -> None:
    for arguments, message in ARGUMENTS:
        with pytest.raises(ValueError, match=message):
            EmbeddingDistance(*arguments)


@pytest.mark.parametrize("other", ["two.safetensors", {"two": "two.safetensors"}, "limit"])
def test_two_callbacks_that_log_under_the_same_names_are_refused(other: Any, tmp_path: Path) -> None:
    """Or under one that is the folder of the other's."""
    one = record(tmp_path / "one.safetensors")
    second = EmbeddingDistance(other, ["output", "gram"])
    message = r"of one and of (two|limit), would log .*different metrics, or the references as a"
    refused(message, str(one), second, metrics=["gram", "cka"], steps=2)


def test_resumed_run_that_is_past_all_steps_of_the_reference_is_refused(tmp_path: Path) -> None:
    path = record(tmp_path / "large.safetensors", steps=[0, 2])
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3)
    fit(ResNet(**SHAPE), checkpoint, steps=3, enable_checkpointing=True)
    message = r"at the steps 0, 2, and this run goes from 3 to 6.*Train longer, or record"
    refused(message, path, metrics=["gram"], ckpt_path=tmp_path / "step=3.ckpt")


@pytest.mark.parametrize("differs", ["probe", "step of the module"])
def test_references_with_different_probes_are_refused(differs: str, tmp_path: Path) -> None:
    probe = (torch.ones(4, 3), torch.ones(4, 2))
    other: dict[str, Any] = {"probe": probe} if differs == "probe" else {"validation": loader(shuffle=False)}
    paths = [record(tmp_path / "one.safetensors", steps=[0]), record(tmp_path / "two.safetensors", steps=[0], **other)]
    one, two = map(Reference.load, paths)
    # the same samples, in training_step and in validation_step
    assert (one.probe_hash == two.probe_hash) is (differs != "probe")
    message = (
        r"one.safetensors and .*two.safetensors were recorded with different probes.*\(probe='.*one.safetensors'\)"
    )
    refused(message, [*map(str, paths)], metrics=["gram"])


class Patches(Descent):
    """A stream with a position for each patch of two numbers; patches may overlap, which no weight shows."""

    def __init__(self, stride: int, embedding: int) -> None:
        super().__init__()
        self.stride, self.embed, self.block = stride, nn.Linear(2, embedding), ResidualBlock(8, embedding)
        self.readout = nn.Linear(embedding, 2)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        h = self.embed(batch[0].unfold(1, 2, self.stride))
        return nn.functional.mse_loss(self.readout((h + self.block(h)).mean(1)), batch[1])


@pytest.mark.parametrize("positions", [128, 10])
@pytest.mark.parametrize(("reference", "run"), [((1, 28), (2, 16)), ((2, 16), (1, 28))])
def test_other_positions_of_a_probe_are_refused(reference: Any, run: Any, positions: int, tmp_path: Path) -> None:
    data = repeated(torch.ones(8), torch.ones(2))
    recorder = ReferenceRecorder(tmp_path / "large.safetensors", steps=[0], positions=positions)
    fit(Patches(reference[0], 16), recorder, data=data)
    message = rf"makes {run[1]} positions of the probe, and that of .* made {reference[1]}: .*reference of this archit"
    refused(message, recorder.path, module=Patches(run[0], 8), data=data, metrics=["gram"])
    measure(recorder.path, module=Patches(reference[0], 8), data=data, metrics=["gram"])


@pytest.mark.parametrize(("reference", "run"), [((5, 5), ()), ((), (5, 5))])
def test_other_number_of_streams_is_refused(reference: tuple[int, ...], run: tuple[int, ...], tmp_path: Path) -> None:
    data = repeated(torch.arange(4), torch.arange(4, 8))
    path = record(tmp_path / "large.safetensors", EncoderDecoder(reference), data=data, steps=[0])
    streams, theirs = 1 + bool(run), 1 + bool(reference)
    message = rf"has {streams} residual streams, and that of .* {theirs}: .*Record a reference of this architecture"
    refused(message, path, module=EncoderDecoder(run), data=data, metrics=["gram"])


class Headed(ResNet):  # outputs of any number, from a readout by another name, for a loss that takes any
    def __init__(self, outputs: int) -> None:
        super().__init__(**SHAPE)
        del self.readout
        self.head = nn.Linear(SHAPE["embedding"], outputs)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embed(x)
        for block in self.blocks:
            stream = stream + block(stream)
        return torch.as_tensor(self.head(stream))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.as_tensor(self(batch[0]).square().mean())


def test_outputs_that_only_the_pass_shows_to_be_others_are_refused(tmp_path: Path) -> None:
    path = record(tmp_path / "large.safetensors", steps=[0])
    message = r"This module has 5 outputs, and that of .* 2: .*Record a reference with.*leave \"output\" out of metrics"
    refused(message, path, module=Headed(5), metrics=["gram", "output"])
    measure(path, module=Headed(5), metrics=["gram"])
    measure(path, module=Headed(2), metrics=["gram", "output"])
