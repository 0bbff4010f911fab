"""EmbeddingDistance: what it logs, and when."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.watched_runs import (
    LARGE,
    SHAPE,
    SILENT,
    Busy,
    Memory,
    Weights,
    coupled,
    fit,
    loader,
    measure,
    record,
    samples,
    stream_of,
)
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from mlu_lightning import MLUCallback
from mlu_lightning.callbacks import EmbeddingDistance, ReferenceRecorder
from mlu_lightning.models import ResNet
from mlu_lightning.observation.comparison import compare_references
from mlu_lightning.observation.reference import Reference


def test_logged_values_are_those_of_numpy(tmp_path: Path) -> None:
    theirs, ours = Weights(), Weights()
    path = record(tmp_path / "large.safetensors", None, coupled(), theirs)
    logged = measure(path, coupled(), ours).distances()
    assert list(logged) == [0, 1, 2, 4, 6]  # although the Trainer logs every 50 steps
    x = samples().tensors[0][:4]
    for step, values in logged.items():
        small, large = (stream_of(weights.at[step], x, branch=0.5) for weights in (ours, theirs))
        expected: dict[str, float] = {}
        for position, s in enumerate(("0", "0.25", "0.5", "0.75", "1")):
            h, r = (stream[position].double().numpy() for stream in (small, large))
            expected[f"rms/s={s}"] = float(np.sqrt(np.mean((h - r[:, :8]) ** 2)))
            expected[f"gram/s={s}"] = float(np.linalg.norm(h @ h.T / 8 - r @ r.T / 32) / 4)
            a, b = h - h.mean(0), r - r.mean(0)
            norms = np.linalg.norm(a @ a.T) * np.linalg.norm(b @ b.T)
            expected[f"cka/s={s}"] = float(1 - np.sum((a @ a.T) * (b @ b.T)) / norms)
            nuclear = np.linalg.svd((h / 8**0.5).T @ (r / 32**0.5), compute_uv=False).sum()
            square = (h**2).sum() / 8 + (r**2).sum() / 32 - 2 * nuclear
            expected[f"procrustes/s={s}"] = float(np.sqrt(max(0.0, square) / 4))
        f, f_ref = (
            stream[-1].double() @ weights.at[step]["readout.weight"].double().T * factor
            for stream, weights, factor in ((small, ours, 1.0), (large, theirs, 0.25))
        )
        expected["output"] = float(((f - f_ref) ** 2).mean().sqrt())
        found = {name.removeprefix("mlu/distance/"): value for name, value in values.items()}
        # float32 forward passes; a distance that is a small difference of large numbers has their rounding
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert (found["rms/s=0"] < 1e-6) == (step == 0)  # one embedding, but matrix products of two shapes


@pytest.mark.parametrize("metrics", [["gram"], ["cka", "output"]])
def test_only_chosen_metrics_are_logged_and_can_be_monitored(metrics: Any, tmp_path: Path) -> None:
    path = record(tmp_path / "large.safetensors")
    checkpoint = ModelCheckpoint(
        tmp_path, monitor=f"mlu/distance/{metrics[0]}/s=1", every_n_train_steps=2, save_top_k=2
    )
    logged = measure(path, checkpoint, metrics=metrics, enable_checkpointing=True).distances()
    found = {name.split("/")[2] for values in logged.values() for name in values}
    assert found == set(metrics)
    assert checkpoint.best_model_score is not None
    best = min(logged[step][f"mlu/distance/{metrics[0]}/s=1"] for step in (2, 4, 6))
    assert float(checkpoint.best_model_score) == pytest.approx(best, rel=1e-6)


def test_training_is_bit_for_bit_that_without_the_callback(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    path = record(tmp_path / "large.safetensors", Busy(), steps=1)
    runs = []
    for callbacks in ([], [EmbeddingDistance(path, ["gram", "output"])]):
        seed_everything(3, verbose=False)
        module = Busy()
        fit(module, *callbacks)
        runs.append((module.state_dict(), module.seen, torch.rand(1)))
    plain, watched = runs
    assert all(value.equal(watched[0][name]) for name, value in plain[0].items())
    assert plain[1:] == watched[1:]


def test_run_at_the_same_shape_and_seed_is_at_distance_zero(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    path = record(tmp_path / "run.safetensors", ResNet(**SHAPE))
    seed_everything(0, verbose=False)
    for values in measure(path).distances().values():
        for name, value in values.items():
            assert value == pytest.approx(0, abs=1e-7 if "procrustes" in name else 1e-14), name


def test_base_that_each_run_builds_couples_exactly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = record(tmp_path / "large.safetensors", None, coupled())
    torch.manual_seed(1)
    # one embedding, but matrix products of two shapes
    assert measure(path, coupled()).distances()[0]["mlu/distance/rms/s=0"] < 1e-6


def test_resumed_run_logs_what_is_still_to_come_and_remembers_that_it_is_coupled(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    fit(ResNet(**LARGE), coupled(), ReferenceRecorder(path, steps=3), steps=12)
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)
    first = measure(path, coupled(), checkpoint, enable_checkpointing=True)
    assert list(first.distances()) == [0, 3, 6]
    ckpt = tmp_path / "step=6.ckpt"
    assert list(measure(path, coupled(), steps=12, ckpt_path=ckpt).distances()) == [9, 12]
    plain = tmp_path / "plain"
    fit(
        ResNet(**SHAPE),
        coupled(),
        ModelCheckpoint(plain, "{step}", every_n_train_steps=6, save_top_k=-1),
        enable_checkpointing=True,
    )
    with pytest.raises(ValueError, match=r"seen at step 0, but this run goes on from step 6.*Leave \"rms\" out"):
        measure(path, coupled(), steps=12, ckpt_path=plain / "step=6.ckpt")


def test_several_references_and_their_floor(tmp_path: Path) -> None:
    paths = []
    for seed, name in ((1, "one"), (2, "two"), (3, "three")):
        torch.manual_seed(seed)
        paths.append(record(tmp_path / f"{name}.safetensors", None, coupled(), data=loader(shuffle=False)))
    settings: dict[str, Any] = {"metrics": ["rms", "gram", "output"], "data": loader(shuffle=False)}
    runs = []
    for reference in ([str(path) for path in paths], {"a": str(paths[0]), "b": str(paths[1])}, paths[0]):
        torch.manual_seed(7)
        runs.append(measure(reference, coupled(), **settings).distances())
    three, two, one = runs
    assert {name.split("/")[-1] for name in three[0]} == {"one", "two", "three", "floor"}
    assert {name.split("/")[-1] for name in two[0]} == {"a", "b", "floor"}
    for step, values in one.items():
        for name, value in values.items():
            assert three[step][f"{name}/one"] == two[step][f"{name}/a"] == value
    references = [Reference.load(path) for path in paths]
    pairs = [(0, 1), (0, 2), (1, 2)]
    between = [compare_references(references[i], references[j], ["rms", "gram", "output"]) for i, j in pairs]
    for step in (0, 6):
        for key in ("rms/s=1", "gram/s=0.5", "output"):
            mean = sum(found[step][key] for found in between) / 3
            assert three[step][f"mlu/distance/{key}/floor"] == pytest.approx(mean)
            assert two[step][f"mlu/distance/{key}/floor"] == pytest.approx(between[0][step][key])


def test_references_of_other_steps_are_each_logged_at_their_own(tmp_path: Path) -> None:
    record(tmp_path / "one.safetensors", steps=[0, 2, 4])
    record(tmp_path / "two.safetensors", steps=[0, 3, 4])
    reference = [str(tmp_path / f"{name}.safetensors") for name in ("one", "two")]
    logged = measure(reference, metrics=["gram"]).distances()
    names = {step: {name.split("/")[-1] for name in values} for step, values in logged.items()}
    assert names == {0: {"one", "two", "floor"}, 2: {"one"}, 3: {"two"}, 4: {"one", "two", "floor"}}


def test_run_that_diverges_logs_nan_and_goes_on(tmp_path: Path) -> None:
    path = record(tmp_path / "large.safetensors", None, coupled())
    logged = measure(path, coupled(), module=ResNet(**SHAPE, lr=1e30)).distances()
    assert list(logged) == [0, 1, 2, 4, 6]
    assert all(math.isnan(value) for name, value in logged[6].items() if name.endswith("s=1") or "output" in name)
    assert all(math.isfinite(value) for value in logged[0].values())


def test_callback_can_be_used_for_one_run_after_another(tmp_path: Path) -> None:
    path = record(tmp_path / "large.safetensors", None, coupled())
    distance = EmbeddingDistance(path)
    for callbacks in ([coupled()], [coupled()]):
        memory = Memory()
        fit(ResNet(**SHAPE), distance, *callbacks, logger=memory)
        assert list(memory.distances()) == [0, 1, 2, 4, 6]
    with pytest.raises(ValueError, match="not coupled"):
        fit(ResNet(**SHAPE), distance)


def test_names_of_references_are_their_last_parts() -> None:
    distance = EmbeddingDistance(["runs/large.v2.safetensors", "entity/project/large:v0"])
    assert (
        distance.state_key
        == EmbeddingDistance({"large.v2": "runs/large.v2.safetensors", "large-v0": "entity/project/large:v0"}).state_key
    )


def test_two_callbacks_with_their_own_references(tmp_path: Path) -> None:
    record(tmp_path / "one.safetensors")
    record(tmp_path / "two.safetensors")
    memory = Memory()
    callbacks = [EmbeddingDistance({name: str(tmp_path / f"{name}.safetensors")}, ["gram"]) for name in ("one", "two")]
    trainer = Trainer(max_steps=2, callbacks=callbacks, **SILENT | {"logger": memory})
    trainer.fit(ResNet(**SHAPE), loader())
    assert list(memory.distances()) == [0, 1, 2]
    assert {name for name in memory.distances()[1] if "/s=1/" in name} == {
        "mlu/distance/gram/s=1/one",
        "mlu/distance/gram/s=1/two",
    }


class Calls(Memory):
    """A logger that also keeps the steps of all calls that had distances."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def log_metrics(self, metrics: Any, step: Any = None) -> None:  # type: ignore[override]
        super().log_metrics(metrics, step)
        if any(name.startswith("mlu/distance/") for name in metrics):
            self.calls.append(step)


def test_each_logger_gets_each_step_once_though_it_takes_several_batches(tmp_path: Path) -> None:
    path = record(tmp_path / "large.safetensors")
    loggers = [Calls(), Calls()]
    fit(ResNet(**SHAPE), EmbeddingDistance(path, ["gram"]), logger=loggers, accumulate_grad_batches=2)
    assert [logger.calls for logger in loggers] == [[0, 1, 2, 4, 6]] * 2


@pytest.mark.parametrize("outputs", [2, 40])  # fewer than any embedding has coordinates, and more
def test_references_of_different_embeddings(outputs: int, tmp_path: Path) -> None:
    def mlu() -> MLUCallback:
        return MLUCallback(lambda: ResNet(**SHAPE | {"depth": 2, "outputs": outputs}), init="coupled")

    data = DataLoader([(x, torch.ones(outputs)) for x in samples(8).tensors[0]], batch_size=4)  # type: ignore[arg-type]
    settings: dict[str, Any] = {"data": data, "steps": 2}
    sizes = {"small": 16, "large": 32}
    for name, size in sizes.items():
        fit(
            ResNet(**SHAPE | {"embedding": size, "outputs": outputs}),
            mlu(),
            ReferenceRecorder(tmp_path / f"{name}.safetensors"),
            **settings,
        )
    small, large = (Reference.load(tmp_path / f"{name}.safetensors") for name in sizes)
    for order in (["small", "large"], ["large", "small"]):
        paths = [str(tmp_path / f"{name}.safetensors") for name in order]
        module = ResNet(**SHAPE | {"outputs": outputs})
        logged = measure(paths, mlu(), module=module, metrics=["rms", "output"], **settings).distances()
        assert list(logged) == [0, 1, 2]
        for step, values in logged.items():
            h, r = (reference.read(step)["s=0.5"].double().numpy() for reference in (small, large))
            # the same operations on the same numbers in float64
            floor = pytest.approx(np.sqrt(np.mean((h - r[:, :16]) ** 2)), rel=1e-12)
            assert values["mlu/distance/rms/s=0.5/floor"] == floor
            assert {"mlu/distance/rms/s=1/small", "mlu/distance/rms/s=1/large"} < set(values)


def test_references_are_each_logged_at_their_own_depths(tmp_path: Path) -> None:
    depths = {"one": [0.0, 0.5], "two": [0.3, 0.5, 1.0]}
    for name, chosen in depths.items():
        record(tmp_path / f"{name}.safetensors", steps=[0, 2], depths=chosen)
    reference = [str(tmp_path / f"{name}.safetensors") for name in depths]
    logged = measure(reference, metrics=["gram"], steps=2).distances()
    expected = {f"mlu/distance/gram/s={s:g}/{name}" for name, chosen in depths.items() for s in chosen}
    assert {step: set(values) for step, values in logged.items()} == dict.fromkeys(
        (0, 2), expected | {"mlu/distance/gram/s=0.5/floor"}
    )


@pytest.mark.parametrize("step", [0, 6])
def test_one_common_step_is_enough(step: int, tmp_path: Path) -> None:
    path = record(tmp_path / "large.safetensors", steps=[step])
    assert list(measure(path, metrics=["gram"], steps=6).distances()) == [step]


def test_run_that_was_at_a_step_of_the_reference_goes_on_past_all_of_them(tmp_path: Path) -> None:
    path = record(tmp_path / "large.safetensors", steps=[0, 2])
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3)
    measure(path, checkpoint, metrics=["gram"], steps=3, enable_checkpointing=True)
    ckpt = tmp_path / "step=3.ckpt"
    assert measure(path, metrics=["gram"], ckpt_path=ckpt).distances() == {}
    assert list(measure(path, metrics=["gram"]).distances()) == [0, 2]

    distance = EmbeddingDistance(path, ["gram"])
    trainer = fit(ResNet(**SHAPE), distance, steps=3)
    trainer.fit_loop.epoch_loop.max_steps = 6
    module: Any = trainer.lightning_module
    trainer.fit(module, loader())
    assert trainer.global_step == 6
    assert "mlu/distance/gram/s=1" in trainer.callback_metrics, "the second fit goes on, too"

    # the same callback in another run, whose checkpoint says nothing of it
    plain = ModelCheckpoint(tmp_path / "plain", "{step}", every_n_train_steps=3)
    fit(ResNet(**SHAPE), plain, steps=3, enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"at the steps 0, 2, and this run goes from 3 to 6"):
        fit(ResNet(**SHAPE), distance, ckpt_path=tmp_path / "plain" / "step=3.ckpt")


def test_other_precisions_measure_nearly_the_same(tmp_path: Path) -> None:
    path = record(tmp_path / "large.safetensors", None, coupled(), data=loader(shuffle=False))

    def run(precision: Any) -> dict[int, dict[str, float]]:
        torch.manual_seed(0)
        return measure(path, coupled(), data=loader(shuffle=False), precision=precision).distances()

    expected = run("32-true")
    # rounding of values of size 1, over a few steps: 2^-24 in float32, and 2^-9 in bfloat16
    for precision, tolerance in (("64-true", 1e-6), ("bf16-true", 0.01), ("bf16-mixed", 0.01)):
        found = run(precision)
        assert list(found) == [0, 1, 2, 4, 6]
        assert found[0] != expected[0]  # the pass itself was in this precision, the weights are still the same
        for step, values in found.items():
            assert values == pytest.approx(expected[step], abs=tolerance, rel=0), (precision, step)
