"""ReferenceRecorder: what it writes, when, and that the training does not notice."""

import resource
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.watched_runs import (
    SHAPE,
    Busy,
    Weights,
    fit,
    loader,
    samples,
    stream_of,
)
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from mlu_lightning import MLUCallback, Plan
from mlu_lightning.callbacks import ReferenceRecorder
from mlu_lightning.models import ResNet
from mlu_lightning.observation.reference import Reference


def test_recorded_values_are_those_of_the_formula(tmp_path: Path) -> None:
    weights = Weights()
    fit(ResNet(**SHAPE), ReferenceRecorder(tmp_path / "run.safetensors"), weights)
    reference = Reference.load(tmp_path / "run.safetensors")
    assert reference.steps == (0, 1, 2, 4, 6)
    x = samples().tensors[0][:4]  # one batch, in the order of the data
    for step in reference.steps:
        h = stream_of(weights.at[step], x)
        found = reference.read(step)
        for position, s in enumerate(("0", "0.25", "0.5", "0.75", "1")):
            torch.testing.assert_close(found[f"s={s}"], h[position])
        torch.testing.assert_close(found["output"], h[-1] @ weights.at[step]["readout.weight"].T)
    assert reference.losses.equal(torch.stack(weights.losses))
    assert (reference.header.depth, reference.header.embedding, reference.header.hidden) == ((4,), (8,), {"mlp": 16})


@pytest.mark.parametrize("residual", ["hook", "fold"])
def test_stream_is_read_before_the_readout_is_multiplied_and_the_output_after(residual: Any, tmp_path: Path) -> None:
    base = ResNet(**SHAPE | {"depth": 2, "embedding": 2})
    weights = Weights()
    mlu = MLUCallback(base, residual=residual)
    fit(ResNet(**SHAPE), mlu, ReferenceRecorder(tmp_path / "run.safetensors"), weights)
    reference = Reference.load(tmp_path / "run.safetensors")
    branch, readout = (0.5, 0.25) if residual == "hook" else (1.0, 1.0)
    for step in (0, 4):
        h = stream_of(weights.at[step], samples().tensors[0][:4], branch)
        torch.testing.assert_close(reference.read(step)["s=1"], h[-1])
        output = readout * h[-1] @ weights.at[step]["readout.weight"].T
        torch.testing.assert_close(reference.read(step)["output"], output)
    assert reference.header.plan is not None
    assert Plan.from_yaml(reference.header.plan, "the reference") == mlu.plan


@pytest.mark.parametrize("validation", [None, loader(8, seed=1)])
def test_training_is_bit_for_bit_that_without_the_recorder(validation: Any, tmp_path: Path) -> None:
    runs = []
    for callbacks in ([], [ReferenceRecorder(tmp_path / "run.safetensors", steps=1)]):
        seed_everything(3, verbose=False)
        module = Busy()
        trainer = fit(module, *callbacks, validation=validation, num_sanity_val_steps=0)
        runs.append((module.state_dict(), module.seen, trainer.callback_metrics, torch.rand(1)))
    plain, recorded = runs
    assert all(value.equal(recorded[0][name]) for name, value in plain[0].items())
    assert plain[1:] == recorded[1:]


@pytest.mark.parametrize(
    ("steps", "expected"), [("log", (0, 1, 2, 4, 7)), (3, (0, 3, 6)), ([2, 5], (2, 5)), ([7, 100], (7,))]
)
def test_steps(steps: Any, expected: tuple[int, ...], tmp_path: Path) -> None:
    fit(ResNet(**SHAPE), ReferenceRecorder(tmp_path / "run.safetensors", steps=steps), steps=7)
    assert Reference.load(tmp_path / "run.safetensors").steps == expected


def test_losses_are_means_over_accumulated_batches(tmp_path: Path) -> None:
    weights = Weights()
    recorder = ReferenceRecorder(tmp_path / "run.safetensors", steps=[1, 3])
    fit(ResNet(**SHAPE), recorder, weights, steps=3, accumulate_grad_batches=3)
    reference = Reference.load(recorder.path)
    assert reference.steps == (1, 3)
    # the Trainer has divided them by 3
    torch.testing.assert_close(reference.losses, torch.stack(weights.losses).reshape(3, 3).sum(1))


class Two(ResNet):
    """Manual optimization with two optimizers, which both count."""

    def __init__(self) -> None:
        super().__init__(**SHAPE)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(self(batch[0]), batch[1]))
            with optimizer.toggle_model():
                optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.blocks.parameters(), 0.1), torch.optim.SGD(self.readout.parameters(), 0.1)]


def test_manual_optimization_counts_as_the_trainer_does(tmp_path: Path) -> None:
    recorder = ReferenceRecorder(tmp_path / "run.safetensors")
    plain, recorded = Two(), Two()
    recorded.load_state_dict(plain.state_dict())
    for module, callbacks in ((plain, []), (recorded, [recorder])):
        fit(module, *callbacks, steps=8, data=loader(shuffle=False))
    reference = Reference.load(recorder.path)
    assert reference.steps == (0, 2, 4, 8)
    assert reference.losses.shape == (8,) and reference.losses.isnan().all()
    assert all(value.equal(recorded.state_dict()[name]) for name, value in plain.state_dict().items())


class TwoWithLoss(Two):
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        super().training_step(batch)
        return nn.functional.mse_loss(self(batch[0]), batch[1])


@pytest.mark.parametrize(("model", "batches", "repeats"), [(ResNet, 2, 1), (TwoWithLoss, 1, 2)])
def test_no_loss_is_lost_when_more_wait_than_there_is_place_for(
    model: type[ResNet], batches: int, repeats: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlu_lightning.callbacks.reference_recorder._MOST_PENDING", 3)
    weights, recorder = Weights(), ReferenceRecorder(tmp_path / "run.safetensors", steps=[0, 8])
    module = model(**SHAPE) if model is ResNet else model()
    fit(module, recorder, weights, steps=8, **({} if batches == 1 else {"accumulate_grad_batches": batches}))
    losses = torch.stack(weights.losses).reshape(-1, batches).sum(1)
    torch.testing.assert_close(Reference.load(recorder.path).losses, losses.repeat_interleave(repeats))


def test_resumed_run_writes_the_file_of_the_uninterrupted_run(tmp_path: Path) -> None:
    plain, half = tmp_path / "plain.safetensors", tmp_path / "half.safetensors"
    for path, steps in ((plain, 12), (half, 7)):
        seed_everything(0, verbose=False)
        checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)
        recorder = ReferenceRecorder(path, steps=[0, 3, 5, 6, 7, 9, 12])
        fit(ResNet(**SHAPE), recorder, checkpoint, steps=steps, data=loader(shuffle=False), enable_checkpointing=True)
    assert Reference.load(half).steps == (0, 3, 5, 6, 7)
    seed_everything(1, verbose=False)
    recorder = ReferenceRecorder(half, steps=[0, 3, 5, 6, 7, 9, 12])
    ckpt = tmp_path / "step=6.ckpt"
    fit(ResNet(**SHAPE), recorder, steps=12, data=loader(shuffle=False), ckpt_path=ckpt)
    one, other = Reference.load(plain), Reference.load(half)
    assert one.steps == other.steps == (0, 3, 5, 6, 7, 9, 12)
    assert one.losses.equal(other.losses)
    assert all(one.read(step)[name].equal(other.read(step)[name]) for step in one.steps for name in one.read(step))

    half.unlink()
    with pytest.warns(UserWarning, match=r"goes on from step 6, and there is no .*half.safetensors"):
        fit(ResNet(**SHAPE), ReferenceRecorder(half), steps=7, data=loader(shuffle=False), ckpt_path=ckpt)
    assert Reference.load(half).steps == (7,)
    assert Reference.load(half).losses.isnan().tolist() == [True] * 6 + [False]

    with pytest.raises(ValueError, match="probe"):
        other_probe = ReferenceRecorder(plain, probe=(torch.ones(4, 3), torch.ones(4, 2)))
        fit(ResNet(**SHAPE), other_probe, steps=12, data=loader(shuffle=False), ckpt_path=ckpt)


def test_run_whose_base_is_drawn_anew_goes_on_in_its_file(tmp_path: Path) -> None:
    """What only initialization uses of a plan makes no other run, and in the file is that of the base it began with."""
    path = tmp_path / "run.safetensors"
    settings: dict[str, Any] = {"data": loader(shuffle=False), "enable_checkpointing": True}

    def run(*callbacks: Callback, steps: int, **more: Any) -> Plan:
        mlu = MLUCallback(ResNet(**SHAPE | {"depth": 2, "hidden": 8}))
        recorder = ReferenceRecorder(path, steps=3)
        fit(ResNet(**SHAPE), mlu, recorder, *callbacks, steps=steps, **settings, **more)
        assert mlu.plan is not None
        return mlu.plan

    first = run(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3), steps=3)
    assert run(steps=6, ckpt_path=tmp_path / "step=3.ckpt").base != first.base
    reference = Reference.load(path)
    assert reference.steps == (0, 3, 6)
    assert reference.header.plan == first.to_yaml()


def test_existing_file_is_not_overwritten_by_a_new_run(tmp_path: Path) -> None:
    recorder = ReferenceRecorder(tmp_path / "run.safetensors")
    fit(ResNet(**SHAPE), recorder)
    before = recorder.path.read_bytes()
    with pytest.raises(FileExistsError, match=r"would overwrite it. Delete it, give .* another path, or resume"):
        fit(ResNet(**SHAPE), ReferenceRecorder(recorder.path))
    assert recorder.path.read_bytes() == before


def test_second_fit_goes_on(tmp_path: Path) -> None:
    recorder = ReferenceRecorder(tmp_path / "run.safetensors", steps=2)
    trainer = fit(ResNet(**SHAPE), recorder, steps=3)
    trainer.fit_loop.epoch_loop.max_steps = 6
    module: Any = trainer.lightning_module
    trainer.fit(module, loader())
    assert Reference.load(recorder.path).steps == (0, 2, 4, 6)


def test_full_disk_is_one_warning_and_the_training_goes_on(tmp_path: Path) -> None:
    """The disk takes no file of more than 2000 bytes from step 2 to step 5."""

    class FullDisk(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            limit = 2000 if 1 <= trainer.global_step < 5 else before[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    recorder = ReferenceRecorder(tmp_path / "run.safetensors", steps=1)
    kept: dict[int, tuple[int, ...]] = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            kept[trainer.global_step] = Reference.load(recorder.path).steps

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = fit(ResNet(**SHAPE), FullDisk(), recorder, Look(), steps=7)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert trainer.global_step == 7
    messages = [str(warning.message) for warning in caught if "could not be written" in str(warning.message)]
    assert len(messages) == 1
    assert "at step 2" in messages[0] and "The training goes on" in messages[0]
    assert kept[4] == (0, 1)
    assert kept[7] == (0, 1, 2, 3, 4, 5, 6, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


def test_run_that_diverges_is_recorded(tmp_path: Path) -> None:
    recorder = ReferenceRecorder(tmp_path / "run.safetensors", steps=[0, 6])
    fit(ResNet(**SHAPE, lr=1e30), recorder)
    assert Reference.load(recorder.path).read(6)["s=1"].isnan().any()


@pytest.mark.parametrize("form", ["vector", "one"])
def test_loss_of_any_form(form: str, tmp_path: Path) -> None:
    class Odd(ResNet):
        def __init__(self) -> None:
            super().__init__(**SHAPE)
            self.automatic_optimization = form == "one"

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:
            loss = nn.functional.mse_loss(self(batch[0]), batch[1], reduction="none").mean(1)
            if form != "one":
                self.manual_backward(loss.mean())
            return {"vector": {"loss": loss}, "one": loss.mean()[None]}[form]

    recorder = ReferenceRecorder(tmp_path / "run.safetensors", steps=[0])
    module = Odd()
    if form == "one":
        fit(module, recorder, steps=2)
    else:
        fit(module, recorder, max_epochs=1, steps=-1)
    assert Reference.load(recorder.path).steps == (0,)


def test_steps_without_a_loss_are_nan_in_any_precision(tmp_path: Path) -> None:
    class Skipping(ResNet):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:
            return None if self.global_step == 2 else super().training_step(batch)

    recorder = ReferenceRecorder(tmp_path / "run.safetensors", steps=[4])
    fit(Skipping(**SHAPE), recorder, steps=4, precision="bf16-true")
    assert Reference.load(recorder.path).losses.isnan().tolist() == [False, False, True, False]


def test_places_that_cannot_be_written_are_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"cannot be written: it is a folder.*the path of a file"):
        fit(ResNet(**SHAPE), ReferenceRecorder(tmp_path / "folder"))
    recorder = ReferenceRecorder(tmp_path / "new" / "folder" / "run.safetensors")
    fit(ResNet(**SHAPE), recorder)
    assert recorder.path.exists()


class Unlogged(ResNet):
    """``self.log`` cannot be compiled."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_module_is_recorded_and_compiled_no_more_often(how: str, tmp_path: Path) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    runs = []
    for name in ("plain", "eager", "compiled"):
        torch.compiler.reset()
        torch.manual_seed(0)
        module: Any = Unlogged(**SHAPE)
        if name != "eager" and how == "wrapped":
            module = torch.compile(module, backend=backend)
        elif name != "eager":
            module.compile(backend=backend)
        recorder = ReferenceRecorder(tmp_path / f"{name}.safetensors", steps=1)
        fit(module, *([] if name == "plain" else [recorder]), data=loader(shuffle=False))
        runs.append(len(graphs))
    torch.compiler.reset()
    plain, eager, compiled = runs
    assert 0 < plain == eager == compiled - plain
    one, other = Reference.load(tmp_path / "eager.safetensors"), Reference.load(tmp_path / "compiled.safetensors")
    for step in one.steps:
        torch.testing.assert_close(one.read(step), other.read(step))
