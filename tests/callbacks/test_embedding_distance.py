"""EmbeddingDistance: what it logs, and when."""

import math
import os
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import watched_runs
from helpers.watched_runs import LARGE, SHAPE, Memory, Weights, couple, fit, loader, measure, record, samples, stream_of
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from mlu_lightning import MLUCallback
from mlu_lightning.callbacks import EmbeddingDistance, ReferenceRecorder
from mlu_lightning.models import ResNet
from mlu_lightning.observation.comparison import compare_references
from mlu_lightning.observation.reference import Reference


def measured(*arguments: Any, **settings: Any) -> dict[int, dict[str, float]]:
    """Distances by step, without the beginning of their names."""
    logged = measure(*arguments, **settings).distances()
    return {step: {name[len("mlu/distance/") :]: value for name, value in of.items()} for step, of in logged.items()}


def test_logged_values_are_those_of_numpy(tmp_path: Path) -> None:
    """Of weights into which multipliers are folded."""
    theirs, ours = Weights(), Weights()
    path = record(tmp_path / "large.safetensors", None, couple(), theirs)
    logged = measured(path, couple(), ours)
    assert list(logged) == [0, 1, 2, 4, 6]  # although the Trainer logs every 50 steps
    x = samples().tensors[0][:4]
    for step, found in logged.items():
        small, large = (stream_of(weights.at[step], x, branch=1.0) for weights in (ours, theirs))
        expected: dict[str, Any] = {}
        for h, r, s in zip(small, large, ("0", "0.25", "0.5", "0.75", "1"), strict=True):
            h, r = h.double().numpy(), r.double().numpy()
            expected[f"rms/s={s}"] = np.sqrt(np.mean((h - r[:, :8]) ** 2))
            expected[f"gram/s={s}"] = np.linalg.norm(h @ h.T / 8 - r @ r.T / 32) / 4
            a, b = h - h.mean(0), r - r.mean(0)
            norms = np.linalg.norm(a @ a.T) * np.linalg.norm(b @ b.T)
            expected[f"cka/s={s}"] = 1 - np.sum((a @ a.T) * (b @ b.T)) / norms
            nuclear = np.linalg.svd((h / 8**0.5).T @ (r / 32**0.5), compute_uv=False).sum()
            square = (h**2).sum() / 8 + (r**2).sum() / 32 - 2 * nuclear
            expected[f"procrustes/s={s}"] = np.sqrt(max(0.0, square) / 4)
        f, f_ref = (
            stream[-1].double() @ weights.at[step]["readout.weight"].double().T
            for stream, weights in ((small, ours), (large, theirs))
        )
        expected["output"] = float(((f - f_ref) ** 2).mean().sqrt())
        # float32 forward passes; a distance that is a small difference of large numbers has their rounding
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert (found["rms/s=0"] < 1e-6) == (step == 0)  # one embedding, but matrix products of two shapes


@pytest.mark.parametrize("metrics", [["gram"], ["cka", "output"]])
def test_only_chosen_metrics_are_logged_and_can_be_monitored(metrics: Any, tmp_path: Path) -> None:
    path, name = record(tmp_path / "large.safetensors"), f"{metrics[0]}/s=1"
    checkpoint = ModelCheckpoint(tmp_path, monitor=f"mlu/distance/{name}", every_n_train_steps=2, save_top_k=2)
    logged = measured(path, checkpoint, metrics=metrics, enable_checkpointing=True)
    assert {name.split("/")[0] for values in logged.values() for name in values} == set(metrics)
    best: Any = checkpoint.best_model_score
    assert float(best) == pytest.approx(min(logged[step][name] for step in (2, 4, 6)), rel=1e-6)


def test_run_at_the_same_shape_and_seed_is_at_distance_zero(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    path = record(tmp_path / "run.safetensors", ResNet(**SHAPE))
    seed_everything(0, verbose=False)
    for values in measured(path).values():
        for name, value in values.items():
            assert value == pytest.approx(0, abs=1e-7 if "procrustes" in name else 1e-14), name


def test_resumed_run_logs_what_is_still_to_come_and_remembers_that_it_is_coupled(tmp_path: Path) -> None:
    path, plain = tmp_path / "large.safetensors", tmp_path / "plain"
    fit(ResNet(**watched_runs.LARGE), couple(), ReferenceRecorder(path, steps=3), steps=12)
    saving = [ModelCheckpoint(folder, "{step}", every_n_train_steps=6, save_top_k=-1) for folder in (tmp_path, plain)]
    assert list(measured(path, couple(), saving[0], enable_checkpointing=True)) == [0, 3, 6]
    assert list(measured(path, couple(), steps=12, ckpt_path=tmp_path / "step=6.ckpt")) == [9, 12]
    fit(ResNet(**SHAPE), couple(), saving[1], enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"seen at step 0, but this run goes on from step 6.*leave \"rms\" out"):
        measured(path, couple(), steps=12, metrics=["rms"], ckpt_path=plain / "step=6.ckpt")
    with pytest.warns(
        UserWarning, match=r"\"rms\" is left out of .*seen at step 0, but this run goes on from step 6\.$"
    ):
        logged = measured(path, couple(), steps=12, ckpt_path=plain / "step=6.ckpt")
    assert {name.split("/")[0] for values in logged.values() for name in values} == {
        "gram",
        "cka",
        "procrustes",
        "output",
    }


@pytest.mark.parametrize("how", ["moved", "damaged", "replaced", "a pipe"])
def test_reference_that_is_lost_costs_its_distances(how: str, tmp_path: Path) -> None:
    lost, kept, other = (tmp_path / f"{name}.safetensors" for name in ("lost", "kept", "other"))
    for path in (lost, kept, other):
        fit(ResNet(**LARGE), ReferenceRecorder(path, steps=1), steps=4)

    class Lose(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 2 and how == "damaged":
                lost.write_bytes(lost.read_bytes()[:-1])
            elif trainer.global_step == 2:
                other.replace(lost) if how == "replaced" else lost.unlink()
                if how == "a pipe":
                    os.mkfifo(lost)

    with pytest.warns(
        UserWarning, match=r"The reference lost cannot be read at step 3.*The training goes on"
    ) as caught:
        found = measured([lost, kept], Lose(), steps=4, metrics=["gram"])
    assert sum("cannot be read" in str(warning.message) for warning in caught) == 1
    names = {step: {name.split("/")[-1] for name in values} for step, values in found.items()}
    assert names == {step: {"kept"} if step > 2 else {"kept", "lost", "floor"} for step in range(5)}


def test_several_references_and_their_floor(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"metrics": ["rms", "gram", "output"], "data": loader(shuffle=False)}
    paths, runs = [tmp_path / f"{name}.safetensors" for name in ("one", "two", "three")], []
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        record(path, None, couple(), data=settings["data"])
    for reference in ([*map(str, paths)], {"a": str(paths[0]), "b": str(paths[1])}, paths[0]):
        torch.manual_seed(7)
        runs.append(measured(reference, couple(), **settings))
    three, two, one = runs
    assert {name.split("/")[-1] for name in three[0]} == {"one", "two", "three", "floor"}
    assert {name.split("/")[-1] for name in two[0]} == {"a", "b", "floor"}
    for step, values in one.items():
        for name, value in values.items():
            assert three[step][f"{name}/one"] == two[step][f"{name}/a"] == value
    pairs = combinations(map(Reference.load, paths), 2)
    between = [compare_references(*pair, settings["metrics"]) for pair in pairs]
    for step in (0, 6):
        for key in ("rms/s=1", "gram/s=0.5", "output"):
            assert three[step][f"{key}/floor"] == pytest.approx(sum(found[step][key] for found in between) / 3)
            assert two[step][f"{key}/floor"] == pytest.approx(between[0][step][key])


def test_references_of_other_steps_are_each_logged_at_their_own(tmp_path: Path) -> None:
    steps = {"one": [0, 2, 4], "two": [0, 3, 4]}
    reference = [str(record(tmp_path / f"{name}.safetensors", steps=chosen)) for name, chosen in steps.items()]
    logged = measured(reference, metrics=["gram"])
    names = {step: {name.split("/")[-1] for name in values} for step, values in logged.items()}
    assert names == {0: {"one", "two", "floor"}, 2: {"one"}, 3: {"two"}, 4: {"one", "two", "floor"}}


def test_run_that_diverges_logs_nan_and_goes_on(tmp_path: Path) -> None:
    path = record(tmp_path / "large.safetensors", None, couple())
    logged = measured(path, couple(), module=ResNet(**SHAPE, lr=1e30))
    assert list(logged) == [0, 1, 2, 4, 6]
    assert all(math.isnan(value) for name, value in logged[6].items() if name.endswith("s=1") or "output" in name)
    assert all(math.isfinite(value) for value in logged[0].values())


def test_callback_can_be_used_for_one_run_after_another(tmp_path: Path) -> None:
    distance = EmbeddingDistance(record(tmp_path / "large.safetensors", None, couple()))
    for _ in range(2):
        memory = Memory()
        fit(ResNet(**SHAPE), distance, couple(), logger=memory)
        assert list(memory.distances()) == [0, 1, 2, 4, 6]
        assert "mlu/distance/rms/s=1" in memory.distances()[6]
    with pytest.warns(UserWarning, match='"rms" is left out of the distances, because .* not coupled'):
        fit(ResNet(**SHAPE), distance, logger=(memory := Memory()))
    assert {name.split("/")[2] for name in memory.distances()[6]} == {"gram", "cka", "procrustes", "output"}


def test_names_of_references_are_their_last_parts() -> None:
    paths = {"large.v2": "runs/large.v2.safetensors", "large-v0": "entity/project/large:v0"}
    assert EmbeddingDistance([*paths.values()]).state_key == EmbeddingDistance(paths).state_key


class Calls(Memory):  # a logger that also keeps the steps of all calls that had distances
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def log_metrics(self, metrics: Any, step: Any = None) -> None:  # type: ignore[override]
        super().log_metrics(metrics, step)
        if any(name.startswith("mlu/distance/") for name in metrics):
            self.calls.append(step)


def test_each_logger_gets_each_step_once_though_it_takes_several_batches(tmp_path: Path) -> None:
    path, loggers = record(tmp_path / "large.safetensors"), [Calls(), Calls()]
    fit(ResNet(**SHAPE), EmbeddingDistance(path, ["gram"]), logger=loggers, accumulate_grad_batches=2)
    assert [logger.calls for logger in loggers] == [[0, 1, 2, 4, 6]] * 2


@pytest.mark.parametrize("outputs", [2, 40])  # fewer than any embedding has coordinates, and more
def test_references_of_different_embeddings(outputs: int, tmp_path: Path) -> None:
    shape, sizes = SHAPE | {"outputs": outputs}, {"small": 16, "large": 32}
    paths = {name: tmp_path / f"{name}.safetensors" for name in sizes}

    def mlu() -> MLUCallback:
        return MLUCallback(lambda: ResNet(**shape | {"depth": 2}), init="coupled")

    data = DataLoader([(x, torch.ones(outputs)) for x in samples(8).tensors[0]], batch_size=4)  # type: ignore[arg-type]
    for name, size in sizes.items():
        fit(ResNet(**shape | {"embedding": size}), mlu(), ReferenceRecorder(paths[name]), data=data, steps=2)
    small, large = map(Reference.load, paths.values())
    for order in (["small", "large"], ["large", "small"]):
        reference = [str(paths[name]) for name in order]
        logged = measured(reference, mlu(), module=ResNet(**shape), metrics=["rms", "output"], data=data, steps=2)
        assert list(logged) == [0, 1, 2]
        for step, values in logged.items():
            h, r = (reference.read(step)["s=0.5"].double().numpy() for reference in (small, large))
            # the same operations on the same numbers in float64
            assert values["rms/s=0.5/floor"] == pytest.approx(np.sqrt(np.mean((h - r[:, :16]) ** 2)), rel=1e-12)
            assert {"rms/s=1/small", "rms/s=1/large"} < set(values)


def test_references_are_each_logged_at_their_own_depths(tmp_path: Path) -> None:
    depths = {"one": [0.0, 0.5], "two": [0.3, 0.5, 1.0]}
    paths = [str(record(tmp_path / f"{name}.safetensors", steps=[0, 2], depths=s)) for name, s in depths.items()]
    expected = {f"gram/s={s:g}/{name}" for name, chosen in depths.items() for s in chosen} | {"gram/s=0.5/floor"}
    logged = measured(paths, metrics=["gram"], steps=2)
    assert {step: set(values) for step, values in logged.items()} == {0: expected, 2: expected}


def test_run_that_was_at_a_step_of_the_reference_goes_on_past_all_of_them(tmp_path: Path) -> None:
    path = record(tmp_path / "large.safetensors", steps=[0, 2])
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3)
    measured(path, checkpoint, metrics=["gram"], steps=3, enable_checkpointing=True)
    assert measured(path, metrics=["gram"], ckpt_path=tmp_path / "step=3.ckpt") == {}
    assert list(measured(path, metrics=["gram"])) == [0, 2]
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
    path = record(tmp_path / "large.safetensors", None, couple(), data=loader(shuffle=False))

    def run(precision: Any) -> dict[int, dict[str, float]]:
        torch.manual_seed(0)
        return measured(path, couple(), data=loader(shuffle=False), precision=precision)

    expected = run("32-true")
    # rounding of values of size 1, over a few steps: 2^-24 in float32, and 2^-9 in bfloat16
    for precision, tolerance in (("64-true", 1e-6), ("bf16-true", 0.01), ("bf16-mixed", 0.01)):
        found = run(precision)
        assert list(found) == [0, 1, 2, 4, 6]
        assert found[0] != expected[0]  # the pass itself was in this precision, the weights are still the same
        for step, values in found.items():
            assert values == pytest.approx(expected[step], abs=tolerance, rel=0), (precision, step)
