"""ReferenceRecorder: what it writes, when, and that the training does not notice."""

import resource
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.watched_runs import SHAPE, Busy, Weights, fit, loader, record, samples, stream_of
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from mlu_lightning import MLUCallback, Plan
from mlu_lightning.callbacks import EmbeddingDistance, FeatureUpdate, ReferenceRecorder
from mlu_lightning.models import ResNet
from mlu_lightning.observation.reference import Reference


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.safetensors"


def test_recorded_values_are_those_of_the_formula(path: Path) -> None:
    weights = Weights()
    fit(ResNet(**SHAPE), ReferenceRecorder(path), weights)
    reference = Reference.load(path)
    assert reference.steps == (0, 1, 2, 4, 6)
    x = samples().tensors[0][:4]  # one batch, in the order of the data
    for step in reference.steps:
        h = stream_of(weights.at[step], x)
        expected = {f"s={position / 4:g}": stream for position, stream in enumerate(h)}
        expected |= {"output": h[-1] @ weights.at[step]["readout.weight"].T}
        torch.testing.assert_close(reference.read(step), expected)
    assert reference.losses.equal(torch.stack(weights.losses))
    assert (reference.header.depth, reference.header.embedding, reference.header.hidden) == ((4,), (8,), {"mlp": 16})


@pytest.mark.parametrize(("residual", "branch", "readout"), [("hook", 0.5, 0.25), ("fold", 1.0, 1.0)])
def test_stream_is_read_before_the_readout_is_multiplied_and_the_output_after(
    residual: Any, branch: float, readout: float, path: Path
) -> None:
    weights, mlu = Weights(), MLUCallback(ResNet(**SHAPE | {"depth": 2, "embedding": 2}), residual=residual)
    fit(ResNet(**SHAPE), mlu, ReferenceRecorder(path), weights)
    reference = Reference.load(path)
    for step in (0, 4):
        h = stream_of(weights.at[step], samples().tensors[0][:4], branch)
        torch.testing.assert_close(reference.read(step)["s=1"], h[-1])
        output = readout * h[-1] @ weights.at[step]["readout.weight"].T
        torch.testing.assert_close(reference.read(step)["output"], output)
    assert reference.header.plan is not None and Plan.from_yaml(reference.header.plan, "the reference") == mlu.plan


WATCHES: dict[str, Callable[[Path], Callback]] = {
    "recorder": lambda path: ReferenceRecorder(path.with_stem("own"), steps=1),
    "distance": lambda path: EmbeddingDistance(record(path, Busy(), steps=1), ["gram", "output"]),
    "features": lambda path: FeatureUpdate(steps=1),
}


@pytest.mark.parametrize("mlu", [False, True])
@pytest.mark.parametrize("validation", [None, loader(8, seed=1)])
@pytest.mark.parametrize("watch", WATCHES)
def test_training_is_bit_for_bit_that_which_nobody_watches(watch: str, validation: Any, mlu: bool, path: Path) -> None:
    """With dropout, batch norm, random numbers in steps, metrics and noise in validation."""
    runs = []
    for watches in ([], [WATCHES[watch](path)]):
        seed_everything(3, verbose=False)
        module = Busy()
        trainer = fit(module, *[MLUCallback()] * mlu, *watches, validation=validation, num_sanity_val_steps=0)
        metrics = {name: value for name, value in trainer.callback_metrics.items() if not name.startswith("mlu/")}
        runs.append((module.state_dict(), module.seen, metrics, torch.rand(1)))
    plain, watched = runs
    assert all(value.equal(watched[0][name]) for name, value in plain[0].items()) and plain[1:] == watched[1:]


@pytest.mark.parametrize(
    ("steps", "expected"), [("log", (0, 1, 2, 4, 7)), (3, (0, 3, 6)), ([2, 5], (2, 5)), ([7, 100], (7,))]
)
def test_steps(steps: Any, expected: tuple[int, ...], path: Path) -> None:
    fit(ResNet(**SHAPE), ReferenceRecorder(path, steps=steps), steps=7)
    assert Reference.load(path).steps == expected


def test_losses_are_means_over_accumulated_batches(path: Path) -> None:
    weights = Weights()
    fit(ResNet(**SHAPE), ReferenceRecorder(path, steps=[1, 3]), weights, steps=3, accumulate_grad_batches=3)
    reference = Reference.load(path)
    assert reference.steps == (1, 3)
    # the Trainer has divided them by 3
    torch.testing.assert_close(reference.losses, torch.stack(weights.losses).reshape(3, 3).sum(1))


class Two(ResNet):  # manual optimization with two optimizers, which both count
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


def test_manual_optimization_counts_as_the_trainer_does(path: Path) -> None:
    plain, recorded = Two(), Two()
    recorded.load_state_dict(plain.state_dict())
    for module, callbacks in ((plain, []), (recorded, [ReferenceRecorder(path)])):
        fit(module, *callbacks, steps=8, data=loader(shuffle=False))
    reference = Reference.load(path)
    assert reference.steps == (0, 2, 4, 8) and reference.losses.shape == (8,) and reference.losses.isnan().all()
    assert all(value.equal(recorded.state_dict()[name]) for name, value in plain.state_dict().items())


class TwoWithLoss(Two):
    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        super().training_step(batch)
        return nn.functional.mse_loss(self(batch[0]), batch[1])


@pytest.mark.parametrize(("model", "batches", "repeats"), [(lambda: ResNet(**SHAPE), 2, 1), (TwoWithLoss, 1, 2)])
def test_no_loss_is_lost_when_more_wait_than_have_a_place(
    model: Any, batches: int, repeats: int, path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("mlu_lightning.callbacks.reference_recorder._MOST_PENDING", 3)
    weights, recorder = Weights(), ReferenceRecorder(path, steps=[0, 8])
    fit(model(), recorder, weights, steps=8, **({} if batches == 1 else {"accumulate_grad_batches": batches}))
    losses = torch.stack(weights.losses).reshape(-1, batches).sum(1)
    torch.testing.assert_close(Reference.load(path).losses, losses.repeat_interleave(repeats))


def test_resumed_run_writes_the_file_of_the_uninterrupted_run(tmp_path: Path) -> None:
    plain, half, ckpt = tmp_path / "plain.safetensors", tmp_path / "half.safetensors", tmp_path / "step=6.ckpt"
    chosen, data = [0, 3, 5, 6, 7, 9, 12], loader(shuffle=False)
    for path, steps in ((plain, 12), (half, 7)):
        seed_everything(0, verbose=False)
        checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)
        recorder = ReferenceRecorder(path, steps=chosen)
        fit(ResNet(**SHAPE), recorder, checkpoint, steps=steps, data=data, enable_checkpointing=True)
    assert Reference.load(half).steps == (0, 3, 5, 6, 7)
    seed_everything(1, verbose=False)
    fit(ResNet(**SHAPE), ReferenceRecorder(half, steps=chosen), steps=12, data=data, ckpt_path=ckpt)
    one, other = Reference.load(plain), Reference.load(half)
    assert one.steps == other.steps == tuple(chosen) and one.losses.equal(other.losses)
    assert all(one.read(step)[name].equal(other.read(step)[name]) for step in one.steps for name in one.read(step))
    half.unlink()
    with pytest.warns(UserWarning, match=r"goes on from step 6, and there is no .*half.safetensors"):
        fit(ResNet(**SHAPE), ReferenceRecorder(half), steps=7, data=data, ckpt_path=ckpt)
    again = Reference.load(half)
    assert (again.steps, again.losses.isnan().tolist()) == ((7,), [True] * 6 + [False])
    other_probe = ReferenceRecorder(plain, probe=(torch.ones(4, 3), torch.ones(4, 2)))
    with pytest.raises(ValueError, match="probe"):
        fit(ResNet(**SHAPE), other_probe, steps=12, data=data, ckpt_path=ckpt)


def test_losses_since_the_last_recording_are_in_the_checkpoint(tmp_path: Path) -> None:
    found, data, steps = [], loader(shuffle=False), [0, 2, 12]
    for name, stop in (("whole", 12), ("resumed", 8)):
        path, ckpt = tmp_path / f"{name}.safetensors", tmp_path / name / "step=6.ckpt"
        seed_everything(0, verbose=False)
        saving = ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=6, save_top_k=-1)
        recorder = ReferenceRecorder(path, steps=steps)
        fit(ResNet(**SHAPE), recorder, saving, steps=stop, data=data, enable_checkpointing=True)
        if stop < 12:
            fit(ResNet(**SHAPE), ReferenceRecorder(path, steps=steps), steps=12, data=data, ckpt_path=ckpt)
        found.append(Reference.load(path).losses)
    assert len(found[0]) == 12
    assert found[0].equal(found[1])


def test_run_whose_base_is_drawn_anew_goes_on_in_its_file(path: Path) -> None:
    """What only initialization uses of a plan makes no other run, and in the file is that of the base it began with."""

    def run(*callbacks: Callback, **settings: Any) -> Plan:
        mlu = MLUCallback(ResNet(**SHAPE | {"depth": 2, "hidden": 8}))
        settings |= {"data": loader(shuffle=False), "enable_checkpointing": True}
        fit(ResNet(**SHAPE), mlu, ReferenceRecorder(path, steps=3), *callbacks, **settings)
        return mlu.plan

    first = run(ModelCheckpoint(path.parent, "{step}", every_n_train_steps=3), steps=3)
    assert run(steps=6, ckpt_path=path.parent / "step=3.ckpt").base != first.base
    reference = Reference.load(path)
    assert (reference.steps, reference.header.plan) == ((0, 3, 6), first.to_yaml())


def test_existing_file_is_not_overwritten_by_a_new_run(path: Path) -> None:
    fit(ResNet(**SHAPE), ReferenceRecorder(path))
    before = path.read_bytes()
    with pytest.raises(
        FileExistsError,
        match=r"would overwrite it: it is of another run, with other initial weights. Delete it, .* or resume",
    ):
        fit(ResNet(**SHAPE), ReferenceRecorder(path))
    assert path.read_bytes() == before


def test_second_fit_goes_on(path: Path) -> None:
    trainer = fit(ResNet(**SHAPE), ReferenceRecorder(path, steps=2), steps=3)
    trainer.fit_loop.epoch_loop.max_steps = 6
    module: Any = trainer.lightning_module
    trainer.fit(module, loader())
    assert Reference.load(path).steps == (0, 2, 4, 6)


def test_full_disk_is_one_warning_and_the_training_goes_on(path: Path) -> None:
    """The disk takes no file of more than 2000 bytes from step 2 to step 5."""
    kept: dict[int, tuple[int, ...]] = {}

    class FullDisk(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            limit = 2000 if 1 <= trainer.global_step < 5 else before[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            kept[trainer.global_step] = Reference.load(path).steps

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = fit(ResNet(**SHAPE), FullDisk(), ReferenceRecorder(path, steps=1), Look(), steps=7)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert trainer.global_step == 7
    (message,) = (str(warning.message) for warning in caught if "could not be written" in str(warning.message))
    assert "at step 2" in message and "The training goes on" in message
    assert (kept[4], kept[7]) == ((0, 1), tuple(range(8))) and [*path.parent.iterdir()] == [path]


def test_run_that_diverges_is_recorded(path: Path) -> None:
    fit(ResNet(**SHAPE, lr=1e30), ReferenceRecorder(path, steps=[0, 6]))
    assert Reference.load(path).read(6)["s=1"].isnan().any()


@pytest.mark.parametrize("form", ["vector", "one"])
def test_loss_of_any_form(form: str, path: Path) -> None:
    class Odd(ResNet):
        def __init__(self) -> None:
            super().__init__(**SHAPE)
            self.automatic_optimization = form == "one"

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:
            loss = nn.functional.mse_loss(self(batch[0]), batch[1], reduction="none").mean(1)
            if form == "one":
                return loss.mean()[None]
            self.manual_backward(loss.mean())
            return {"loss": loss}

    settings: dict[str, int] = {"steps": 2} if form == "one" else {"max_epochs": 1, "steps": -1}
    fit(Odd(), ReferenceRecorder(path, steps=[0]), **settings)
    assert Reference.load(path).steps == (0,)


def test_steps_without_a_loss_are_nan_in_any_precision(path: Path) -> None:
    class Skipping(ResNet):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:
            return None if self.global_step == 2 else super().training_step(batch)

    fit(Skipping(**SHAPE), ReferenceRecorder(path, steps=[4]), steps=4, precision="bf16-true")
    assert Reference.load(path).losses.isnan().tolist() == [False, False, True, False]


def test_places_that_cannot_be_written_are_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"cannot be written: it is a folder.*the path of a file"):
        fit(ResNet(**SHAPE), ReferenceRecorder(tmp_path / "folder"))
    recorder = ReferenceRecorder(tmp_path / "new" / "folder" / "run.safetensors")
    fit(ResNet(**SHAPE), recorder)
    assert recorder.path.exists()


class Unlogged(ResNet):  # ``self.log`` cannot be compiled
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
    one, other = (Reference.load(tmp_path / f"{name}.safetensors") for name in ("eager", "compiled"))
    for step in one.steps:
        torch.testing.assert_close(one.read(step), other.read(step))
