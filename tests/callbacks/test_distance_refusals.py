"""EmbeddingDistance: runs and references that it does not compare."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.watched_runs import LARGE, SHAPE, SILENT, build_base, coupled, fit, loader, measure, record
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mlu_lightning import MLUCallback
from mlu_lightning.callbacks import EmbeddingDistance, ReferenceRecorder
from mlu_lightning.models import CausalTransformer, ResidualBlock, ResNet
from mlu_lightning.observation.reference import Reference


def test_uncoupled_embeddings_are_refused_with_the_remedy(tmp_path: Path) -> None:
    path = record(tmp_path / "large.safetensors", None, coupled(seed=0))
    for callbacks in ([], [coupled(seed=1)], [MLUCallback(build_base)]):
        with pytest.raises(
            ValueError, match=r"not coupled: .* of its size \(independent embeddings by 1.4\).*init=\"coupl"
        ):
            measure(path, *callbacks)
    measure(path, metrics=["gram", "cka", "procrustes", "output"])


def test_larger_embedding_than_the_references_is_refused_for_rms_only(tmp_path: Path) -> None:
    path = record(tmp_path / "small.safetensors", ResNet(**SHAPE), coupled())
    with pytest.raises(ValueError, match=r"has 32 coordinates in this run and 8 in .*leave \"rms\" out of metrics"):
        measure(path, coupled(), module=ResNet(**LARGE))
    measure(path, coupled(), module=ResNet(**LARGE), metrics=["gram", "cka", "procrustes", "output"])


def test_references_with_different_probes_are_refused(tmp_path: Path) -> None:
    record(tmp_path / "one.safetensors")
    record(tmp_path / "two.safetensors", probe=(torch.ones(4, 3), torch.ones(4, 2)))
    with pytest.raises(
        ValueError, match=r"recorded with different probes.*ReferenceRecorder\(probe='.*one.safetensors'\)"
    ):
        measure([str(tmp_path / "one.safetensors"), str(tmp_path / "two.safetensors")], metrics=["gram"])


def tokens_of(vocabulary: int) -> DataLoader[Any]:
    draws = torch.Generator().manual_seed(0)
    return DataLoader(torch.randint(vocabulary, (24, 9), generator=draws), batch_size=4)  # type: ignore[arg-type]


def transformer(vocabulary: int, embedding: int = 6) -> CausalTransformer:
    return CausalTransformer(vocabulary, context=8, depth=2, embedding=embedding, heads=2, head_dim=4)


@pytest.mark.parametrize(("reference", "run"), [(20, 10), (10, 20)])
def test_other_vocabulary_is_refused_before_the_probe_is_passed(reference: int, run: int, tmp_path: Path) -> None:
    path = record(tmp_path / "large.safetensors", transformer(reference, 12), data=tokens_of(reference))
    with pytest.raises(ValueError, match=rf"tokens.weight has {run} entries .* and {reference} in .*another tokenizer"):
        measure(path, module=transformer(run), data=tokens_of(run), metrics=["gram"])


def test_probe_that_the_module_cannot_take_is_refused(tmp_path: Path) -> None:
    class Renamed(LightningModule):
        """The same data by other names, so that only the pass itself fails."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(5, 8)
            self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
            self.head = nn.Linear(8, 2)

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            h = self.stem(batch[0])
            return nn.functional.mse_loss(self.head(h + self.block(h)), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    path = record(tmp_path / "large.safetensors")
    data = DataLoader([(torch.ones(5), torch.ones(2))] * 8, batch_size=4)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"Renamed cannot take the probe in its training_step: .*of the same data.*Record a"
    ):
        measure(path, module=Renamed(), data=data, metrics=["gram"])


def test_other_outputs_are_refused(tmp_path: Path) -> None:
    path = record(tmp_path / "large.safetensors")
    module = ResNet(**SHAPE | {"outputs": 5})
    data = DataLoader([(torch.ones(3), torch.ones(5))] * 8, batch_size=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"readout.weight has 5 entries"):
        measure(path, module=module, data=data, metrics=["gram"])


def test_no_common_step_is_refused(tmp_path: Path) -> None:
    path = record(tmp_path / "large.safetensors", steps=[5, 6])
    with pytest.raises(ValueError, match=r"at the steps 5, 6, and this run goes from 0 to 3.*Train longer"):
        measure(path, metrics=["gram"], steps=3)
    assert list(measure(path, metrics=["gram"], steps=5).distances()) == [5]
    with pytest.raises(ValueError, match=r"seen at step 0, but .* has no recording at step 0"):
        measure(path, metrics=["rms"])


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing.safetensors"):
        measure(tmp_path / "missing.safetensors")
    path = record(tmp_path / "large.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="not a readable reference"):
        measure(path)


def test_arguments_are_checked() -> None:
    for arguments, message in (
        (("a.safetensors", ["rms", "l2"]), r"metrics=\['rms', 'l2'\] should be .* rms, gram, cka, procrustes, output"),
        (("a.safetensors", []), "should be a list of some of"),
        (("a.safetensors", "gram"), "should be a list of some of"),
        ((["x/a.safetensors", "y/a.safetensors"],), "files of the same name; give a dict"),
        ((["x/a:v0", "y/a:v0"],), "files of the same name; give a dict"),
        (({},), "one or more references"),
        (({"floor": "a.safetensors"},), 'none of them by the name "floor"'),
    ):
        with pytest.raises(ValueError, match=message):
            EmbeddingDistance(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("other", ["two.safetensors", "limit"])
def test_two_callbacks_that_log_under_the_same_names_are_refused(other: str, tmp_path: Path) -> None:
    record(tmp_path / "one.safetensors")
    reference = other if other == "limit" else str(tmp_path / other)
    callbacks = [
        EmbeddingDistance(str(tmp_path / "one.safetensors"), ["gram", "cka"]),
        EmbeddingDistance(reference, ["output", "gram"]),
    ]
    trainer = Trainer(max_steps=2, callbacks=callbacks, **SILENT)
    with pytest.raises(
        ValueError, match=r"of one and of (two|limit), would log .*different metrics, or the references as a"
    ):
        trainer.fit(ResNet(**SHAPE), loader())


def test_resumed_run_that_is_past_all_steps_of_the_reference_is_refused(tmp_path: Path) -> None:
    path = record(tmp_path / "large.safetensors", steps=[0, 2])
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3)
    fit(ResNet(**SHAPE), checkpoint, steps=3, enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"at the steps 0, 2, and this run goes from 3 to 6.*Train longer, or record"):
        measure(path, metrics=["gram"], ckpt_path=tmp_path / "step=3.ckpt")


def test_references_of_different_steps_of_the_module_are_refused(tmp_path: Path) -> None:
    record(tmp_path / "one.safetensors", steps=[0])
    record(tmp_path / "two.safetensors", steps=[0], validation=loader(shuffle=False))
    one, two = (Reference.load(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one.probe_hash == two.probe_hash  # the same samples, in training_step and in validation_step
    with pytest.raises(ValueError, match=r"one.safetensors and .*two.safetensors were recorded with different probes"):
        measure([str(one.path), str(two.path)], metrics=["gram"])


class Patches(LightningModule):
    """A stream with a position for each patch of two numbers; patches may overlap, which no weight shows."""

    def __init__(self, stride: int, embedding: int) -> None:
        super().__init__()
        self.stride = stride
        self.embed = nn.Linear(2, embedding)
        self.block = ResidualBlock(8, embedding)
        self.readout = nn.Linear(embedding, 2)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        h = self.embed(batch[0].unfold(1, 2, self.stride))
        return nn.functional.mse_loss(self.readout((h + self.block(h)).mean(1)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("positions", [128, 10])
@pytest.mark.parametrize(("reference", "run"), [((1, 28), (2, 16)), ((2, 16), (1, 28))])
def test_other_positions_of_the_same_probe_are_refused(
    reference: tuple[int, int], run: tuple[int, int], positions: int, tmp_path: Path
) -> None:
    data = DataLoader([(torch.ones(8), torch.ones(2))] * 8, batch_size=4)  # type: ignore[arg-type]
    recorder = ReferenceRecorder(tmp_path / "large.safetensors", steps=[0], positions=positions)
    fit(Patches(reference[0], 16), recorder, data=data)
    message = rf"makes {run[1]} positions of the probe, and that of .* made {reference[1]}: .*reference of this archit"
    with pytest.raises(ValueError, match=message):
        measure(recorder.path, module=Patches(run[0], 8), data=data, metrics=["gram"])
    measure(recorder.path, module=Patches(reference[0], 8), data=data, metrics=["gram"])


class Translator(LightningModule):
    """A decoder that attends to an encoder's stream, or to the embedded source if there is no encoder."""

    def __init__(self, encoder: bool, embedding: int = 8) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(9, embedding), nn.Embedding(9, embedding)
        self.encoder = nn.ModuleList(ResidualBlock(5, embedding) for _ in range(2 if encoder else 0))
        self.cross = nn.MultiheadAttention(embedding, 2, batch_first=True)
        self.decoder = ResidualBlock(7, embedding)
        self.readout = nn.Linear(embedding, 9)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        memory = self.source(batch[0])
        for block in self.encoder:
            memory = memory + block(memory)
        h = self.target(batch[1])
        h = h + self.cross(h, memory, memory)[0]
        logits = self.readout(h + self.decoder(h))
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(("reference", "run"), [(True, False), (False, True)])
def test_other_number_of_streams_is_refused(reference: bool, run: bool, tmp_path: Path) -> None:
    data = DataLoader([(torch.arange(4), torch.arange(4, 8))] * 8, batch_size=4)  # type: ignore[arg-type]
    path = record(tmp_path / "large.safetensors", Translator(reference), data=data, steps=[0])
    message = (
        rf"has {1 + run} residual streams, and that of .* {1 + reference}: .*Record a reference of this architecture"
    )
    with pytest.raises(ValueError, match=message):
        measure(path, module=Translator(run), data=data, metrics=["gram"])


class Headed(ResNet):
    """Outputs of any number, from a readout by another name, for a loss that takes any."""

    def __init__(self, outputs: int) -> None:
        super().__init__(**SHAPE)
        del self.readout
        self.head = nn.Linear(SHAPE["embedding"], outputs)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embed(x)
        for block in self.blocks:
            stream = stream + block(stream)
        output: Tensor = self.head(stream)
        return output

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss: Tensor = self(batch[0]).square().mean()
        return loss


def test_outputs_that_only_the_pass_shows_to_be_others_are_refused(tmp_path: Path) -> None:
    path = record(tmp_path / "large.safetensors", steps=[0])
    message = r"This module has 5 outputs, and that of .* 2: .*Record a reference with.*leave \"output\" out of metrics"
    with pytest.raises(ValueError, match=message):
        measure(path, module=Headed(5), metrics=["gram", "output"])
    measure(path, module=Headed(5), metrics=["gram"])
    measure(path, module=Headed(2), metrics=["gram", "output"])
